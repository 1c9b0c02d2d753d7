"""Tables of texts: read for training and scoring, and written with answers, by the same code.

`formats.py` lists the formats by file ending. A new one is a module with a class that has the methods of
`format.Format`, and a line in that list. Compression (`streams.py`) is independent of the format.
"""
