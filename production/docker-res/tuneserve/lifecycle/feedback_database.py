"""The file of feedback: its tables, how an older one is brought up to date, and what its owner does with the labels.

    answers   what was answered, by request and index; texts only with KEEP_TEXTS
    labels    what people said of it; rows are added and removed, never changed
    totals    rows and bytes of each kind, kept by triggers, so that nobody has to count

`origin` says whose word a label is: `key` (it came with the API key), `reviewed` (the owner vouched for it),
`anonymous` (there was no key), `unknown` (it is older than this column). Only the first two are trained on and tested
with. `client` is a pseudonym of the sender's address that changes every day; the address itself is not kept.
"""

import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tuneserve.errors import NotFoundError, UnavailableError

FILE = "feedback.sqlite"
SCHEMA_VERSION = 2
"""Of the file. The column `place` is the index of a text in its request."""

TRUSTED = ("key", "reviewed")
ORIGINS = (*TRUSTED, "anonymous", "unknown")

WAIT_S = 5.0
"""Seconds that a writer waits for another one."""
HELD = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
"""Errors, without what SQLite adds to their numbers, that go away when another process or connection is done."""
JOURNAL_BYTES = 4 << 20
"""Size to which the write-ahead log is cut when it has been copied into the file."""
ROW_BYTES = 100
"""What a row takes beside its text, about: enough to know which kind of rows fills the file."""

TABLES = """
CREATE TABLE IF NOT EXISTS answers (
    request TEXT NOT NULL, place INTEGER NOT NULL, at REAL NOT NULL, version TEXT NOT NULL,
    label TEXT NOT NULL, score REAL NOT NULL, text TEXT, PRIMARY KEY (request, place)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS labels (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, request TEXT, place INTEGER, text TEXT,
    label TEXT NOT NULL, predicted TEXT, version TEXT
);
CREATE INDEX IF NOT EXISTS answers_by_time ON answers (at);
CREATE INDEX IF NOT EXISTS labels_by_request ON labels (request, place);
CREATE INDEX IF NOT EXISTS labels_by_text ON labels (text);
"""
"""As in version 1."""

TRUSTED_SQL = "('key', 'reviewed')"
BYTES = f"{ROW_BYTES} + coalesce(length(CAST({{row}}.text AS BLOB)), 0)"
OTHER_ROW_OF_TEXT = f"SELECT 1 FROM labels WHERE text = {{row}}.text AND origin IN {TRUSTED_SQL} AND id != {{row}}.id"


def _count(event: str, row: str, sign: str, table: str, kind: str, more: str = "") -> str:
    return (
        f"CREATE TRIGGER {table}_{event} AFTER {event} ON {table} BEGIN "
        f"UPDATE totals SET rows = rows {sign} 1, bytes = bytes {sign} ({BYTES.format(row=row)}) WHERE kind = {kind}; "
        f"{more} END;"
    )


def _count_text(row: str, sign: str) -> str:
    return (
        f"UPDATE totals SET rows = rows {sign} 1 WHERE kind = 'texts' AND {row}.text IS NOT NULL "
        f"AND {row}.origin IN {TRUSTED_SQL} AND NOT EXISTS ({OTHER_ROW_OF_TEXT.format(row=row)});"
    )


SECOND_VERSION = f"""
ALTER TABLE answers ADD COLUMN ambiguous INTEGER NOT NULL DEFAULT 0;
ALTER TABLE labels ADD COLUMN origin TEXT NOT NULL DEFAULT 'unknown';
ALTER TABLE labels ADD COLUMN client TEXT;
DROP INDEX IF EXISTS labels_by_version;
CREATE INDEX labels_by_version ON labels (version, origin, id);
CREATE INDEX labels_by_origin ON labels (origin, id);
CREATE TABLE totals (kind TEXT PRIMARY KEY, rows INTEGER NOT NULL, bytes INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO totals VALUES {", ".join(f"('{kind}', 0, 0)" for kind in ("answers", "texts", *ORIGINS))};
UPDATE totals SET rows = (SELECT count(*) FROM answers),
    bytes = (SELECT coalesce(sum({BYTES.format(row="answers")}), 0) FROM answers) WHERE kind = 'answers';
UPDATE totals SET rows = (SELECT count(*) FROM labels),
    bytes = (SELECT coalesce(sum({BYTES.format(row="labels")}), 0) FROM labels) WHERE kind = 'unknown';
{_count("INSERT", "NEW", "+", "answers", "'answers'")}
{_count("DELETE", "OLD", "-", "answers", "'answers'")}
{_count("INSERT", "NEW", "+", "labels", "NEW.origin", _count_text("NEW", "+"))}
{_count("DELETE", "OLD", "-", "labels", "OLD.origin", _count_text("OLD", "-"))}
"""


