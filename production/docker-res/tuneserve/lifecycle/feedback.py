"""Feedback: the right labels of answers, kept durably beside the models in `MODEL_PATH/feedback.sqlite`.

Answers are stored by the id of their request, so that a label can refer to one; their texts only with KEEP_TEXTS. A
text that is sent with its label is always kept. Rows are never updated: of two labels for one text the newer counts.
SQLite's write-ahead log lets many processes of one machine write and read at once.
"""

import asyncio
import logging
import sqlite3
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from tuneserve.errors import ConflictError, NotFoundError, StoreError, UnavailableError
from tuneserve.lifecycle.feedback_database import (
    ORIGINS,
    TRUSTED,
    TRUSTED_SQL,
    WAIT_S,
    bound,
    give_back,
    kept_apart,
    open_database,
)
from tuneserve.lifecycle.secret import pseudonym, read_secret
from tuneserve.lifecycle.statistics import CONFIDENCE, sequential_p_value, wilson

logger = logging.getLogger(__name__)

WRITE_EVERY_S = 0.5
"""Seconds between two writings of answers; labels are written at once."""
MAX_PENDING = 50_000
"""Answers that may wait to be written; on a slower disk some are dropped and counted."""
MAX_PENDING_CHARACTERS = 32 << 20
"""Characters of their texts that may wait."""
MAX_WAITING = 64
"""Labels that may wait to be written, for another process may hold the file; more are refused at once."""
READ_WAIT_S = 1.0
"""Seconds that a reader waits; while another process writes it need not wait at all."""
ROWS_AT_ONCE = 500
"""Answers in one statement: for each statement the writer waits for the interpreter lock, which the server holds."""
ACCURACY_LABELS = 500
"""Number of the newest labels over which the rolling accuracy is computed."""
CORRECTIONS = 4
"""Labels that are read for each of these: an answer may have several, and the newest counts."""


class Answer(NamedTuple):
    """One answered text; `text_index` counts the texts of its request from 0."""

    request: str
    text_index: int
    at: float
    version: str
    label: str
    score: float
    text: str | None

    def says_the_same_as(self, other: "Answer") -> bool:
        """Whether a label for the one is a label for the other too: a client that asked again, say."""
        return (self.version, self.label, self.text) == (other.version, other.label, other.text)


class Unlabelled(NamedTuple):
    """A text that was answered, with the label it was given and that label's probability."""

    text: str
    label: str
    score: float


@dataclass(frozen=True)
class Accuracy:
    """The accuracy of a version over its newest labelled answers, with its 95% interval."""

    version: str
    count: int
    right: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Kept:
    """Whether a version keeps its promise of few wrong answers, by its newest labelled ones that did not abstain.

    It is not where the p-value of these labels is below 0.05; where nothing is labelled nobody knows.
    """

    version: str
    max_error: float
    count: int
    wrong: int
    error: float | None
    p_value: float | None
    """See `sequential_p_value`."""
    kept: bool | None


