"""One trainer a store, among real processes that are killed, and how far it says it is."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lifecycle.conftest import ENVIRONMENT

from tuneserve.errors import BusyError, StoreError
from tuneserve.lifecycle import status
from tuneserve.lifecycle.status import MOST_POINTS, REFUSALS, Status, hold, read_status
from tuneserve.lifecycle.store import Store

HOLDER = """
import subprocess, sys, time
from pathlib import Path
from tuneserve.lifecycle.status import hold
with hold(Path(sys.argv[1])):
    child = subprocess.Popen(["sleep", "60"], close_fds=False)
    print(child.pid, flush=True)
    time.sleep(60)
"""
RIVAL = """
import os, sys, time
from pathlib import Path
from tuneserve.errors import BusyError
from tuneserve.lifecycle.status import hold
path, log = Path(sys.argv[1]), os.open(sys.argv[2], os.O_APPEND | os.O_WRONLY | os.O_CREAT)
done = 0
while done < 5:
    try:
        with hold(path):
            os.write(log, f"+{os.getpid()}\\n".encode())
            time.sleep(0.005)
            os.write(log, f"-{os.getpid()}\\n".encode())
            done += 1
            if done == 3:
                os.kill(os.getpid(), 9) if len(sys.argv) > 3 else None
    except BusyError:
        time.sleep(0.001)
"""
FORKED = """
import os, signal, sys
from pathlib import Path
from tuneserve.lifecycle.status import hold
path = Path(sys.argv[1])
try:
    with hold(path):
        child = os.fork()
        if child == 0:
            signal.pause()
        raise ValueError
except ValueError:
    pass
try:
    with hold(path):
        pass
finally:
    os.kill(child, signal.SIGKILL)
