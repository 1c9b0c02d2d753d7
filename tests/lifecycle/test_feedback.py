"""Labels that survive whatever happens to the process, the disk or the file; real files, real processes."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lifecycle.conftest import ENVIRONMENT

from tuneserve.errors import ConflictError, NotFoundError, UnavailableError
from tuneserve.lifecycle import feedback as module
from tuneserve.lifecycle import feedback_database as database
from tuneserve.lifecycle.feedback import Feedback
from tuneserve.lifecycle.feedback_database import FILE, labelled_texts, open_database
from tuneserve.lifecycle.secret import pseudonym, read_secret
from tuneserve.lifecycle.statistics import wilson

CHILD = """
import sys, time
from pathlib import Path
from tuneserve.lifecycle.feedback import Feedback
name, count = sys.argv[2], int(sys.argv[3])
feedback = Feedback(Path(sys.argv[1]), max_rows=100_000, keep_texts=False)
feedback.start()
for number in range(count):
    feedback.remember(f"{name}-{number}", 0, "v1", "bad", 0.9, "text")
    feedback.label_answer(f"{name}-{number}", 0, "good")
    print(number, flush=True)
feedback.close() if count < 1000 else time.sleep(60)
"""


def open_feedback(folder: Path, **changed: Any) -> Feedback:
    return Feedback(folder / FILE, **{"max_rows": 1000, "keep_texts": False, "keyed": True} | changed)


def remember(feedback: Feedback, request: str, label: str = "bad", *, index: int = 0, version: str = "v1") -> None:
    feedback.remember(request, index, version, label, 0.9, f"text of {request}")


def rows(folder: Path, query: str) -> list[Any]:
    with open_database(folder / FILE) as database:
        return database.execute(query).fetchall()


def child(folder: Path, name: str, count: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", CHILD, str(folder / FILE), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)


def test_an_answer_is_found_while_it_waits_and_after_it_is_written(tmp_path: Path) -> None:
    feedback = open_feedback(tmp_path)
    remember(feedback, "waits")
    assert feedback.label_answer("waits", 0, "good")
    feedback._write()
    assert not feedback._pending
    assert feedback.label_answer("waits", 0, "bad")
    found = rows(tmp_path, "SELECT request, text, label, predicted, version FROM labels ORDER BY id")
    assert found == [("waits", None, "good", "bad", "v1"), ("waits", None, "bad", "bad", "v1")]
    for request, index in (("waits", 1), ("other", 0)):
        with pytest.raises(NotFoundError, match=request):
            feedback.label_answer(request, index, "good")


def test_no_label_falls_between_the_queue_and_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WRITE_EVERY_S", 0.001)
    feedback = open_feedback(tmp_path)
    feedback.start()
    for number in range(300):
        remember(feedback, str(number))
        assert feedback.label_answer(str(number), 0, "good")
    feedback.close()
    assert rows(tmp_path, "SELECT count(*) FROM answers") == [(300,)]


def test_answers_are_written_as_time_goes_by_and_labels_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WRITE_EVERY_S", 0.001)
    feedback = open_feedback(tmp_path)
    written = threading.Event()
    monkeypatch.setattr(feedback, "_write", written.set)
    feedback.start()
    assert written.wait(30)
    assert feedback._thread.daemon  # a process that dies does not wait for it

    async def give_without_waiting() -> None:
        labels = [asyncio.ensure_future(feedback.keep("good", text=f"text {number}")) for number in range(5)]
        await asyncio.sleep(0)
        feedback.close()
        assert rows(tmp_path, "SELECT count(*) FROM labels") == [(5,)]
        await asyncio.gather(*labels)

    asyncio.run(give_without_waiting())
    assert not feedback._thread.is_alive()


@pytest.mark.parametrize("written", [0, 1, 2])
def test_an_id_that_two_answers_share_names_neither_and_the_first_one_stays(tmp_path: Path, written: int) -> None:
    feedback = open_feedback(tmp_path)
    for number, label in enumerate(("bad", "good")):
        remember(feedback, "again", label)
        remember(feedback, "twice the same")
        if number < written:
            feedback._write()
    with pytest.raises(ConflictError, match=r"'again'.*send the text"):
        feedback.label_answer("again", 0, "good")
    assert feedback.label_answer("twice the same", 0, "good")
    feedback.close()
    assert rows(tmp_path, "SELECT label, ambiguous FROM answers ORDER BY request") == [("bad", 1), ("bad", 0)]


def test_what_was_said_before_is_one_row_and_a_correction_a_new_one(tmp_path: Path) -> None:
    feedback = open_feedback(tmp_path)
    remember(feedback, "one")
    assert [feedback.label_answer("one", 0, label) for label in ("bad", "bad", "good", "bad")] == [1, 0, 1, 1]
    assert [feedback.label_text("a text", label) for label in ("bad", "bad", "good", "bad")] == [1, 0, 1, 1]
    assert feedback.counts() == {"labels": 6, "labelled_texts": 1, "kept_apart": 0}
    assert labelled_texts(tmp_path / FILE, pytest.fail) == [("a text", "bad")]


def test_texts_of_traffic_are_kept_only_where_that_is_wanted(tmp_path: Path) -> None:
    for keep in (False, True):
        feedback = open_feedback(tmp_path, keep_texts=keep)
        remember(feedback, f"kept {keep}")
        feedback.label_answer(f"kept {keep}", 0, "good")
        feedback.close()
    assert labelled_texts(tmp_path / FILE, pytest.fail) == [("text of kept True", "good")]
    assert b"text of kept False" not in (tmp_path / FILE).read_bytes()


def test_the_oldest_rows_go(tmp_path: Path) -> None:
    feedback = open_feedback(tmp_path, max_rows=20)
    for number in range(50):
        remember(feedback, str(number))
        feedback.label_text(f"text {number}", "good")
        if number % 10 == 9:
            feedback._write()
    feedback.close()
    assert rows(tmp_path, "SELECT text FROM labels ORDER BY id") == [(f"text {number}",) for number in range(30, 50)]
    kept = {int(request) for (request,) in rows(tmp_path, "SELECT request FROM answers")}
    assert kept == set(range(30, 50))


def test_the_accuracy_is_of_the_newest_labels_of_one_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ACCURACY_LABELS", 4)
    feedback = open_feedback(tmp_path)
    assert feedback.accuracy("v1") is None
    for number in range(6):
        remember(feedback, "batch", "bad", index=number)
        feedback.label_answer("batch", number, "bad" if number > 2 else "good")
    remember(feedback, "other", version="v2")
    feedback.label_answer("other", 0, "good")
    found = feedback.accuracy("v1")
    assert found is not None
    assert (found.count, found.right, found.accuracy) == (4, 3, 0.75)
    assert (found.low, found.high) == wilson(3, 4)
    feedback.label_answer("batch", 5, "good")  # corrected: still one answer
    again = feedback.accuracy("v1")
    assert again is not None
    assert (again.count, again.right) == (4, 2)


def test_a_label_that_was_confirmed_outlives_kill_9(tmp_path: Path) -> None:
    with child(tmp_path, "killed", 5000) as process:
        assert process.stdout is not None
        last = [int(process.stdout.readline()) for _ in range(20)][-1]
        os.kill(process.pid, signal.SIGKILL)
        confirmed = max([last, *(int(line) for line in process.stdout if line.endswith("\n"))])
    found = {request for (request,) in rows(tmp_path, "SELECT request FROM labels")}
    assert {f"killed-{number}" for number in range(confirmed + 1)} <= found
    assert rows(tmp_path, "PRAGMA integrity_check") == [("ok",)]


def test_processes_write_into_one_new_file_at_once(tmp_path: Path) -> None:
    children = [child(tmp_path, str(name), 40) for name in range(3)]
    for process in children:
        assert len(process.communicate(timeout=240)[0].split()) == 40
        assert process.returncode == 0
    assert rows(tmp_path, "SELECT (SELECT count(*) FROM labels), (SELECT count(*) FROM answers)") == [(120, 120)]


def damage(path: Path) -> None:
    path.write_bytes(b"this is no database, " * 500)


def replace_by_folder(path: Path) -> None:
    path.mkdir()


def make_newer(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()


@pytest.mark.parametrize(
    ("spoil", "words"), [(damage, "not a database"), (replace_by_folder, "unable to open"), (make_newer, "newer")]
)
def test_a_file_that_cannot_be_used_costs_answers_and_one_warning(
    tmp_path: Path, spoil: Any, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(tmp_path / FILE)
    feedback = open_feedback(tmp_path)
    for number in range(3):
        remember(feedback, str(number))
        feedback._write()
    assert feedback.dropped == 3
    assert len(caplog.records) == 1
    assert FILE in caplog.text
    with pytest.raises(UnavailableError, match=words):
        feedback.label_text("a text", "good")
    complaints: list[str] = []
    assert labelled_texts(tmp_path / FILE, complaints.append) == []
    assert len(complaints) == 1


def test_a_file_that_vanished_is_made_anew(tmp_path: Path) -> None:
    feedback = open_feedback(tmp_path)
    feedback.label_text("before", "good")
    (tmp_path / FILE).unlink()
    assert feedback.label_text("after", "good")
    assert labelled_texts(tmp_path / FILE, pytest.fail) == [("after", "good")]


def test_a_full_disk_refuses_labels_and_is_used_again_when_there_is_room(disk: Any) -> None:
    feedback = open_feedback(disk.path)
    assert feedback.label_text("before", "good")
    disk.fill()
    with pytest.raises(UnavailableError, match=r"full|disk I/O"):
        feedback.label_text("a long text " * 2000, "good")
    remember(feedback, "lost")
    feedback._write()
    assert feedback.dropped == 1
    (disk.path / "ballast").unlink()
    assert feedback.label_text("after", "good")
    assert labelled_texts(disk.path / FILE, pytest.fail) == [("before", "good"), ("after", "good")]


def test_a_read_only_disk_refuses_labels(disk: Any) -> None:
    feedback = open_feedback(disk.path)
    assert feedback.label_text("before", "good")
    disk.make_read_only()
    with pytest.raises(UnavailableError, match=FILE):
        feedback.label_text("after", "good")
    remember(feedback, "lost")
    feedback._write()
    assert feedback.dropped == 1


def test_answers_that_come_faster_than_they_are_written_are_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PENDING", 10)
    feedback = open_feedback(tmp_path)
    for number in range(15):
        remember(feedback, str(number))
    assert feedback.dropped == 5
    feedback.close()
    assert rows(tmp_path, "SELECT count(*) FROM answers") == [(10,)]


def test_a_held_database_delays_a_label_and_loses_none(tmp_path: Path) -> None:
    feedback = open_feedback(tmp_path)
    feedback.label_text("before", "good")
    held = sqlite3.connect(tmp_path / FILE, isolation_level=None, check_same_thread=False)
    held.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.3, held.execute, ["COMMIT"])
    release.start()
    assert feedback.label_text("after", "good")
    release.join()
    held.close()


OLDER = """
CREATE TABLE answers (
    request TEXT NOT NULL, place INTEGER NOT NULL, at REAL NOT NULL, version TEXT NOT NULL,
    label TEXT NOT NULL, score REAL NOT NULL, text TEXT, PRIMARY KEY (request, place)
) WITHOUT ROWID;
CREATE INDEX answers_by_time ON answers (at);
CREATE TABLE labels (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, request TEXT, place INTEGER, text TEXT,
    label TEXT NOT NULL, predicted TEXT, version TEXT
);
CREATE INDEX labels_by_request ON labels (request, place);
CREATE INDEX labels_by_text ON labels (text);
CREATE INDEX labels_by_version ON labels (version, id);
INSERT INTO answers VALUES ('old', 0, 1.0, 'v1', 'bad', 0.5, NULL);
INSERT INTO labels VALUES (7, 1.0, NULL, NULL, 'an old text', 'good', NULL, NULL);
PRAGMA user_version = 1;
"""


def test_a_file_of_the_first_release_is_brought_up_to_date_and_its_labels_wait_for_their_owner(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE) as older:
        older.executescript(f"PRAGMA journal_mode = WAL; {OLDER}")
    older.close()
    feedback = open_feedback(tmp_path)
    assert feedback.counts() == {"labels": 1, "labelled_texts": 0, "kept_apart": 1}
    assert labelled_texts(tmp_path / FILE, pytest.fail) == []
    assert feedback.label_answer("old", 0, "good")
    assert database.trust(tmp_path / FILE, "unknown") == 1
    assert labelled_texts(tmp_path / FILE, pytest.fail) == [("an old text", "good")]
    assert feedback.counts() == {"labels": 2, "labelled_texts": 1, "kept_apart": 0}
    assert rows(tmp_path, "SELECT rows FROM totals WHERE kind = 'answers'") == [(1,)]


def said_by_both(folder: Path) -> None:
    open_feedback(folder, keyed=False).label_text("a text", "bad", client="10.1.2.3")
    open_feedback(folder).label_text("a text", "good", client="10.1.2.3")
    open_feedback(folder).label_text("another text", "bad")
    open_feedback(folder, keyed=False).label_text("another text", "good", client="10.9.9.9")


def test_what_strangers_say_is_kept_apart(tmp_path: Path) -> None:
    said_by_both(tmp_path)
    assert labelled_texts(tmp_path / FILE, pytest.fail) == [("a text", "good"), ("another text", "bad")]
    feedback = open_feedback(tmp_path, keyed=False)
    assert feedback.counts() == {"labels": 4, "labelled_texts": 2, "kept_apart": 2}
    for keyed, right in ((True, 0), (False, 1)):
        mine = open_feedback(tmp_path, keyed=keyed)
        remember(mine, "one")
        mine.label_answer("one", 0, "good" if keyed else "bad")
        mine.close()
        found = mine.accuracy("v1")
        assert found is not None
        assert found.right == right
    found = open_feedback(tmp_path).accuracy("v1")
    assert found is not None
    assert found.right == 0  # whatever strangers have said since


def test_the_owner_counts_lists_trusts_and_removes(tmp_path: Path) -> None:
    path = tmp_path / FILE
    said_by_both(tmp_path)
    today = time.strftime("%Y-%m-%d", time.gmtime())
    assert "10." not in database.counts_table(path) + database.labels_table(path, "anonymous")  # no address is kept
    listed = [line.split()[:4] for line in database.labels_table(path, "anonymous").splitlines()[1:]]
    assert [(row[0], row[1], row[2].split("/")[0], row[3]) for row in listed] == [
        ("1", today, "anonymous", "bad"),
        ("4", today, "anonymous", "good"),
    ]
    assert listed[0][2] != listed[1][2]
    table = [line.split(maxsplit=3) for line in database.counts_table(path).splitlines()]
    assert table[0] == ["day", "origin", "labels", "use"]
    assert sorted((day, origin[:10], count, use) for day, origin, count, use in table[1:]) == [
        (today, "anonymous/", "1", "kept apart"),
        (today, "anonymous/", "1", "kept apart"),
        (today, "key", "1", "trained on, or tested with"),
        (today, f"key/{listed[0][2].split('/')[1]}"[:10], "1", "trained on, or tested with"),
    ]
    assert database.remove(path, listed[0][2]) == 1
    assert database.trust(path, "4") == 1
    assert dict(labelled_texts(path, pytest.fail)) == {"a text": "good", "another text": "good"}
    for nothing in ("4", "1999-01-01", "unknown", "anonymous/00000000"):
        with pytest.raises(NotFoundError, match="an id, a day"):
            database.remove(path, nothing)
    for odd in ("mine", "key' OR 1", "9" * 30, "-1", "²"):
        with pytest.raises(NotFoundError, match="names no labels"):
            database.labels_table(path, odd)
    assert database.remove(path, today) == 3
    assert "no label" in database.counts_table(path)
    assert b"another text" not in path.read_bytes()
    with pytest.raises(NotFoundError, match="no feedback"):
        database.remove(tmp_path / "none", "key")


def test_a_commit_is_on_disk_when_it_returns(tmp_path: Path) -> None:
    open_feedback(tmp_path).label_text("a text", "good")
    assert rows(tmp_path, "PRAGMA synchronous") == [(2,)]  # FULL
    assert rows(tmp_path, "PRAGMA journal_mode") == [("wal",)]


def pages(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob(f"{FILE}*"))


@pytest.mark.parametrize("keyed", [True, False])
def test_the_file_stays_within_its_bytes_and_strangers_push_out_no_label_that_counts(
    tmp_path: Path, keyed: bool
) -> None:
    for number in range(20):
        open_feedback(tmp_path).label_text(f"owner's text {number}", "good")
    feedback = open_feedback(tmp_path, keyed=keyed, keep_texts=True, max_bytes=1 << 20)
    for number in range(150):
        feedback.label_text(f"{number} " * 5000, "good")
        remember(feedback, f"{number} " * 2000)
        if number % 10 == 9:
            feedback._write()
            assert pages(tmp_path) < (1 << 20) + database.JOURNAL_BYTES + (1 << 19)
    feedback.close()
    assert (tmp_path / FILE).stat().st_size <= 1 << 20
    kept = [text for text, _ in labelled_texts(tmp_path / FILE, pytest.fail)]
    assert (f"{149} " * 5000 in kept) == keyed
    assert ("owner's text 0" in kept) != keyed
    totals = dict(rows(tmp_path, "SELECT kind, rows FROM totals"))
    assert totals["answers"] == rows(tmp_path, "SELECT count(*) FROM answers")[0][0]
    assert totals["texts"] == len(kept)
    smaller = open_feedback(tmp_path, max_bytes=1 << 19)
    smaller.label_text("one more", "good")
    assert (tmp_path / FILE).stat().st_size <= 1 << 19


def test_for_bytes_the_oldest_of_what_takes_most_among_strangers_labels_and_answers_goes_first(tmp_path: Path) -> None:
    for keyed, count, size in ((True, 2, 90_000), (False, 3, 50_000)):
        for number in range(count):
            open_feedback(tmp_path, keyed=keyed).label_text(f"{number} ".ljust(size, "."), "good")
    feedback = open_feedback(tmp_path, keep_texts=True)
    for number in range(40):
        remember(feedback, str(number))
    feedback.close()
    left = "SELECT origin, substr(text, 1, 1) FROM labels ORDER BY id"
    with open_database(tmp_path / FILE) as opened:

        def bound(max_bytes: int) -> tuple[list[Any], int]:
            opened.execute("BEGIN IMMEDIATE")
            database.bound(opened, max_rows=1000, max_bytes=max_bytes)
            opened.execute("COMMIT")
            return opened.execute(left).fetchall(), opened.execute("SELECT count(*) FROM answers").fetchone()[0]

        used = database._used_bytes(opened)
        owners = [("key", "0"), ("key", "1")]
        assert bound(used) == ([*owners, *(("anonymous", str(number)) for number in range(3))], 40)
        assert bound(used - 1) == ([*owners, ("anonymous", "1"), ("anonymous", "2")], 40)
        assert bound(used - 150_000) == ([*owners, ("anonymous", "2")], 40)
        assert bound(250_000) == ([("key", "1")], 0)  # only when nothing else is left
        assert bound(0) == ([], 0)


def test_a_text_is_cut_to_what_a_model_may_read_of_it(tmp_path: Path) -> None:
    feedback = open_feedback(tmp_path, max_characters=10, keep_texts=True)
    assert feedback.label_text("0123456789 and more", "good")
    assert not feedback.label_text("0123456789 and other words", "good")
    remember(feedback, "one")
    feedback.label_answer("one", 0, "bad")
    feedback.close()
    assert labelled_texts(tmp_path / FILE, pytest.fail) == [("0123456789", "good"), ("text of on", "bad")]
    assert rows(tmp_path, "SELECT text FROM answers") == [("text of on",)]


def test_texts_that_wait_are_bounded_in_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PENDING_CHARACTERS", 30)
    feedback = open_feedback(tmp_path, keep_texts=True)
    for number in range(5):
        remember(feedback, str(number))  # nine characters
    assert (len(feedback._pending), feedback.dropped) == (3, 2)
    for number in range(5, 8):  # each time there is room again for three
        feedback._write()
        remember(feedback, str(number))
    assert feedback.dropped == 2
    feedback._write()
    for number in range(8, 12):
        remember(feedback, str(number))
    assert (len(feedback._pending), feedback.dropped) == (3, 3)


@pytest.mark.parametrize(
    ("said", "name", "wanted"),
    [
        ({"text": "a text"}, "label_text", ("a text", "good")),
        ({"request": "one", "index": 2}, "label_answer", ("one", 2, "good")),
    ],
)
def test_a_label_is_kept_on_another_thread_with_its_client_and_what_is_left_of_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, Any], name: str, wanted: tuple[object, ...]
) -> None:
    feedback = open_feedback(tmp_path)
    now = iter([100.0, 100.5])  # when it is asked for, and when it is written
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(now)))

    def label(*values: object, client: str, wait_s: float) -> bool:
        assert (values, client) == (wanted, "10.1.2.3")
        assert wait_s == module.WAIT_S - 0.5
        assert threading.current_thread() is not threading.main_thread()
        return False

    monkeypatch.setattr(feedback, name, label)
    assert asyncio.run(feedback.keep("good", client="10.1.2.3", **said)) is False
    assert feedback._waiting == 0
    feedback.close()


def test_both_kinds_of_labels_bear_their_clients_mark_and_without_a_secret_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "datetime", SimpleNamespace(now={UTC: datetime(2026, 3, 2, 23, 59)}.get))
    feedback = open_feedback(tmp_path)
    remember(feedback, "one")
    feedback.label_answer("one", 0, "good", client="10.1.2.3")
    feedback.label_text("a text", "good", client="10.1.2.3")
    feedback.label_text("another text", "good")
    assert "None" not in database.labels_table(tmp_path / FILE, "1")  # whose text was not kept
    [[first], [second], [third]] = rows(tmp_path, "SELECT client FROM labels ORDER BY id")
    assert first == second == pseudonym(read_secret(tmp_path), "10.1.2.3", "2026-03-02")
    assert third is None
    (tmp_path / "secret").write_bytes(b"short")
    for number in range(2):
        assert feedback.label_text(f"text {number}", "good", client="10.1.2.3")
    assert rows(tmp_path, "SELECT client FROM labels WHERE id > 3") == [(None,), (None,)]
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("code", "tries"),
    [
        (sqlite3.SQLITE_BUSY, 3),
        (sqlite3.SQLITE_BUSY_RECOVERY, 3),
        (sqlite3.SQLITE_LOCKED, 3),
        (sqlite3.SQLITE_READONLY, 1),
        (sqlite3.SQLITE_IOERR_WRITE, 1),
        (sqlite3.SQLITE_FULL, 1),
    ],
)
def test_only_a_file_that_somebody_else_holds_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, code: int, tries: int
) -> None:
    now, asked = iter([0.0, 1.0, 5.0, 5.5]), []
    monkeypatch.setattr(database, "time", SimpleNamespace(monotonic=lambda: next(now), sleep=asked.append))

    class Refusing:
        def execute(self, query: str) -> None:
            if "journal_mode" in query:
                asked.append(query)
                error = sqlite3.OperationalError("no")
                error.sqlite_errorcode = code
                raise error

    with pytest.raises(sqlite3.OperationalError):
        database._prepare(Refusing(), 5.0)  # type: ignore[arg-type]
    assert len([one for one in asked if isinstance(one, str)]) == tries


def test_figures_are_looked_up_and_no_row_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feedback = open_feedback(tmp_path)
    remember(feedback, "one")
    for label in ("bad", "good", "bad"):
        feedback.label_answer("one", 0, label)
    asked: list[tuple[str, tuple[object, ...]]] = []

    class Watched(sqlite3.Connection):
        def execute(self, query: str, values: Any = ()) -> sqlite3.Cursor:
            asked.append((query, tuple(values)))
            return super().execute(query, values)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **k, factory=Watched))
    feedback.counts()
    feedback.accuracy("v1")
    monkeypatch.undo()
    plans: list[str] = []
    with open_database(tmp_path / FILE) as opened:
        for query, values in asked:
            if "FROM" in query:
                plans += [line[3] for line in opened.execute(f"EXPLAIN QUERY PLAN {query}", values)]
    scanned = {plan for plan in plans if plan.startswith("SCAN")}
    assert not {plan for plan in scanned if "labels" in plan or "answers" in plan}, plans
    assert any("SEARCH labels USING INDEX labels_by_version" in plan for plan in plans)


def test_corrections_without_end_of_one_answer_are_not_all_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ACCURACY_LABELS", 3)
    feedback = open_feedback(tmp_path)
    for number in range(2):
        remember(feedback, "one", index=number)
        feedback.label_answer("one", number, "bad")
    for number in range(20):
        feedback.label_answer("one", 1, ("good", "bad")[number % 2])
    found = feedback.accuracy("v1")
    assert found is not None
    assert found.count == 1  # the first answer's label lies behind the twelve rows that are read


def test_a_file_that_another_process_locks_holds_up_labels_for_a_bounded_time_and_reading_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAIT_S", 0.3)
    monkeypatch.setattr(module, "MAX_WAITING", 5)
    feedback = open_feedback(tmp_path)
    feedback.label_text("before", "good")
    held = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    held.execute("BEGIN IMMEDIATE")

    async def give() -> list[Any]:
        labels = [feedback.keep("good", text=f"text {number}") for number in range(8)]
        given = asyncio.gather(*labels, return_exceptions=True)
        await asyncio.sleep(0)
        assert await asyncio.to_thread(feedback.counts) == {"labels": 1, "labelled_texts": 1, "kept_apart": 0}
        return list(await given)

    found = asyncio.run(give())
    assert all(isinstance(one, UnavailableError) for one in found)
    assert sum("wait for it already" in str(one) for one in found) == 3
    assert sum("locked" in str(one) for one in found) == 5
    held.execute("COMMIT")
    held.close()
    assert asyncio.run(feedback.keep("good", text="after"))
    feedback.close()
