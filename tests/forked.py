"""What a process does that is forked from one in which the libraries are loaded; it must be importable by its name."""

import importlib
import os
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
