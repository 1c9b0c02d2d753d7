"""The job of a second that the tests of training have."""

from training.conftest import environment, tiny_bert, tiny_data

__all__ = ["environment", "tiny_bert", "tiny_data"]
