"""What is asked and answered: each task is a module here and a line in `catalog.py`."""
