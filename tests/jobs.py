"""Whole jobs for tests: as a function, and as a real process."""

import os
import subprocess
import sys
from collections.abc import Sequence

from tuneserve.artifact import Version
from tuneserve.settings import PROJECT, Settings
from tuneserve.signals import Stop
from tuneserve.training import job

RUN = PROJECT / "production" / "docker-res" / "run.py"


def train(environment: dict[str, str], **changed: str) -> Version:
    """Train, and serve what came of it, unless a test is about which version is better."""
    settings = Settings.from_environ({"MAX_ACCURACY_DROP": "1", "MAX_LATENCY_INCREASE": "100"} | environment | changed)
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
