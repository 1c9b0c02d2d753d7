"""How texts go through the model fast: packed without padding, attention, the optimizer, the graph for CPUs.

It need not be read to make the project yours: what a text is stands in `text.py`, the model and its loss in
`training/model.py`. Training and serving both stand on this package, so that both compute alike.
"""
