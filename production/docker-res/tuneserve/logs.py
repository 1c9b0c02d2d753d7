"""One log: plain lines on standard output, repeated in a file, both written by a thread of their own."""

import copy
import json
import logging
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tuneserve.errors import SettingsError
from tuneserve.settings import without_password

FORMAT = "%(asctime)s %(levelname)s %(message)s"

LONGEST_QUEUE = 10_000
"""Lines that may wait to be written; when whoever reads standard output has stopped, the rest is lost and counted."""
FLUSH_S = 3.0
"""Seconds that a process that ends waits for its last lines to be written."""


def report(error: Exception) -> None:
    """Say on standard error, and in the log file if there is one by now, what ended the process."""
    print(f"error: {error}", file=sys.stderr)
    record = logging.LogRecord(__name__, logging.ERROR, __file__, 0, "%s", (error,), None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, Queued):
            handler.flush()
            for behind in handler.behind:
                if isinstance(behind, LogFile):
                    behind.handle(record)


def in_one_line(error: BaseException) -> str:
    """What an error of a foreign library says, as a log may repeat it: no line breaks, no passwords, no novel."""
    said = without_password(" ".join(str(error).split())) or type(error).__name__
    return said if len(said) <= 300 else f"{said[:120]} … {said[-180:]}"


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the fields of a request."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "request", {}),
        }
        if record.exc_text:
            line["exception"] = record.exc_text
        return json.dumps(line, ensure_ascii=False)


class Queued(QueueHandler):
    """Hands every record to a thread that formats and writes it: a slow disk or reader holds up nobody.

    `logging` itself flushes and closes it when the process ends.
    """

    def __init__(self, behind: Sequence[logging.Handler]) -> None:
        self._waiting: SimpleQueue[Any] = SimpleQueue()  # whose `put` a signal's handler may interrupt and call again
        super().__init__(self._waiting)
        self.behind = behind
        self._lost = 0
        self._writer = Writer(self._waiting, *behind)
        self._writer.start()

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """What can change or is large is turned into words now; the rest is left to the thread."""
        record = copy.copy(record)
        record.msg, record.args = record.getMessage(), None
        if record.exc_info:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
            record.exc_info = None
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        """Queue a record, unless the writer is so far behind that memory would fill up."""
        if self._waiting.qsize() >= LONGEST_QUEUE:
            self._lost += 1
            return
        if self._lost:
            record.msg += f" ({self._lost} lines before this one were lost: the log is not read fast enough)"
            self._lost = 0
        self._waiting.put(record)

    def flush(self) -> None:
        """Wait until what was logged before is written, but not for ever."""
        if self._writer.is_alive:
            written = threading.Event()
            self._waiting.put(written)
            written.wait(FLUSH_S)

    def close(self) -> None:
        """Write what waits and end the thread."""
        if self._writer.is_alive:
            self._writer.end()
            for handler in self.behind:
                with suppress(OSError):  # a disk that is full
                    handler.close()
        super().close()


class Writer(QueueListener):
    """The thread behind the queue, which also tells when it has come to a certain place in it."""

    _thread: threading.Thread | None

    @property
    def is_alive(self) -> bool:
        """Whether somebody takes what is queued."""
        return self._thread is not None and self._thread.is_alive()

    def handle(self, record: Any) -> None:
        """Write a record, or tell whoever waits for this place."""
        if isinstance(record, threading.Event):
            record.set()
        else:
            super().handle(record)

    def end(self) -> None:
        """Stop after what is queued; a writer that is stuck is left behind."""
        self.enqueue_sentinel()
        if self._thread is not None:
            self._thread.join(FLUSH_S)
            self._thread = None


class LogFile(RotatingFileHandler):
    """The file. That it cannot be written is said once, not for every line; nothing else suffers from it."""

    _failed = _fails = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line if the disk takes it."""
        self._fails = False
        super().emit(record)
        self._failed = self._fails

    def handleError(self, record: logging.LogRecord) -> None:
        """Say what is wrong on standard error, unless it was so already."""
        self._fails = True
        if not self._failed:
            error = sys.exc_info()[1]
            with suppress(OSError):
                print(f"error: {self.baseFilename} cannot be written: {error}", file=sys.stderr, flush=True)


def start(folder: Path, *, speaks: bool = True, json_lines: bool = False) -> None:
    """Send the log to standard output and to `folder/tuneserve.log` (kept to five files of 10 MB).

    A process that does not speak, one of several that do the same, only prints warnings.

    Raises:
        SettingsError: the folder cannot be written to.
    """
    if not speaks:
        logging.basicConfig(level=logging.WARNING, format=FORMAT, force=True)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = LogFile(folder / "tuneserve.log", maxBytes=10_000_000, backupCount=4, encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"LOG_PATH={folder} cannot be written to: {error}") from error
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout), file]
    for handler in handlers:
        handler.setFormatter(JsonLines() if json_lines else logging.Formatter(FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[Queued(handlers)], force=True)
    for noisy in ("httpx", "datasets", "fsspec", "filelock", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