@contextmanager
def open_database(path: Path, *, wait_s: float = WAIT_S) -> Iterator[sqlite3.Connection]:
    """A connection whose commits are on disk when they return, and which waits so long for another writer.

    Raises:
        UnavailableError: the file cannot be opened, read or written.
    """
    try:
        with closing(sqlite3.connect(path, timeout=wait_s, isolation_level=None)) as database:
            database.execute("PRAGMA synchronous = FULL")
            database.execute(f"PRAGMA journal_size_limit = {JOURNAL_BYTES}")
            known = database.execute("PRAGMA user_version").fetchone()[0]
            if known > SCHEMA_VERSION:
                raise UnavailableError(f"{path} was written by a newer release.")
            if known < SCHEMA_VERSION:
                _prepare(database, wait_s)
            yield database
    except sqlite3.Error as error:
        raise UnavailableError(f"{path} cannot be used: {error}") from error


def _prepare(database: sqlite3.Connection, wait_s: float) -> None:
    """Create the tables, or bring those of an older release up to date; another process may be doing the same."""
    ends = time.monotonic() + wait_s
    database.execute("PRAGMA auto_vacuum = INCREMENTAL")  # of a new file: what is removed can be given back
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL")  # ignores the timeout when another process holds the lock
            break
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in HELD or time.monotonic() > ends:
                raise
            time.sleep(0.01)
    database.execute("BEGIN IMMEDIATE")
    if database.execute("PRAGMA user_version").fetchone()[0] < SCHEMA_VERSION:
        for statement in _statements(TABLES + SECOND_VERSION):
            database.execute(statement)
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    database.execute("COMMIT")


