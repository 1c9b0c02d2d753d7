"""From settings to a finished version in the store. `job.py` is the recipe; start there."""
