"""One log: plain lines on standard output, repeated in a file."""

import json
import logging
import sys
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path

from tuneserve.errors import SettingsError
from tuneserve.settings import without_password

FORMAT = "%(asctime)s %(levelname)s %(message)s"


def report(error: Exception) -> None:
    """Say on standard error, and in the log file if there is one by now, what ended the process."""
    print(f"error: {error}", file=sys.stderr)
    record = logging.LogRecord(__name__, logging.ERROR, __file__, 0, "%s", (error,), None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, RotatingFileHandler):
            handler.handle(record)


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
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


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
        file = RotatingFileHandler(folder / "tuneserve.log", maxBytes=10_000_000, backupCount=4, encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"LOG_PATH={folder} cannot be written to: {error}") from error
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout), file]
    for handler in handlers:
        handler.setFormatter(JsonLines() if json_lines else logging.Formatter(FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)
    for noisy in ("httpx", "datasets", "fsspec", "filelock", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
