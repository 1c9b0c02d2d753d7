"""Feedback: the right labels of answers, kept durably beside the models in `MODEL_PATH/feedback.sqlite`.

Answers are stored by the id of their request, so that a label can refer to one; their texts only with KEEP_TEXTS. A
text that is sent with its label is always kept. Rows are never updated: of two labels for one text the newer counts.
SQLite's write-ahead log lets many processes of one machine write and read at once.
"""

import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from tuneserve.errors import NotFoundError, UnavailableError
from tuneserve.lifecycle.statistics import wilson

logger = logging.getLogger(__name__)

FILE = "feedback.sqlite"
SCHEMA_VERSION = 1
"""Of the file. Its column `place` is the index of a text in its request."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    request TEXT NOT NULL, place INTEGER NOT NULL, at REAL NOT NULL, version TEXT NOT NULL,
    label TEXT NOT NULL, score REAL NOT NULL, text TEXT, PRIMARY KEY (request, place)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS answers_by_time ON answers (at);
CREATE TABLE IF NOT EXISTS labels (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, request TEXT, place INTEGER, text TEXT,
    label TEXT NOT NULL, predicted TEXT, version TEXT
);
CREATE INDEX IF NOT EXISTS labels_by_request ON labels (request, place);
CREATE INDEX IF NOT EXISTS labels_by_text ON labels (text);
CREATE INDEX IF NOT EXISTS labels_by_version ON labels (version, id);
"""

WRITE_EVERY_S = 0.5
"""Seconds between two writings of answers; labels are written at once."""
MAX_PENDING = 50_000
"""Answers that may wait to be written; on a slower disk some are dropped and counted."""
PRUNE_EVERY = 10_000
"""Answers between two removals of surplus rows."""
WAIT_S = 5.0
"""Seconds that a writer waits for another one."""
ROWS_AT_ONCE = 500
"""Answers in one statement: for each statement the writer waits for the interpreter lock, which the server holds."""
ACCURACY_LABELS = 500
"""Number of the newest labels over which the rolling accuracy is computed."""


class Answer(NamedTuple):
    """One answered text; `text_index` counts the texts of its request from 0."""

    request: str
    text_index: int
    at: float
    version: str
    label: str
    score: float
    text: str | None


@dataclass(frozen=True)
class Accuracy:
    """The accuracy of a version over its newest labelled answers, with its 95% interval."""

    version: str
    count: int
    right: int
    accuracy: float
    low: float
    high: float


