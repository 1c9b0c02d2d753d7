"""What a process does that is forked from one in which the libraries are loaded; it must be importable by its name."""

import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tuneserve.settings import PROJECT

FOLDER = PROJECT / "production" / "docker-res"


def fork(target: Callable[..., None], *arguments: Any, **options: Any) -> ForkServerProcess:
    """Start a process, forked from one that has loaded the libraries and done nothing with them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preload"])
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    # Python 3.11 does not give that process this one's sys.path, and passes over what it cannot import in silence.
    os.environ.update(PYTHONPATH=f"{FOLDER}:{Path(__file__).parent}", OMP_NUM_THREADS="1")
    multiprocessing.forkserver.ensure_running()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    process = context.Process(target=target, args=arguments, kwargs=options)
    process.start()
    return process


def run_job(environment: dict[str, str], log: Path, folder: Path = FOLDER, *, anew: bool = False) -> None:
    """What `run.py train` does, in a process whose libraries are loaded already; perhaps with the package anew."""
    if anew:
        for name in [name for name in sys.modules if name.partition(".")[0] == "tuneserve"]:
            del sys.modules[name]
    sys.exit(_load_run(environment, log, folder).main(["train"]))


def _load_run(environment: dict[str, str], log: Path, folder: Path = FOLDER) -> Any:
    """The module `run`, for a process whose output goes to a file."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    tempfile.tempdir = None  # it may have been asked for before this environment came
    multiprocessing.set_start_method("fork", force=True)  # as in a process that nobody forked
    sys.path.insert(0, str(folder))
    return importlib.import_module("run")


def run_job_until(environment: dict[str, str], log: Path, name: str) -> None:
    """`run_job`, killed before it renames anything in the store to what this pattern matches, from the store's root."""
    _act_at(Path(environment["MODEL_PATH"]), name, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))
    run_job(environment, log)


def _act_at(root: Path, name: str, time: int, act: Callable[[], None]) -> None:
    """Act before something is renamed to this name, a pattern from the store's root, or a folder of it is removed."""
    seen = []

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("os.rename", "shutil.rmtree"):
            path = str(arguments[1 if event == "os.rename" else 0])
            if re.fullmatch(f"{re.escape(str(root))}/{name}", path):
                seen.append(path)
                if len(seen) == time:
                    act()

    sys.addaudithook(watch)


def run_loop(environment: dict[str, str], log: Path, point: tuple[str, int, str, int] | None) -> None:
    """What `run.py` does, in a group of its own. Its first training is forked here, where there are no threads yet.

    Args:
        environment: of the run.
        log: where the output goes.
        point: where that training sends a signal: the name and how often it was seen (`_act_at`), to whom, and which.
    """
    os.setpgrp()
    run = _load_run(environment, log)
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.close(writing)
        if not (arguments := os.read(reading, 1000).decode()):
            os._exit(128 + signal.SIGTERM)  # the server died before it trained
        if point is not None:
            name, time_, victim, number = point
            send = {
                "child": lambda: os.kill(os.getpid(), number),
                "server": lambda: os.kill(os.getppid(), number),
                "group": lambda: os.killpg(0, number),
            }[victim]
            _act_at(Path(environment["MODEL_PATH"]), name, time_, send)
        sys.exit(run.main(arguments.split()))
    os.close(reading)
    trainer = importlib.import_module("tuneserve.lifecycle.trainer")
    waiting = [Forked(child, writing)]

    def start(command: Sequence[str], **how: Any) -> Any:
        return waiting.pop().go(command) if waiting else subprocess.Popen(command, **how)

    trainer.subprocess = SimpleNamespace(Popen=start)  # type: ignore[attr-defined]
    sys.exit(run.main([]))


class Forked:
    """A child that waits for its arguments, as much of a `subprocess.Popen` as the trainer uses."""

    def __init__(self, pid: int, told: int) -> None:
        self.pid, self._told, self._code, self._looks = pid, told, None, threading.Lock()

    def go(self, command: Sequence[str]) -> "Forked":
        os.write(self._told, " ".join(command[2:]).encode())
        return self

    def poll(self) -> int | None:
        with self._looks:
            if self._code is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
                self._code = os.waitstatus_to_exitcode(found[1])
        return self._code

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
