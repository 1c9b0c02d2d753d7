"""Notes what one version answers, and says on demand whether that is still like what it answered to its test."""

import csv
import io
import threading
import time
from typing import Any

from tuneserve.lifecycle.drift import DECIMALS, Answers, Observation, Report, Window, compare, utc
from tuneserve.serving.model import Model

FRESH_S = 5.0
"""Seconds for which a report is given again."""


class Monitor:
    """The window of one version beside its reference.

    Args:
        model: whose answers it is told of.
        window: for them, empty.
    """

    def __init__(self, model: Model, window: Window) -> None:
        self.window, self.model_version = window, model.id
        self._model = model
        self._report: Report | None = None
        self._stale_at = 0.0
        self._turn = threading.Lock()

    def observe(self, observation: Observation) -> None:
        """Note an answer."""
        self.window.add(observation)

    def report(self) -> Report:
        """What the window shows, or showed a few seconds ago. It takes milliseconds: not for the event loop."""
        with self._turn:
            if self._report is None or time.monotonic() >= self._stale_at:
                self._report = compare(self._model.reference, self.window)
                self._stale_at = time.monotonic() + FRESH_S
            return self._report

    def window_csv(self) -> str:
        """The window's answers, a row each, oldest first."""
        at, answers = self.window.read()
        return _csv(self._columns(answers) | {"at": [utc(seconds) for seconds in at]})

    def reference_csv(self) -> str:
        """The reference's answers in the columns of the window's, but for the time; no rows if there is none."""
        reference = self._model.reference
        return _csv(self._columns(reference.answers if reference is not None else Window().read()[1]))

    def _columns(self, answers: Answers) -> dict[str, list[Any]]:
        return {
            "prediction": [self._model.labels[label_id] for label_id in answers.label_ids],
            "confidence": [f"{confidence:.{DECIMALS}f}" for confidence in answers.confidences],
            "tokens": answers.tokens.tolist(),
            "unknown_share": [f"{share:.4f}" for share in answers.unknown_shares],
            "truncated": answers.truncated.astype(int).tolist(),
        }


def _csv(columns: dict[str, list[Any]]) -> str:
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(columns)
    table.writerows(zip(*columns.values(), strict=True))
    return file.getvalue()