class Feedback:
    """The database of a store.

    Args:
        path: of the file.
        max_rows: answers, and labels, that are kept; the oldest are deleted.
        keep_texts: whether the texts of answers are kept.
    """

    def __init__(self, path: Path, *, max_rows: int, keep_texts: bool) -> None:
        self.dropped = 0
        self._path, self._max_rows, self._keep_texts = path, max_rows, keep_texts
        self._pending: deque[Answer] = deque()
        self._writing: list[Answer] = []
        self._unpruned = 0
        self._complained = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write_on, name="feedback", daemon=True)

    def start(self) -> None:
        """Start the thread that writes answers."""
        self._thread.start()

    def close(self) -> None:
        """Write the pending answers and end the thread."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        else:
            self._write()

    def remember(self, request: str, text_index: int, version: str, label: str, score: float, text: str) -> None:
        """Queue an answer to be written; does not block."""
        if len(self._pending) >= MAX_PENDING:
            self.dropped += 1
            return
        self._pending.append(
            Answer(request, text_index, time.time(), version, label, score, text if self._keep_texts else None)
        )

    def label_answer(self, request: str, text_index: int, label: str) -> bool:
        """Store the right label of an answer; False if the newest label of it is the same.

        Raises:
            NotFoundError: no such answer is remembered.
            UnavailableError: the database cannot be written.
        """
        with self._open() as database:
            answer = self._find(database, request, text_index)
            if answer is None:
                raise NotFoundError(f"No answer of request {request!r} (text {text_index}) is remembered.")
            values = (request, text_index, answer.text, label, answer.label, answer.version)
            return self._insert(database, values, "request = ? AND place = ?", (request, text_index))

    def label_text(self, text: str, label: str) -> bool:
        """Store a text with its label; False if the newest label of it is the same.

        Raises:
            UnavailableError: the database cannot be written.
        """
        with self._open() as database:
            return self._insert(database, (None, None, text, label, None, None), "text = ?", (text,))

    def accuracy(self, version: str) -> Accuracy | None:
        """The rolling accuracy of a version; None while none of its answers is labelled."""
        query = "SELECT request, place, label = predicted FROM labels WHERE version = ? ORDER BY id DESC"
        newest: dict[tuple[str, int], int] = {}
        with self._open() as database:
            for request, text_index, right in database.execute(query, (version,)):
                newest.setdefault((request, text_index), right)
                if len(newest) == ACCURACY_LABELS:
                    break
        if not newest:
            return None
        count, right = len(newest), sum(newest.values())
        low, high = wilson(right, count)
        return Accuracy(version, count, right, right / count, low, high)

    def counts(self) -> dict[str, int]:
        """The number of labels, and of texts with a label to train on."""
        with self._open() as database:
            labels, texts = database.execute("SELECT count(*), count(DISTINCT text) FROM labels").fetchone()
        return {"labels": labels, "labelled_texts": texts}

    def _find(self, database: sqlite3.Connection, request: str, text_index: int) -> Answer | None:
        # Newest first: a client may reuse an id. An answer is in the next of the three before it leaves the one before.
        for answer in chain(reversed(list(self._pending)), reversed(self._writing)):
            if (answer.request, answer.text_index) == (request, text_index):
                return answer
        row = database.execute(
            "SELECT * FROM answers WHERE request = ? AND place = ?", (request, text_index)
        ).fetchone()
        return Answer(*row) if row else None

    def _insert(
        self, database: sqlite3.Connection, values: tuple[object, ...], same: str, key: tuple[object, ...]
    ) -> bool:
        database.execute("BEGIN IMMEDIATE")
        newest = database.execute(f"SELECT label FROM labels WHERE {same} ORDER BY id DESC LIMIT 1", key).fetchone()
        if newest is not None and newest[0] == values[3]:
            database.execute("ROLLBACK")
            return False
        columns = "at, request, place, text, label, predicted, version"
        database.execute(f"INSERT INTO labels ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", (time.time(), *values))
        database.execute("DELETE FROM labels WHERE id <= (SELECT max(id) FROM labels) - ?", (self._max_rows,))
        database.execute("COMMIT")
        return True

    def _write_on(self) -> None:
        while not self._ended.wait(WRITE_EVERY_S):
            self._write()
        self._write()

    def _write(self) -> None:
        if not self._pending:
            return
        self._writing = list(self._pending)  # before they leave the queue, so that a label always finds its answer
        for _ in self._writing:
            self._pending.popleft()
        try:
            with self._open() as database:
                database.execute("BEGIN IMMEDIATE")
                for begin in range(0, len(self._writing), ROWS_AT_ONCE):
                    rows = self._writing[begin : begin + ROWS_AT_ONCE]
                    values = ", ".join(["(?, ?, ?, ?, ?, ?, ?)"] * len(rows))
                    database.execute(f"INSERT OR REPLACE INTO answers VALUES {values}", [*chain.from_iterable(rows)])
                self._forget_surplus(database)
                database.execute("COMMIT")
            self._complained = False
        except UnavailableError as error:
            self.dropped += len(self._writing)
            if not self._complained:
                self._complained = True
                logger.warning("answers are not stored for feedback: %s", error)
        self._writing = []

    def _forget_surplus(self, database: sqlite3.Connection) -> None:
        """Not at every write, since it counts all rows."""
        self._unpruned += len(self._writing)
        if self._unpruned < min(PRUNE_EVERY, self._max_rows):
            return
        self._unpruned = 0
        surplus = max(0, database.execute("SELECT count(*) FROM answers").fetchone()[0] - self._max_rows)
        oldest = "SELECT request, place FROM answers ORDER BY at LIMIT ?"
        database.execute(f"DELETE FROM answers WHERE (request, place) IN ({oldest})", (surplus,))

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with open_database(self._path) as database:
            yield database


@contextmanager
def open_database(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection whose commits are on disk when they return.

    Raises:
        UnavailableError: the file cannot be opened, read or written.
    """
    try:
        with closing(sqlite3.connect(path, timeout=WAIT_S, isolation_level=None)) as database:
            database.execute("PRAGMA synchronous = FULL")
            known = database.execute("PRAGMA user_version").fetchone()[0]
            if known > SCHEMA_VERSION:
                raise UnavailableError(f"{path} was written by a newer release.")
            if known < SCHEMA_VERSION:
                _prepare(database)
            yield database
    except sqlite3.Error as error:
        raise UnavailableError(f"{path} cannot be used: {error}") from error


def _prepare(database: sqlite3.Connection) -> None:
    """Create the tables; another process may be doing the same."""
    ends = time.monotonic() + WAIT_S
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL")  # ignores the timeout when another process holds the lock
            break
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > ends:
                raise
            time.sleep(0.01)
    database.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")


def labelled_texts(path: Path, complain: Callable[[str], None]) -> list[tuple[str, str]]:
    """Texts and their newest labels, oldest text first; nothing if there is no database, or it cannot be read."""
    if not path.exists():
        return []
    newest = "SELECT max(id) FROM labels WHERE text IS NOT NULL GROUP BY text"
    try:
        with open_database(path) as database:
            return database.execute(f"SELECT text, label FROM labels WHERE id IN ({newest}) ORDER BY id").fetchall()
    except UnavailableError as error:
        complain(str(error))
        return []
