"""Scoring whole files: what `run.py predict` does."""
