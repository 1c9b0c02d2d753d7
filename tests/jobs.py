"""Whole jobs for tests: as a function, and as a real process."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from tuneserve.artifact import Version
from tuneserve.settings import PROJECT, Settings
from tuneserve.signals import Stop
from tuneserve.training import job

RUN = PROJECT / "production" / "docker-res" / "run.py"


def train(environment: dict[str, str], **changed: str) -> Version:
    """Train, and serve what came of it, unless a test is about which version is better."""
    settings = Settings.from_environ({"MAX_ACCURACY_DROP": "1"} | environment | changed)
    version = job.train(settings, Stop(), threads=1)
    assert version is not None
    return version


def start(
    environment: dict[str, str], *before: str, verb: Sequence[str] = ("train",), **changed: str
) -> "subprocess.Popen[str]":
    """Start `run.py train`, as the last arguments of the command `before`."""
    return subprocess.Popen(
        [*before, sys.executable, str(RUN), *verb],
        env=os.environ | environment | changed,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