class Feedback:
    """The database of a store.

    Args:
        path: of the file.
        max_rows: answers, and labels of each origin, that are kept; the oldest are deleted.
        max_bytes: of the file.
        max_characters: of a text that is kept; the rest of it no model reads.
        keep_texts: whether the texts of answers are kept.
        keyed: whether labels come with the API key, so that they count; without one all are anonymous.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_rows: int,
        keep_texts: bool,
        max_bytes: int = 1 << 30,
        max_characters: int = 1 << 20,
        keyed: bool = False,
    ) -> None:
        self.dropped = 0
        self.keeps_texts = keep_texts
        self.keyed = keyed
        self._path, self._max_rows, self._max_bytes = path, max_rows, max_bytes
        self._keep_texts, self._max_characters = keep_texts, max_characters
        self._origin = "key" if keyed else "anonymous"
        self._pending: deque[Answer] = deque()
        self._queued_characters = self._taken_characters = 0  # each changed by one thread alone
        self._writing: list[Answer] = []
        self._complained = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write_on, name="feedback", daemon=True)
        self._labels = ThreadPoolExecutor(1, "feedback-labels")
        self._waiting = 0

    def start(self) -> None:
        """Start the thread that writes answers."""
        self._thread.start()

    def close(self) -> None:
        """Write the pending answers and end the threads."""
        self._labels.shutdown()
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        else:
            self._write()

    def remember(self, request: str, text_index: int, version: str, label: str, score: float, text: str) -> None:
        """Queue an answer to be written; does not block."""
        kept = text[: self._max_characters] if self._keep_texts else None
        characters = len(kept or "")
        waiting = self._queued_characters - self._taken_characters
        if len(self._pending) >= MAX_PENDING or waiting + characters > MAX_PENDING_CHARACTERS:
            self.dropped += 1
            return
        self._queued_characters += characters
        self._pending.append(Answer(request, text_index, time.time(), version, label, score, kept))

    async def keep(
        self, label: str, *, text: str | None = None, request: str = "", index: int = 0, client: str = ""
    ) -> bool:
        """`label_text` or `label_answer` on a thread of its own: who waits for the disk holds up nobody else.

        Raises:
            NotFoundError: no such answer is remembered.
            ConflictError: several answers have this id.
            UnavailableError: the database cannot be written within WAIT_S, or too many labels wait for it already.
        """
        if self._waiting >= MAX_WAITING:
            raise UnavailableError(f"{self._path} is busy, and {self._waiting} labels wait for it already.")
        ends = time.monotonic() + WAIT_S

        def write() -> bool:
            wait_s = max(0.0, ends - time.monotonic())
            if text is not None:
                return self.label_text(text, label, client=client, wait_s=wait_s)
            return self.label_answer(request, index, label, client=client, wait_s=wait_s)

        self._waiting += 1
        work = self._labels.submit(write)
        work.add_done_callback(lambda _: self._one_less())
        return await asyncio.wrap_future(work)

    def label_answer(
        self, request: str, text_index: int, label: str, *, client: str = "", wait_s: float = WAIT_S
    ) -> bool:
        """Store the right label of an answer; False if the newest label of it is the same.

        Raises:
            NotFoundError: no such answer is remembered.
            ConflictError: several answers have this id.
            UnavailableError: the database cannot be written.
        """
        with open_database(self._path, wait_s=wait_s) as database:
            answer = self._find(database, request, text_index)
            if answer is None:
                raise NotFoundError(f"No answer of request {request!r} (text {text_index}) is remembered.")
            values = (request, text_index, answer.text, label, answer.label, answer.version)
            return self._insert(database, values, client, "request = ? AND place = ?", (request, text_index))

    def label_text(self, text: str, label: str, *, client: str = "", wait_s: float = WAIT_S) -> bool:
        """Store a text with its label; False if the newest label of it is the same.

        Raises:
            UnavailableError: the database cannot be written.
        """
        text = text[: self._max_characters]
        with open_database(self._path, wait_s=wait_s) as database:
            return self._insert(database, (None, None, text, label, None, None), client, "text = ?", (text,))

    def accuracy(self, version: str) -> Accuracy | None:
        """The rolling accuracy of a version; None while none of its answers is labelled.

        Where there is a key, labels without one do not count.
        """
        with open_database(self._path, wait_s=READ_WAIT_S) as database:
            newest = self._newest(database, version)
        if not newest:
            return None
        count, right = len(newest), sum(newest.values())
        low, high = wilson(right, count)
        return Accuracy(version, count, right, right / count, low, high)

    def kept(self, version: str, *, threshold: float, max_error: float) -> Kept:
        """Whether at most `max_error` of its labelled answers of at least this confidence are wrong.

        The labels are those of `accuracy`; one whose answer is not stored any more does not count.
        """
        # An answer is in the next of the three before it leaves the one before.
        waiting = {one[:2]: one.score for one in chain(list(self._pending), self._writing) if one.version == version}
        query = "SELECT score FROM answers WHERE request = ? AND place = ? AND version = ?"
        answered = []
        with open_database(self._path, wait_s=READ_WAIT_S) as database:
            for key, right in self._newest(database, version).items():
                row = database.execute(query, (*key, version)).fetchone()
                score = row[0] if row else waiting.get(key)
                if score is not None and score >= threshold:
                    answered.append(right)
        count, wrong = len(answered), answered.count(False)
        if not count:
            return Kept(version, max_error, 0, 0, None, None, None)
        p_value = sequential_p_value(wrong, count, max_error)
        return Kept(version, max_error, count, wrong, wrong / count, p_value, p_value >= 1 - CONFIDENCE)

    def _newest(self, database: sqlite3.Connection, version: str) -> dict[tuple[str, int], bool]:
        """Its newest labelled answers, by request and index, and whether each was right."""
        one = "SELECT * FROM (SELECT id, request, place, label = predicted FROM labels "
        one += "WHERE version = ? AND origin = ? ORDER BY id DESC LIMIT ?)"
        origins = TRUSTED if self.keyed else ORIGINS
        query = " UNION ALL ".join([one] * len(origins)) + " ORDER BY 1 DESC"
        values = [value for origin in origins for value in (version, origin, CORRECTIONS * ACCURACY_LABELS)]
        newest: dict[tuple[str, int], bool] = {}
        for _, request, text_index, right in database.execute(query, values):
            newest.setdefault((request, text_index), bool(right))
            if len(newest) == ACCURACY_LABELS:
                break
        return newest

    def unlabelled(self, most: int) -> list[Unlabelled]:
        """The newest different texts that were answered and have no label that counts; none without KEEP_TEXTS.

        Raises:
            UnavailableError: they cannot be read.
        """
        # Of a group SQLite takes the other columns from the row with its newest time.
        query = (
            "SELECT text, label, score, max(at) FROM answers WHERE text IS NOT NULL AND NOT EXISTS "
            f"(SELECT 1 FROM labels WHERE labels.text = answers.text AND origin IN {TRUSTED_SQL}) "
            "GROUP BY text ORDER BY max(at) DESC LIMIT ?"
        )
        with open_database(self._path, wait_s=READ_WAIT_S) as database:
            return [Unlabelled(*row[:3]) for row in database.execute(query, [most])]

    def counts(self) -> dict[str, int]:
        """The number of labels, of texts with a label to train on, and of labels that are kept apart."""
        with open_database(self._path, wait_s=READ_WAIT_S) as database:
            rows = dict(database.execute("SELECT kind, rows FROM totals"))
            apart = kept_apart(database)
        labels = sum(rows[origin] for origin in ORIGINS)
        return {"labels": labels, "labelled_texts": rows["texts"], "kept_apart": apart}

    def _one_less(self) -> None:
        self._waiting -= 1

    def _find(self, database: sqlite3.Connection, request: str, text_index: int) -> Answer | None:
        """The answer of this id, which clients may choose: of two that differ nobody can say which one is meant.

        Raises:
            ConflictError: there are two.
        """
        # An answer is in the next of the three before it leaves the one before.
        waiting = chain(list(self._pending), self._writing)
        found = [one for one in waiting if (one.request, one.text_index) == (request, text_index)]
        row = database.execute(
            "SELECT * FROM answers WHERE request = ? AND place = ?", (request, text_index)
        ).fetchone()
        if row:
            found.append(Answer(*row[:-1]))
        if (row and row[-1]) or not all(one.says_the_same_as(found[0]) for one in found):
            raise ConflictError(
                f"Several answers have the X-Request-Id {request!r} (text {text_index}); send the text with its label."
            )
        return found[0] if found else None

    def _insert(
        self,
        database: sqlite3.Connection,
        values: tuple[object, ...],
        client: str,
        same: str,
        key: tuple[object, ...],
    ) -> bool:
        database.execute("BEGIN IMMEDIATE")
        newest = database.execute(
            f"SELECT label FROM labels WHERE {same} AND origin = ? ORDER BY id DESC LIMIT 1", (*key, self._origin)
        ).fetchone()
        if newest is not None and newest[0] == values[3]:
            database.execute("ROLLBACK")
            return False
        columns = "at, request, place, text, label, predicted, version, origin, client"
        database.execute(
            f"INSERT INTO labels ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (time.time(), *values, self._origin, self._pseudonym(client)),
        )
        self._bound(database)
        return True

    def _bound(self, database: sqlite3.Connection) -> None:
        """End a transaction within the bounds."""
        bound(database, max_rows=self._max_rows, max_bytes=self._max_bytes)
        database.execute("COMMIT")
        give_back(database, max_bytes=self._max_bytes)

    def _pseudonym(self, client: str) -> str | None:
        if not client:
            return None
        try:
            secret = read_secret(self._path.parent)
        except StoreError as error:
            self._complain(f"labels are kept without a mark of their client: {error}")
            return None
        return pseudonym(secret, client, datetime.now(UTC).date().isoformat())

    def _write_on(self) -> None:
        while not self._ended.wait(WRITE_EVERY_S):
            self._write()
        self._write()

    def _write(self) -> None:
        if not self._pending:
            return
        self._writing = list(self._pending)  # before they leave the queue, so that a label always finds its answer
        for one in self._writing:
            self._pending.popleft()
            self._taken_characters += len(one.text or "")
        try:
            with open_database(self._path) as database:
                database.execute("BEGIN IMMEDIATE")
                for begin in range(0, len(self._writing), ROWS_AT_ONCE):
                    rows = self._writing[begin : begin + ROWS_AT_ONCE]
                    values = ", ".join(["(?, ?, ?, ?, ?, ?, ?, 0)"] * len(rows))
                    database.execute(INSERT.format(values=values), [*chain.from_iterable(rows)])
                self._bound(database)
            self._complained = False
        except Exception as error:  # whatever it is, the thread goes on: the next answers may be written
            self.dropped += len(self._writing)
            self._complain(f"answers are not stored for feedback: {error}")
        self._writing = []

    def _complain(self, words: str) -> None:
        if not self._complained:
            self._complained = True
            logger.warning("%s", words)


INSERT = """
INSERT INTO answers VALUES {values} ON CONFLICT (request, place) DO UPDATE SET ambiguous = 1
WHERE excluded.version != version OR excluded.label != label OR excluded.text IS NOT text
"""
"""The first answer of an id stays; another one under the same id only marks that it names neither."""
