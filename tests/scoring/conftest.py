"""The classifier whose answers a test can work out, as the tests of serving have it."""

from serving.conftest import classifier, engine, version

__all__ = ["classifier", "engine", "version"]
