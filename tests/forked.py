"""What a process does that is forked from one in which the libraries are loaded; it must be importable by its name."""

import importlib
import os
import re
import signal
import sys
from pathlib import Path

from tuneserve.settings import PROJECT


def run_job(
    environment: dict[str, str], log: Path, folder: Path = PROJECT / "production" / "docker-res", *, anew: bool = False
) -> None:
    """What `run.py train` does, in a process whose libraries are loaded already; perhaps with the package anew."""
    if anew:
        for name in [name for name in sys.modules if name.partition(".")[0] == "tuneserve"]:
            del sys.modules[name]
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    sys.path.insert(0, str(folder))
    run = importlib.import_module("run")
    sys.exit(run.main(["train"]))


def run_job_until(environment: dict[str, str], log: Path, name: str) -> None:
    """`run_job`, killed before it renames anything in the store to what this pattern matches, from the store's root."""

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.rename" and re.fullmatch(f"{re.escape(environment['MODEL_PATH'])}/{name}", str(arguments[1])):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    run_job(environment, log)
