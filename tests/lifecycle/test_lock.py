"""One trainer a store, among real processes that are killed, stopped, and on machines of their own."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tuneserve.errors import BusyError, StoreError
from tuneserve.lifecycle import lock
from tuneserve.lifecycle.lock import hold

HOLDER = """
import sys, time
from pathlib import Path
from tuneserve.lifecycle.lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
RIVAL = """
import os, sys, time
from pathlib import Path
from tuneserve.errors import BusyError
from tuneserve.lifecycle.lock import hold
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


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trainer.lock"


@pytest.fixture
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(lock.__file__).parents[2])},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def pretend(path: Path, **changed: Any) -> None:
    """Write a lock as another owner would have."""
    path.write_text(json.dumps({**lock._myself(), **changed}))


@contextmanager
def touching(path: Path) -> Iterator[None]:
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    yield
    ended.set()
    thread.join()


def test_the_second_is_told_who_is_first_and_comes_in_after_it(path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(BusyError, match=rf"process {holder.pid} on .+ since 20"), hold(path):
        pass
    holder.terminate()
    holder.wait()
    with hold(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_what_a_killed_process_left_is_taken_over_at_once(path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    assert path.exists()
    began = time.monotonic()
    with hold(path):
        assert time.monotonic() - began < 1


def test_a_process_number_that_is_used_again_is_no_owner(path: Path) -> None:
    pretend(path, started=1)
    with hold(path):
        pass


@pytest.mark.parametrize("changed", [{"host": "elsewhere"}, {"boot": "another"}, {"pids": "pid:[1]"}])
def test_an_owner_elsewhere_lives_while_the_file_is_touched(path: Path, changed: dict[str, str]) -> None:
    pretend(path, **changed)
    with touching(path), pytest.raises(BusyError), hold(path, patience_s=5):
        pass
    with hold(path, patience_s=0.4):
        pass


def test_a_holder_that_slept_too_long_is_told_and_revives_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    with hold(path) as first:
        first.require()
        path.unlink()  # as a rival does who takes it for dead
        with hold(path) as second:
            time.sleep(0.2)
            second.require()
            with pytest.raises(StoreError, match="taken over"):
                first.require()
        assert not path.exists()


def test_it_is_given_up_when_the_block_fails_or_a_signal_ends_it(path: Path) -> None:
    for error in (ValueError, SystemExit, KeyboardInterrupt):
        with pytest.raises(error), hold(path):
            raise error
        assert not path.exists()


def test_of_many_processes_one_at_a_time_holds_it_though_some_are_killed(path: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    environment = os.environ | {"PYTHONPATH": str(Path(lock.__file__).parents[2])}
    rivals = [
        subprocess.Popen([sys.executable, "-c", RIVAL, path, log, *(["die"] if number % 2 else [])], env=environment)
        for number in range(8)
    ]
    codes = [rival.wait(60) for rival in rivals]
    assert codes == [0, -signal.SIGKILL] * 4
    inside, turns = None, 0
    for line in log.read_text().split():
        if line[0] == "+":
            assert inside is None
            inside = line[1:]
        else:
            assert inside == line[1:]
            inside, turns = None, turns + 1
    assert turns == 4 * 5 + 4 * 3


@pytest.mark.parametrize("late", [False, True])
def test_a_living_owners_file_that_has_a_dead_ones_number_stays(
    path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    pretend(path, started=1)
    dead = lock._look(path)
    assert dead is not None

    def change_hands(*_: Any) -> None:
        path.write_text(json.dumps(lock._myself()))  # in the same file, and so under the same number

    if late:
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda self, to: [change_hands(), rename(self, to)][1])
    else:
        change_hands()
    lock._set_aside(path, dead)
    assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(path.parent.iterdir()) == [path]


def test_a_lock_that_says_nothing_is_taken_over_after_a_while(path: Path) -> None:
    path.write_bytes(b"\0\0")
    with hold(path, patience_s=0.3):
        pass


@pytest.mark.parametrize("fail", ["fill", "make_read_only"])
def test_a_disk_that_refuses_is_a_clear_error(disk: Any, fail: str) -> None:
    getattr(disk, fail)()
    with pytest.raises(StoreError, match=r"trainer\.lock cannot be written"), hold(disk.path / "trainer.lock"):
        pass


def test_where_there_are_no_hard_links_the_file_is_made_directly(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(lock.NO_LINKS[0], "no links here")

    monkeypatch.setattr(os, "link", refuse)
    with hold(path), pytest.raises(BusyError), hold(path):
        pass
    assert not path.exists()