"""
Python = Callable[..., "subprocess.CompletedProcess[str]"]
OF_THE_PREVIOUS_RELEASE = (
    b'{"host": "elsewhere", "boot": "1", "pids": "pid:[1]", "pid": 1, "started": 1, "since": "2026"}'
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trainer.lock"


@pytest.fixture
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock, and that has started another program meanwhile."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()
    process.stdout.close()
    os.kill(child, signal.SIGKILL)


def refuse(number: int) -> Callable[..., None]:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return flock


def test_the_second_is_told_who_is_first(path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(BusyError, match=rf"process {holder.pid} on .+ since 20.+trainer\.lock"), hold(path):
        pass


def test_a_killed_owner_holds_nothing_though_a_program_it_started_lives_on(
    path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.kill()
    holder.wait()
    with hold(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_who_only_asks_for_the_lock_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.touch()
    askers = [os.open(path, os.O_RDONLY) for _ in range(2)]
    for asker in askers:
        fcntl.flock(asker, fcntl.LOCK_SH)
    monkeypatch.setattr(status.time, "sleep", lambda _: os.close(askers.pop()))
    with hold(path) as lock:
        assert lock.exclusive
        assert askers == []
        assert "has been training" in str(status.holder(path))
    assert status.holder(path) is None


def test_an_asker_that_stays_is_not_waited_for_without_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.touch()
    asker = os.open(path, os.O_RDONLY)
    fcntl.flock(asker, fcntl.LOCK_SH)
    monkeypatch.setattr(status, "ASKED_S", 0.0)
    with pytest.raises(BusyError), hold(path):
        pass
    os.close(asker)
    with hold(path):
        pass


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_the_lock_is_released_when_the_block_fails(path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), hold(path):
        raise error
    with hold(path):
        pass


def test_the_lock_is_released_though_a_forked_child_lives_on(path: Path, python: Python) -> None:
    done = python("-c", FORKED, path)
    assert done.returncode == 0, done.stderr


def test_of_many_processes_one_at_a_time_holds_it_though_some_are_killed(path: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    rivals = [
        subprocess.Popen([sys.executable, "-c", RIVAL, path, log, *(["die"] if number % 2 else [])], env=ENVIRONMENT)
        for number in range(8)
    ]
    assert [rival.wait(60) for rival in rivals] == [0, -signal.SIGKILL] * 4
    lines = log.read_text().split()
    entries, exits = lines[::2], lines[1::2]
    assert [line[1:] for line in entries] == [line[1:] for line in exits]
    assert ({line[0] for line in entries}, {line[0] for line in exits}) == ({"+"}, {"-"})
    assert len(entries) == 4 * 5 + 4 * 3


@pytest.mark.parametrize(
    "content", [b"", OF_THE_PREVIOUS_RELEASE, b"\0\xff", b"[1]", b"[" * 9000, b'{"pid": 1}'], ids=range(6)
)
def test_what_a_file_says_neither_blocks_nor_breaks_anything(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with hold(path):
        assert set(json.loads(path.read_bytes())) == {"host", "pid", "since"}
        if content != OF_THE_PREVIOUS_RELEASE:
            path.write_bytes(content)
            with pytest.raises(BusyError, match="another process is training"), hold(path):
                pass


def test_a_holder_is_told_that_its_file_was_removed(path: Path) -> None:
    with hold(path) as first:
        first.require()
        path.unlink()
        with pytest.raises(StoreError, match="removed or replaced"):
            first.require()
        with hold(path) as second:
            second.require()
            with pytest.raises(StoreError, match="removed or replaced"):
                first.require()


@pytest.mark.parametrize("number", REFUSALS)
def test_a_file_system_without_locks_is_trained_on_with_a_warning(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    with hold(path) as held:
        held.require()
    assert "only one trainer" in caplog.text


def test_a_lock_that_fails_for_another_reason_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse(errno.EIO))
    with pytest.raises(StoreError, match="cannot be locked"), hold(path):
        pass


@pytest.mark.parametrize("fail", ["fill", "make_read_only"])
def test_a_disk_that_refuses_is_a_clear_error(disk: Any, fail: str) -> None:
    getattr(disk, fail)()
    with pytest.raises(StoreError, match=r"trainer\.lock cannot be written"), hold(disk.path / "trainer.lock"):
        pass


def test_the_time_left_follows_the_pace_from_the_first_step_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("tuneserve.lifecycle.status.time.monotonic", lambda: now)
    with Status(store.status_file) as status:
        status.training(steps=100, epochs=4)
        now += 2
        status.step(51, {"loss": 0.5})  # the first, from a checkpoint at step 50
        assert read_status(store.status_file)["eta_s"] == 98
        now += 8
        status.step(60, {"loss": 0.5})
    seen = read_status(store.status_file)
    assert {name: seen[name] for name in ("epoch", "progress", "eta_s")} == {"epoch": 3, "progress": 0.6, "eta_s": 40}


def test_a_curve_keeps_its_form_and_its_bounds(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "EVERY_S", 0)
    store.prepare()
    said = Status(store.status_file)
    said.found([f"{number} \U0001f600" * 200 for number in range(50)])  # four bytes a character
    said.training(steps=1000, epochs=2)
    for step in range(1, 1001):
        said.step(step, {"loss": 1000.0 - step})
        if step % 500 == 0:
            said.step(step, {"validation_loss": float("nan") if step == 500 else 0.5})
    said.phase("testing")
    course = read_status(store.status_file)["course"]
    losses = course["losses"]
    assert MOST_POINTS // 2 <= len(losses) <= MOST_POINTS
    assert [step for step, _ in losses] == sorted({step for step, _ in losses})
    assert losses[-1] == (1000, 0.0)
    assert losses[0] == (1, 999.0)  # the beginning stays
    assert all(loss == 1000.0 - step for step, loss in losses)
    assert course["validation_losses"] == [(1000, 0.5)]  # what is no number is no point
    assert (len(course["findings"]), len(course["findings"][0])) == (20, 400)
    said.phase("judging")
    assert read_status(store.status_file)["course"] == course  # other phases keep it


def test_epochs_shorter_than_what_is_waited_between_two_writings_hide_no_progress(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(status.time, "monotonic", lambda: now)
    store.prepare()
    said = Status(store.status_file)
    said.training(steps=100, epochs=50)
    for step in range(1, 21):
        now += 0.2
        said.step(step, {"loss": 0.5})
        if step % 2 == 0:
            said.step(step, {"validation_loss": 0.4})
    found = read_status(store.status_file)
    assert found["progress"] > 0.1
    assert found["course"]["validation_losses"]


def test_who_did_not_get_the_lock_does_not_release_it(path: Path, python: Python) -> None:
    program = "import sys, pathlib; from tuneserve.lifecycle.status import hold"
    program += "\nhold(pathlib.Path(sys.argv[1])).__enter__()"
    with hold(path) as held:
        for _ in range(2):
            with pytest.raises(BusyError), hold(path):
                pass
            path.read_bytes()  # closes a descriptor of the file, which would release a lock of POSIX's kind
            assert "BusyError" in python("-c", program, path).stderr
        held.require()


@pytest.mark.parametrize("odd", ["dangling", "loop", "folder", "pipe"])
def test_a_lock_that_is_no_file_is_a_clear_error(path: Path, odd: str) -> None:
    if odd == "pipe":
        os.mkfifo(path)
    elif odd == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.name if odd == "loop" else "elsewhere")
    with pytest.raises(StoreError, match=r"trainer\.lock cannot be written"), hold(path):
        pass
    assert not path.with_name("elsewhere").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 200_000,
        b'{"phase": 3}',
        b'{"phase": "resting"}',
        b'{"eta_s": 1e999}',
        b'["phase"]',
        b"\xff",
        b'{"phase": "failed"}'.ljust(100_000),  # read for each /readyz, so that a large one would hold up everybody
    ],
    ids=lambda content: content[:20],
)
def test_a_status_that_is_none_is_empty(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert read_status(path) == {}
