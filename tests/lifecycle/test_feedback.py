"""Labels that survive whatever happens to the process, the disk or the file; real files, real processes."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from lifecycle.conftest import ENVIRONMENT

from tuneserve.errors import NotFoundError, UnavailableError
from tuneserve.lifecycle import feedback as module
from tuneserve.lifecycle.feedback import FILE, Feedback, labelled_texts, open_database
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
    return Feedback(folder / FILE, **{"max_rows": 1000, "keep_texts": False} | changed)


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


def test_of_two_answers_with_one_id_the_newer_counts(tmp_path: Path) -> None:
    feedback = open_feedback(tmp_path)
    for label in ("bad", "good"):
        remember(feedback, "again", label)
    feedback.label_answer("again", 0, "good")
    feedback.close()
    assert rows(tmp_path, "SELECT predicted FROM labels") == [("good",)]
    assert rows(tmp_path, "SELECT label FROM answers") == [("good",)]


def test_what_was_said_before_is_one_row_and_a_correction_a_new_one(tmp_path: Path) -> None:
    feedback = open_feedback(tmp_path)
    remember(feedback, "one")
    assert [feedback.label_answer("one", 0, label) for label in ("bad", "bad", "good", "bad")] == [1, 0, 1, 1]
    assert [feedback.label_text("a text", label) for label in ("bad", "bad", "good", "bad")] == [1, 0, 1, 1]
    assert feedback.counts() == {"labels": 6, "labelled_texts": 1}
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
    assert set(range(30, 50)) <= kept <= set(range(20, 50))


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
        assert len(process.communicate(timeout=60)[0].split()) == 40
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
