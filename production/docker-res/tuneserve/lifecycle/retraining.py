"""When a server trains again: by schedule, and when what it is asked is no longer like what it was tested on."""

import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from tuneserve.errors import BusyError
from tuneserve.lifecycle.schedule import Schedule
from tuneserve.lifecycle.trainer import Trainer

logger = logging.getLogger(__name__)

EVERY_S = 1.0
DRIFT_EVERY_S = 30.0
"""Seconds between two looks at the drift, which takes milliseconds to compute."""
DRIFT_PAUSE = timedelta(hours=6)
"""Least time between two trainings for drift: data that have not changed teach nothing new."""


class Retraining:
    """A thread that starts trainings.

    Args:
        trainer: that it starts them with.
        schedule: when to; None never.
        drift: what has drifted, in words, and None while nothing has.
    """

    def __init__(
        self, trainer: Trainer, *, schedule: Schedule | None, drift: Callable[[], str | None] = lambda: None
    ) -> None:
        self._trainer, self._schedule, self._drift = trainer, schedule, drift
        self._looked = self._drifted = datetime.min.replace(tzinfo=UTC)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="retraining", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self, now: datetime) -> None:
        """Start what is due; while a training runs, the schedule waits for its end and then catches up once."""
        if self._trainer.running is not None:
            return
        why = None
        if self._schedule is not None and self._schedule.due(now):
            self._schedule.mark(now)
            why = "RETRAIN_SCHEDULE"
        elif not timedelta(0) <= now - self._looked < timedelta(seconds=DRIFT_EVERY_S):  # also if the clock went back
            self._looked = now
            drifted = self._drift()
            if drifted is not None and not timedelta(0) <= now - self._drifted < DRIFT_PAUSE:
                self._drifted = now
                why = f"drift: {drifted}"
        if why is not None:
            try:
                self._trainer.start(why)
            except BusyError as error:
                logger.info("no training for %s: %s", why, error)

    def _watch(self) -> None:
        while not self._ended.wait(EVERY_S):
            try:
                self.look(datetime.now(UTC))
            except Exception:  # whatever it is, the next look may go better, and the server must not suffer
                logger.exception("retraining could not be looked after")
