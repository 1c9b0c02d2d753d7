"""Trainings as real child processes: one at a time, remembered, and gone with their parent."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from lifecycle.conftest import ENVIRONMENT, SLEEP, Make
from wire import wait_until

from tuneserve.errors import BusyError
from tuneserve.lifecycle.store import Store
from tuneserve.lifecycle.trainer import Job, Trainer

Python = Callable[..., "subprocess.CompletedProcess[str]"]


def run(trainer: Trainer) -> Job:
    ended = threading.Event()
    trainer.on_end = lambda job: ended.set()
    job = trainer.start("a test")
    assert ended.wait(60)
    found = trainer.job(job.id)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("program", "state", "code"),
    [
        ("", "finished", 0),
        ("raise SystemExit(3)", "failed", 3),
        ("raise SystemExit(10)", "refused", 10),
        ("raise SystemExit(143)", "interrupted", 143),
        ("import os; os.kill(os.getpid(), 9)", "failed", 137),
    ],
)
def test_a_job_says_how_it_ended_and_is_remembered(
    make: Make, store: Store, program: str, state: str, code: int
) -> None:
    job = run(make(program))
    assert (job.why, job.state, job.exit_code) == ("a test", state, code)
    assert job.ended_at is not None
    again = Trainer([], store, serves=lambda: False)
    assert again.jobs() == [job]
    assert again.job("../../etc/passwd") is None
    assert again.job("none") is None


def test_the_reason_and_the_version_come_from_what_the_training_wrote(make: Make, store: Store) -> None:
    said = '{"phase": "finished", "version": "one", "decision": "better"}'
    job = run(make(f"open({str(store.status_file)!r}, 'w').write({said!r})"))
    assert (job.version, job.said) == ("one", "better")


def test_a_program_that_cannot_be_started_is_a_failed_job(store: Store) -> None:
    job = run(Trainer([str(store.root / "none")], store, serves=lambda: False))
    assert job.state == "failed"
    assert "could not be started" in str(job.said)


def test_the_newest_comes_first_also_of_those_of_one_second(make: Make) -> None:
    trainer = make("")
    ids = [run(trainer).id for _ in range(6)]
    assert [job.id for job in trainer.jobs()] == ids[::-1]


def test_a_job_that_cannot_be_recorded_is_listed_while_it_runs_and_after(make: Make, store: Store) -> None:
    (store.root / "jobs").write_text("no folder")
    trainer = make(SLEEP)
    job = trainer.start("a full disk")
    assert trainer.jobs() == [job]
    trainer.close()
    [ended] = trainer.jobs()
    assert (ended.id, ended.state) == (job.id, "interrupted")


def test_one_at_a_time_and_none_after_the_end(make: Make) -> None:
    trainer = make(SLEEP)
    job = trainer.start("first")
    assert trainer.running == job
    with pytest.raises(BusyError):
        trainer.start("second")
    trainer.close()
    assert trainer.running is None
    with pytest.raises(BusyError, match="about to end"):
        trainer.start("third")


def test_a_training_is_told_once_however_often_its_server_is(make: Make, tmp_path: Path) -> None:
    note, go, ready = tmp_path / "note", tmp_path / "go", tmp_path / "ready"
    counting = f"""
import signal, time
from pathlib import Path
told = []
def note(number, frame):
    told.append(number)
    Path({str(note)!r}).write_text(str(len(told)))
Path({str(note)!r}).write_text("0")
signal.signal(signal.SIGTERM, note)
Path({str(ready)!r}).touch()  # after the note: a signal in the midst of writing it would be written over
while not Path({str(go)!r}).exists():
    time.sleep(0.01)
