"""Stub until merged."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def hold(path: Path, what: str) -> Iterator[None]:
    yield
