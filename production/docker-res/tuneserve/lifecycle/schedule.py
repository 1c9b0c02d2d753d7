"""When a scheduled training is due: cron's syntax in a named time zone, each occurrence once, the missed ones as one.

The syntax is read by cronsim, which treats clock changes as Debian's cron does: what stands in the hour that is skipped
runs right after it, what stands in the repeated hour runs once. It has no dependencies and keeps no state, where
APScheduler would bring the threads and stores of a scheduler for one line of cron.
"""

import hashlib
import json
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

from cronsim import CronSim

from tuneserve.files import write_json

logger = logging.getLogger(__name__)

AHEAD = timedelta(hours=3)
"""How far what was dealt with may lie in the future before the clock is taken to have been wrong."""


class Schedule:
    """Occurrences of a cron expression, and which of them were dealt with.

    Args:
        expression: five fields, as crontab(5) has them.
        time_zone: IANA name, `Europe/Berlin`.
        jitter_s: each occurrence is put off by up to so much, always by the same for one occurrence and `host`.
        memory: JSON file with the last occurrence that was dealt with.
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
        """Whether an occurrence has come since the last one that was dealt with.

        The first time this is asked nothing is due: a schedule that was just set up has missed nothing.
        """
        if self._handled is not None and self._handled - now > AHEAD:
            logger.warning("the clock went back by %s: the schedule begins anew", self._handled - now)
            self._handled = None
        if self._handled is None:
            self.mark(now)
            return False
        occurrence = self.next(self._handled)
        return occurrence + self._jitter(occurrence) <= now

    def mark(self, now: datetime) -> None:
        """All occurrences up to now are dealt with. A clock that went back does not bring them again."""
        self._handled = now if self._handled is None else max(now, self._handled)
        content = {"handled": self._handled.isoformat(), "expression": self._expression}
        try:
            write_json(self._memory, content)
        except OSError as error:
            logger.warning("%s cannot be written: %s; a restart may repeat or miss a training", self._memory, error)

    def _remember(self) -> datetime | None:
        try:
            content = json.loads(self._memory.read_text(encoding="utf-8"))
            handled = datetime.fromisoformat(content["handled"]).astimezone(UTC)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s cannot be read (%r): the schedule begins anew", self._memory, error)
            return None
        return handled if content.get("expression") == self._expression else None  # another schedule missed nothing

    def _jitter(self, occurrence: datetime) -> timedelta:
        digest = hashlib.sha256(f"{self._host} {occurrence.isoformat()}".encode()).digest()
        return timedelta(seconds=self._jitter_s * int.from_bytes(digest[:8], "big") / 2**64)
