"""What computes: one engine a module, and a line in `choice.py`."""
