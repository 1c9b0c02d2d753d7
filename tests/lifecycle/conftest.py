"""A store without versions, and trainers of it whose programs a test writes."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tuneserve.lifecycle.store import Store
from tuneserve.lifecycle.trainer import Trainer
from tuneserve.settings import PROJECT

Make = Callable[..., Trainer]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(PROJECT / "production" / "docker-res")}
"""Of a process that finds the package."""
SLEEP = "import time; time.sleep(60)"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "models")
    store.prepare()
    return store


@pytest.fixture
def make(store: Store) -> Iterator[Make]:
    trainers = []

    def make(program: str, *, serves: bool = False) -> Trainer:
        trainers.append(Trainer([sys.executable, "-c", program], store, serves=lambda: serves))
        return trainers[-1]

    yield make
    for trainer in trainers:
        trainer.close()
