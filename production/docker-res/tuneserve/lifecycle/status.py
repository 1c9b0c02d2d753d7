"""How far a training is: a small file that whoever waits for it can read, on another machine too."""

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from tuneserve.errors import TuneserveError
from tuneserve.files import replace_file
from tuneserve.lifecycle.decision import Decision

EVERY_S = 1.0
"""Seconds between two writings."""

Phase = Literal["preparing", "training", "testing", "judging", "finished", "failed"]


class Status:
    """Written by the process that trains, as a context; nothing that goes wrong with it stops a training.

    Args:
        path: of the file; None writes nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._content: dict[str, Any] = {"phase": "preparing", "pid": os.getpid()}
        self._steps, self._epochs = 1, 1
        self._first: int | None = None
        self._began = 0.0
        self._written = 0.0

    def phase(self, name: Phase) -> None:
        """Another part of the job has begun."""
        self._content = {"phase": name, "pid": os.getpid()}
        self._write()

    def training(self, *, steps: int, epochs: int) -> None:
        """The optimizer's steps begin; `steps` of all epochs."""
        self._steps, self._epochs, self._began = steps, epochs, time.monotonic()
        self.phase("training")

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """So many steps are done."""
        now = time.monotonic()
        if self._first is None:
            self._first = step - 1  # not 0 if it goes on from a checkpoint
        if now - self._written < EVERY_S or "loss" not in figures:
            return
        pace_s = (now - self._began) / (step - self._first)
        self._content |= {
            "epoch": min(self._epochs, 1 + (step - 1) * self._epochs // self._steps),
            "epochs": self._epochs,
            "progress": round(min(1.0, step / self._steps), 4),
            "loss": round(figures["loss"], 4),
            "eta_s": round(max(0, self._steps - step) * pace_s, 1),
        }
        self._write()

    def decided(self, decision: Decision, *, before: Decision | None) -> None:
        """The gate has spoken for the version, or had done so `before`."""
        said = decision.sentence if decision != before else "nothing to train: it has these settings and data"
        self._content = {"phase": "finished", "version": decision.version, "decision": said}
        self._write()

    def __enter__(self) -> "Status":
        self.phase("preparing")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            said = str(error) if isinstance(error, TuneserveError) else type(error).__name__
            self._content = {"phase": "failed", "reason": said}
            self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        self._written = time.monotonic()
        with suppress(OSError):  # not durable: what a power cut takes is of no use after it
            replace_file(self._path, json.dumps(self._content).encode(), durable=False)


def read_status(path: Path) -> dict[str, Any]:
    """What the newest training wrote last; empty if there is nothing to read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
