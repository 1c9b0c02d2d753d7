"""Copies of the project to edit, and whole trainings with them."""

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tiny
from forked import fork, run_job

from tuneserve.settings import PROJECT

Python = Callable[..., "subprocess.CompletedProcess[str]"]
READ_LIKE_A_SERVER = """
import csv, json, sys
from pathlib import Path
from tuneserve.text import TextEncoder

version, data = map(Path, sys.argv[1:])
texts = []
for path in data.iterdir():
    with path.open() as file:
        texts += [row["text"] for row in csv.DictReader(file)]
settings = json.loads((version / "metadata.json").read_text())["settings"]
encoder = TextEncoder.from_folder(version, max_tokens=settings["num_max_positions"])
print(json.dumps([one.ids for one in encoder.encode(texts)]))
"""


def copy_project(folder: Path) -> Path:
    """Copy the project's files into an empty folder; only the libraries are not installed again."""
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in files.stdout.splitlines():
        if (PROJECT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, folder / name)
    for requirements in folder.rglob("requirements*.txt"):
        os.utime(requirements, (0, 0))  # older than the installation, or make would repeat it
    (folder / ".venv").symlink_to(PROJECT / ".venv")
    return folder


class Tree:
    """A copy of what goes into the image, to edit and to run."""

    def __init__(self, folder: Path, python: Python) -> None:
        self.folder, self.python = folder / "docker-res", python
        shutil.copytree(
            PROJECT / "production" / "docker-res", self.folder, ignore=shutil.ignore_patterns("__pycache__")
        )
        self.models, self.data, self.log = folder / "MODEL", folder / "DATA", folder / "log"
        self.texts = folder / "texts"
        for first, name in enumerate(("train", "valid", "test")):  # split by hand: cleaning does not move a text
            tiny.write_csv(self.texts / f"{name}.csv", tiny.sentences(80, first=80 * first))
        self.environment = {
            **tiny.RECIPE,
            **tiny.paths(folder),
            "PYTHONPATH": str(self.folder),
            "DATASET": str(self.texts),
            "BASE_MODEL": str(tiny.make_base_model(folder / "base")),
            "N_EPOCHS": "1",
            "MAX_ACCURACY_DROP": "1",
            "MAX_LATENCY_INCREASE": "100",
            "DEVICE": "cpu",
            "PRECISION": "fp32",
        }

    def edit(self, name: str, old: str, new: str) -> None:
        path = self.folder / "tuneserve" / name
        code = path.read_text()
        assert code.count(old) == 1, (name, old)
        path.write_text(code.replace(old, new))

    def train(self) -> tuple[set[Path], set[Path]]:
        """The versions and the cached tokens that this run has made."""
        before = self.made()
        process = fork(run_job, self.environment, self.log, self.folder, anew=True)
        process.join()
        said = self.log.read_text()
        assert process.exitcode == 0, said
        versions, tokens = (now - old for now, old in zip(self.made(), before, strict=True))
        assert ("nothing to train" in said) == (not versions)
        return versions, tokens

    def made(self) -> tuple[set[Path], set[Path]]:
        return set(self.models.glob("versions/*")), set(self.data.glob("tokens/*"))

    def served_ids(self, version: Path) -> list[list[int]]:
        done = self.python("-c", READ_LIKE_A_SERVER, version, self.texts, **self.environment)
        assert done.returncode == 0, done.stderr
        return sorted(json.loads(done.stdout))


def trained_ids(tokens: set[Path]) -> list[list[int]]:
    found = []
    for folder in tokens:
        ids, starts = np.fromfile(folder / "ids.i32", dtype=np.int32), np.load(folder / "starts.npy")
        found += [ids[begin:end].tolist() for begin, end in itertools.pairwise(starts)]
    return sorted(found)
