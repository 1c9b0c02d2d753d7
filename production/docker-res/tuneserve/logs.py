"""One log: plain lines on standard output, repeated in a file, both written by a thread of their own."""

import copy
import json
import logging
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from logging.handlers import QueueHandler, RotatingFileHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tuneserve.errors import SettingsError
from tuneserve.redaction import redact

FORMAT = "%(asctime)s %(levelname)s %(message)s"

LONGEST_QUEUE = 10_000
"""Lines that may wait to be written; if standard output is not read any more, later ones are dropped and counted."""
FLUSH_S = 3.0
"""Seconds that a process waits at its end for its last lines to be written."""


def report(error: Exception) -> None:
    """Write the error that ends the process to standard error, and to the log file if there is one yet."""
    print(f"error: {error}", file=sys.stderr)
    record = logging.LogRecord(__name__, logging.ERROR, __file__, 0, "%s", (error,), None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, Queued):
            handler.flush()
            for behind in handler.behind:
                if isinstance(behind, LogFile):
                    behind.handle(record)


def in_one_line(error: BaseException) -> str:
    """The message of a library's error for the log: in one line, without secrets, shortened."""
    said = redact(" ".join(str(error).split())) or type(error).__name__
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


def hide_secrets(record: logging.LogRecord) -> None:
    """Format a record, and its traceback, without secrets."""
    record.msg, record.args = redact(record.getMessage()), None
    if record.exc_info:
        record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        record.exc_info = None


def let_pass(record: logging.LogRecord) -> bool:
    """The filter of a handler that is not ours: all records, without secrets and with the traceback in the message."""
    hide_secrets(record)
    if record.exc_text:
        record.msg, record.exc_text = f"{record.msg}\n{record.exc_text}", None
    return True


class Queued(QueueHandler):
    """Hands every record to a thread that formats and writes it, so that a slow disk or reader blocks no caller.

    `logging` flushes and closes it when the process ends.
    """

    def __init__(self, behind: Sequence[logging.Handler]) -> None:
        self._waiting: SimpleQueue[Any] = SimpleQueue()  # its `put` is reentrant, for a signal's handler
        super().__init__(self._waiting)
        self.behind = behind
        self._lost, self._open = 0, True
        self._writer = Writer(self._waiting, behind)
        self._writer.start()

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Format now what may change or is large, without secrets; leave the rest to the thread."""
        record = copy.copy(record)
        hide_secrets(record)
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        """Queue a record, unless LONGEST_QUEUE records wait."""
        if self._waiting.qsize() >= LONGEST_QUEUE:
            self._lost += 1
            return
        if self._lost:
            record.msg += f" ({self._lost} lines before this one were lost: the log is not read fast enough)"
            self._lost = 0
        self._waiting.put(record)

    def flush(self) -> None:
        """Wait until all earlier records are written, for FLUSH_S at most."""
        if self._open and self._writer.is_alive():
            written = threading.Event()
            self._waiting.put(written)
            written.wait(FLUSH_S)

    def close(self) -> None:
        """Write the queued records and end the thread; one that is stuck is abandoned after FLUSH_S."""
        if self._open and self._writer.is_alive():
            self._waiting.put(None)
            self._writer.join(FLUSH_S)
            self._open = False
            for handler in self.behind:
                with suppress(OSError):  # a disk that is full
                    handler.close()
        super().close()


class Writer(threading.Thread):
    """Writes the queued records until None; an event in the queue is set when all records before it are written."""

    def __init__(self, waiting: SimpleQueue[Any], handlers: Sequence[logging.Handler]) -> None:
        super().__init__(name="log", daemon=True)
        self._waiting, self._handlers = waiting, handlers

    def run(self) -> None:
        """Write, until the end of the queue."""
        while (item := self._waiting.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            for handler in self._handlers:
                handler.handle(item)


class LogFile(RotatingFileHandler):
    """The log file. A failure to write is reported once, not for every line, and affects nothing else."""

    _failed = _fails = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, if the disk allows it."""
        self._fails = False
        super().emit(record)
        self._failed = self._fails

    def handleError(self, record: logging.LogRecord) -> None:
        """Report the failure on standard error, unless the line before failed too."""
        self._fails = True
        if not self._failed:
            error = sys.exc_info()[1]
            with suppress(OSError):
                print(f"error: {self.baseFilename} cannot be written: {error}", file=sys.stderr, flush=True)


@contextmanager
def unchanged() -> Iterator[None]:
    """Undo what libraries do in the block to the root logger (OpenVINO's converter silences it) and to warnings."""
    root = logging.getLogger()
    level, handlers, filters, disabled = root.level, root.handlers[:], root.filters[:], root.manager.disable
    with warnings.catch_warnings():
        try:
            yield
        finally:
            root.setLevel(level)
            root.handlers[:], root.filters[:], root.manager.disable = handlers, filters, disabled


def start(folder: Path, *, speaks: bool = True, json_lines: bool = False) -> None:
    """Send the log to standard output and to `folder/tuneserve.log` (kept to five files of 10 MB).

    With `speaks` false, in all but one of several processes of a training, only warnings are printed.

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
