"""Notes what one version answers, and says on demand whether that is still like what it answered to its test."""

import csv
import io
import logging
import threading
import time
from typing import Any

from tuneserve.errors import StoreError
from tuneserve.lifecycle.drift import DECIMALS, Answers, Reference, Report, Window, compare, read_reference, utc
from tuneserve.serving.classifier import Classifier, Prediction
from tuneserve.text import Tokens

logger = logging.getLogger(__name__)

FRESH_S = 5.0
"""Seconds for which a report is given again."""


class Monitor:
    """The window of one version beside its reference.

    Args:
        classifier: whose answers it is told of.
        window: for them, empty.
    """

    def __init__(self, classifier: Classifier, window: Window) -> None:
        self.window = window
        self._label_ids = {label: place for place, label in enumerate(classifier.version.labels)}
        self._unknown_id = classifier.unknown_id
        self._reference = _reference(classifier)
        self._report: Report | None = None
        self._stale_at = 0.0
        self._turn = threading.Lock()

    def observe(self, tokens: Tokens, prediction: Prediction) -> None:
        """Note an answer. Of a text that was read in several windows the first counts, as it did in the test."""
        ids = tokens.ids
        self.window.add(
            self._label_ids[prediction.label],
            prediction.scores[prediction.label],
            len(ids),
            ids.count(self._unknown_id) if self._unknown_id is not None else 0,
            tokens.truncated or len(tokens.windows) > 1,
        )

    def report(self) -> Report:
        """What the window shows, or showed a few seconds ago. It takes milliseconds: not for the event loop."""
        with self._turn:
            if self._report is None or time.monotonic() >= self._stale_at:
                self._report = compare(self._reference, self.window)
                self._stale_at = time.monotonic() + FRESH_S
            return self._report

    def window_csv(self) -> str:
        """The window's answers, a row each, oldest first."""
        at, answers = self.window.read()
        return _csv(self._columns(answers) | {"at": [utc(seconds) for seconds in at]})

    def reference_csv(self) -> str:
        """The reference's answers in the columns of the window's, but for the time; no rows if there is none."""
        return _csv(self._columns(self._reference.answers if self._reference is not None else Window().read()[1]))

    def _columns(self, answers: Answers) -> dict[str, list[Any]]:
        labels = list(self._label_ids)
        return {
            "prediction": [labels[place] for place in answers.label_ids],
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


def _reference(classifier: Classifier) -> Reference | None:
    try:
        reference = read_reference(classifier.version)
    except StoreError as error:
        logger.warning("drift cannot be judged: %s", error)  # which is no reason not to answer
        return None
    return reference.whole_texts() if reference is not None and classifier.refuses_long_texts else reference
