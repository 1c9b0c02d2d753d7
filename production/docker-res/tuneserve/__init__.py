"""tuneserve: fine-tune a text classifier, prove it, save it, serve it; one job, one container.

`run.py` beside this package lists what the container can do; `settings.py` lists every variable.
Two wings, `training` and `serving`, stand on `lifecycle`, `artifact`, `text`, `network`, `hardware`, `errors` and
`settings`; they never import each other: what passes between them is a folder.
"""

__version__ = "0.1.0"