"""
    trainer = make(counting)
    trainer.start("a test")
    wait_until(ready.exists)
    trainer.interrupt()
    wait_until(lambda: note.read_text() == "1")
    for _ in range(3):
        trainer.interrupt()
    closing = threading.Thread(target=trainer.close)
    closing.start()
    assert trainer.running is not None
    go.touch()
    closing.join()
    assert note.read_text() == "1"


@pytest.mark.parametrize("end", [Trainer.close, Trainer.kill])
def test_a_training_that_does_not_end_is_killed_in_time_or_at_once(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: Callable[[Trainer], None]
) -> None:
    monkeypatch.setattr("tuneserve.lifecycle.trainer.SAVE_S", 0.1)
    deaf = (
        f"import signal, time; signal.signal(15, signal.SIG_IGN); open({str(tmp_path / 'deaf')!r}, 'w'); time.sleep(60)"
    )
    trainer = make(deaf)
    job = trainer.start("a test")
    wait_until((tmp_path / "deaf").exists)
    end(trainer)
    wait_until(lambda: trainer.running is None)
    found = trainer.job(job.id)
    assert found is not None
    assert found.exit_code == 128 + signal.SIGKILL


def test_progress_is_that_of_the_running_training_alone(make: Make, store: Store) -> None:
    store.status_file.write_text('{"phase": "finished", "version": "old"}')
    trainer = make(SLEEP)
    assert trainer.progress() == {}
    trainer.start("a test")
    assert trainer.progress() == {"phase": "preparing"}
    wait_until(lambda: not store.status_file.exists())  # the training begins by removing what is of the one before
    store.status_file.write_text('{"phase": "training", "pid": 7, "epoch": 2}')
    assert trainer.progress() == {"phase": "training", "epoch": 2}
    store.status_file.write_text("{")
    assert trainer.progress() == {"phase": "preparing"}


@pytest.mark.parametrize("serves", [True, False])
def test_a_training_runs_in_the_background_only_where_a_model_answers(make: Make, serves: bool) -> None:
    assert run(
        make("import sys; raise SystemExit(3 if '--background' in sys.argv else 0)", serves=serves)
    ).exit_code == (3 if serves else 0)


@pytest.mark.parametrize(
    ("variables", "policy", "nice", "threads", "gpu"),
    [
        ({"RETRAIN_NICE": "", "OMP_NUM_THREADS": "6"}, os.SCHED_IDLE, 0, 3, "0.5"),
        ({"RETRAIN_NICE": "7", "RETRAIN_THREADS": "5", "RETRAIN_GPU_FRACTION": "0.2"}, os.SCHED_OTHER, 7, 5, "0.2"),
    ],
)
def test_a_background_training_takes_what_it_is_told_to(
    python: Python, variables: dict[str, str], policy: int, nice: int, threads: int, gpu: str
) -> None:
    ask = (
        "import os; from tuneserve.settings import Settings; from tuneserve.hardware import run_in_background; "
        "settings = run_in_background(Settings.from_environ(os.environ)); "
        "print(os.sched_getscheduler(0), os.nice(0), settings.omp_num_threads, os.environ['PYTORCH_CUDA_ALLOC_CONF'])"
    )
    done = python("-c", ask, **variables)
    wanted = f"{policy} {nice + os.nice(0)} {threads} per_process_memory_fraction:{gpu}"
    assert done.stdout.strip() == wanted, done.stderr


def test_no_training_starts_for_a_store_whose_versions_are_gone(make: Make, store: Store) -> None:
    shutil.rmtree(store.root)
    job = run(make("", serves=True))
    assert job.state == "failed"
    assert "no longer holds the versions" in str(job.said)
    assert not store.root.exists()


def test_a_training_whose_store_goes_while_it_starts_says_so(make: Make, store: Store) -> None:
    gone = f"import shutil; shutil.rmtree({str(store.versions_folder)!r}); raise SystemExit(6)"
    job = run(make(gone, serves=True))
    assert (job.state, job.exit_code) == ("failed", 6)
    assert "no longer holds the versions" in str(job.said)


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    child = "import sys, time; from tuneserve.signals import end_with_parent; end_with_parent(); print(1, flush=True)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child + '; time.sleep(60)'!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, env=ENVIRONMENT)
    assert process.stdout is not None
    process.stdout.readline()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_until(lambda: not Path(f"/proc/{children[0]}").exists())