def _statements(script: str) -> Iterator[str]:
    """The statements of a script, which `executescript` would not run within a transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def bound(database: sqlite3.Connection, *, max_rows: int, max_bytes: int) -> None:
    """Remove the oldest rows beyond so many of each kind, and beyond so many bytes of the file, in a transaction.

    For bytes, answers and anonymous labels go first, whichever take more, so that no stranger can push out labels that
    count.
    """
    rows = {kind: (count, size) for kind, count, size in database.execute("SELECT kind, rows, bytes FROM totals")}
    del rows["texts"]
    for kind, (count, _) in rows.items():
        if count > max_rows:
            _remove_oldest(database, kind, count - max_rows)
    while _used_bytes(database) > max_bytes:
        left = database.execute("SELECT kind, rows, bytes FROM totals WHERE rows > 0 AND kind != 'texts'").fetchall()
        if not left:
            return
        kind, count, _ = max(left, key=lambda row: (row[0] in ("answers", "anonymous"), row[2]))
        _remove_oldest(database, kind, max(1, count // 20))


def _remove_oldest(database: sqlite3.Connection, kind: str, count: int) -> None:
    if kind == "answers":
        oldest = "SELECT request, place FROM answers ORDER BY at LIMIT ?"
        database.execute(f"DELETE FROM answers WHERE (request, place) IN ({oldest})", (count,))
    else:
        oldest = "SELECT id FROM labels WHERE origin = ? ORDER BY id LIMIT ?"
        database.execute(f"DELETE FROM labels WHERE id IN ({oldest})", (kind, count))


def _used_bytes(database: sqlite3.Connection) -> int:
    pages, free, size = (_pragma(database, name) for name in ("page_count", "freelist_count", "page_size"))
    return (pages - free) * size


def give_back(database: sqlite3.Connection, *, max_bytes: int) -> None:
    """Cut the file to a size, as far as there are free pages; a file from before version 2 has no way to do that."""
    surplus = _pragma(database, "page_count") - max_bytes // _pragma(database, "page_size")
    if surplus > 0 and _pragma(database, "freelist_count"):
        database.executescript(f"PRAGMA incremental_vacuum({surplus})")  # `execute` would stop after its first page


def _pragma(database: sqlite3.Connection, name: str) -> int:
    return int(database.execute(f"PRAGMA {name}").fetchone()[0])


def labelled_texts(path: Path, complain: Callable[[str], None]) -> list[tuple[str, str]]:
    """Texts and their newest labels that may be learned from, oldest first; none if the file is not there or broken."""
    if not path.exists():
        return []
    newest = f"SELECT max(id) FROM labels WHERE text IS NOT NULL AND origin IN {TRUSTED_SQL} GROUP BY text"
    try:
        with open_database(path) as database:
            return database.execute(f"SELECT text, label FROM labels WHERE id IN ({newest}) ORDER BY id").fetchall()
    except UnavailableError as error:
        complain(str(error))
        return []


def kept_apart(database: sqlite3.Connection) -> int:
    """How many labels nobody vouches for."""
    query = "SELECT sum(rows) FROM totals WHERE kind IN ('anonymous', 'unknown')"
    return int(database.execute(query).fetchone()[0])


WHICH = "an id, a day (2026-03-02), an origin (anonymous) or one client of it (anonymous/3f2a91c4)"
DAY = "strftime('%Y-%m-%d', at, 'unixepoch')"


def counts_table(path: Path) -> str:
    """For people: how many labels came on which day from whom."""
    query = f"SELECT {DAY} AS day, origin, coalesce(client, ''), count(*) FROM labels GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
    found = _query(path, query)
    if not found:
        return f"There is no label in {path}."
    rows = [(day, _whose(origin, client), str(count), _use(origin)) for day, origin, client, count in found]
    return _table([("day", "origin", "labels", "use"), *rows])


def labels_table(path: Path, which: str) -> str:
    """For people: the labels that are meant, oldest first, with the beginnings of their texts."""
    where, values = _condition(which)
    query = f"SELECT id, {DAY}, origin, coalesce(client, ''), label, coalesce(predicted, ''), substr(text, 1, 60) "
    found = _query(path, f"{query} FROM labels {where} ORDER BY id", values)
    if not found:
        raise NotFoundError(f"No label in {path} is meant by {which!r}; name {WHICH}.")
    rows = [
        (str(number), day, _whose(origin, client), label, predicted, repr(text) if text is not None else "")
        for number, day, origin, client, label, predicted, text in found
    ]
    return _table([("id", "day", "origin", "label", "was predicted", "text"), *rows])


def remove(path: Path, which: str) -> int:
    """Remove the labels that are meant, and what is left of their texts in the file; how many there were.

    Raises:
        NotFoundError: there is none.
        UnavailableError: the file cannot be used.
    """
    where, values = _condition(which)
    with _existing(path) as database:
        database.execute("PRAGMA secure_delete = ON")
        count = database.execute(f"DELETE FROM labels {where}", values).rowcount
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return _some(count, path, which)


def trust(path: Path, which: str) -> int:
    """Let the labels that are meant be learned from, as the owner's word: they become new rows; how many there were.

    Raises:
        NotFoundError: there is none.
        UnavailableError: the file cannot be used.
    """
    where, values = _condition(which)
    columns = "at, request, place, text, label, predicted, version, client"
    with _existing(path) as database:
        database.execute("BEGIN IMMEDIATE")
        last = database.execute("SELECT coalesce(max(id), 0) FROM labels").fetchone()[0]
        copy = f"INSERT INTO labels ({columns}, origin) SELECT {columns}, 'reviewed' FROM labels"
        count = database.execute(f"{copy} {where} ORDER BY id", values).rowcount
        database.execute(f"DELETE FROM labels {where} AND id <= ?", (*values, last))
        database.execute("COMMIT")
    return _some(count, path, which)


def _condition(which: str) -> tuple[str, tuple[object, ...]]:
    """SQL for what people call an id, a day, an origin or a client; nothing is all.

    Raises:
        NotFoundError: it is none of these.
    """
    origin, _, client = which.partition("/")
    if not which:
        return "", ()
    if which.isascii() and which.isdigit() and len(which) < 19:
        return "WHERE id = ?", (int(which),)
    if re.fullmatch(r"\d{4}-\d\d-\d\d", which):
        return f"WHERE {DAY} = ?", (which,)
    if origin in ORIGINS:
        return ("WHERE origin = ? AND client = ?", (origin, client)) if client else ("WHERE origin = ?", (origin,))
    raise NotFoundError(f"{which!r} names no labels; name {WHICH}.")


@contextmanager
def _existing(path: Path) -> Iterator[sqlite3.Connection]:
    if not path.exists():
        raise NotFoundError(f"There is no feedback in {path}.")
    with open_database(path) as database:
        yield database


def _query(path: Path, query: str, values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
    if not path.exists():
        return []
    with open_database(path) as database:
        return database.execute(query, values).fetchall()


def _some(count: int, path: Path, which: str) -> int:
    if not count:
        raise NotFoundError(f"No label in {path} is meant by {which!r}; name {WHICH}.")
    return count


def _whose(origin: object, client: object) -> str:
    return f"{origin}/{client}" if client else str(origin)


def _use(origin: object) -> str:
    return "trained on, or tested with" if origin in TRUSTED else "kept apart"


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
