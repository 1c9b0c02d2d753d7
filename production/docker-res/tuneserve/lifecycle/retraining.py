"""When a server trains again: by schedule, and after drift.

A schedule has cron's syntax in a named time zone; each occurrence counts once, those that were missed count as one. The
syntax is parsed by cronsim, which treats clock changes as Debian's cron does: an occurrence in the skipped hour runs
right after it, one in the repeated hour runs once. It has no dependencies and keeps no state, where APScheduler would
bring the threads and stores of a scheduler for one line of cron.
"""

import hashlib
import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from tuneserve.errors import BusyError
from tuneserve.files import read_record, write_json
from tuneserve.lifecycle.trainer import Trainer

logger = logging.getLogger(__name__)

EVERY_S = 1.0
DRIFT_EVERY_S = 30.0
"""Seconds between two checks of the drift, which takes milliseconds to compute."""
DRIFT_PAUSE = timedelta(hours=6)
"""Minimum time between two trainings for drift, since the training data may not have changed yet."""
AHEAD = timedelta(hours=3)
"""How far the last handled occurrence may lie in the future before the clock is taken to have been wrong."""


class Memory(TypedDict):
    """The last occurrence that was handled, and of which expression."""

    handled: str
    expression: str


SHAPE = TypeAdapter(Memory)


class Schedule:
    """Occurrences of a cron expression, and which of them were handled.

    Args:
        expression: five fields, as crontab(5) has them.
        time_zone: IANA name, `Europe/Berlin`.
        jitter_s: most seconds by which an occurrence is delayed; the delay depends on the occurrence and `host` alone.
        memory: JSON file with the last occurrence that was handled.
        host: whose jitter this is.
    """

    def __init__(self, expression: str, time_zone: str, *, jitter_s: float, memory: Path, host: str = "") -> None:
        self._expression, self._zone = expression, ZoneInfo(time_zone)
        self._jitter_s, self._memory, self._host = jitter_s, memory, host
        self._handled: datetime | None = self._remember()

    def next(self, after: datetime) -> datetime:
        """The first occurrence after a moment, in UTC, without jitter."""
        return next(CronSim(self._expression, after.astimezone(self._zone))).astimezone(UTC)

    def due(self, now: datetime) -> bool:
        """Whether there was an occurrence since the last one that was handled.

        The first call finds nothing due: a new schedule has missed nothing.
        """
        if self._handled is not None and self._handled - now > AHEAD:
            logger.warning("the clock went back by %s: the schedule starts over", self._handled - now)
            self._handled = None
        if self._handled is None:
            self.mark(now)
            return False
        occurrence = self.next(self._handled)
        return occurrence + self._jitter(occurrence) <= now

    def mark(self, now: datetime) -> None:
        """Mark all occurrences up to now as handled. A clock that goes back does not repeat them."""
        self._handled = now if self._handled is None else max(now, self._handled)
        content = {"handled": self._handled.isoformat(), "expression": self._expression}
        try:
            write_json(self._memory, content)
        except OSError as error:
            logger.warning("%s cannot be written: %s; a restart may repeat or miss a training", self._memory, error)

    def _remember(self) -> datetime | None:
        try:
            content = read_record(self._memory, SHAPE)
            handled = datetime.fromisoformat(content["handled"]).astimezone(UTC)
            self.next(handled)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, OverflowError, CronSimError, StopIteration) as error:
            logger.warning("%s cannot be read (%s): the schedule starts over", self._memory, error or type(error))
            return None
        return handled if content["expression"] == self._expression else None  # a new schedule has missed nothing

    def _jitter(self, occurrence: datetime) -> timedelta:
        digest = hashlib.sha256(f"{self._host} {occurrence.isoformat()}".encode()).digest()
        return timedelta(seconds=self._jitter_s * int.from_bytes(digest[:8], "big") / 2**64)


class Retraining:
    """A thread that starts trainings.

    Args:
        trainer: that it starts them with.
        schedule: when to; None for never.
        drift: returns a description of the drift, or None.
    """

    def __init__(
        self, trainer: Trainer, *, schedule: Schedule | None, drift: Callable[[], str | None] = lambda: None
    ) -> None:
        self._trainer, self._schedule, self._drift = trainer, schedule, drift
        self._looked = self._drifted = datetime.min.replace(tzinfo=UTC)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="retraining", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self, now: datetime) -> None:
        """Start a training that is due; while one runs, the schedule waits for its end and then catches up once."""
        if self._trainer.running is not None:
            return
        why = None
        if self._schedule is not None and self._schedule.due(now):
            self._schedule.mark(now)
            why = "RETRAIN_SCHEDULE"
        elif not timedelta(0) <= now - self._looked < timedelta(seconds=DRIFT_EVERY_S):  # also if the clock goes back
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
            except Exception:  # the next check may succeed, and the server must go on
                logger.exception("the check for a due training failed")
