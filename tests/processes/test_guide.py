"""The edits and tests of docs/make-it-yours.md, taken from its text: each is applied, tested and trained with."""

import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors import safe_open
from tree import Python, Tree, copy_project, trained_ids

from tuneserve.settings import PROJECT

GUIDE = (PROJECT / "docs" / "make-it-yours.md").read_text(encoding="utf-8")
STEP = re.compile(
    r"^```text\n\+\+\+ (?P<file>\S+)\n(?P<edit>.*?)^```\n\n^```python\n(?P<test>.*?)^```$", re.MULTILINE | re.DOTALL
)
COMMAND = re.compile(r"^<!-- needs the edits of this page -->\n```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = " https://a"


@dataclass(frozen=True)
class Step:
    """An edit of one file, as lines with `-`, `+` or a space before them and `@@` between hunks, and its test."""

    file: str
    edit: str
    test: str

    def apply(self, package: Path) -> None:
        code = (package / self.file).read_text(encoding="utf-8")
        for hunk in self.edit.split("@@\n"):
            lines = hunk.splitlines(keepends=True)
            old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
            assert code.count(old) == 1, (self.file, old)
            code = code.replace(old, new)
        (package / self.file).write_text(code, encoding="utf-8")


STEPS = {found["file"]: Step(**found.groupdict()) for found in STEP.finditer(GUIDE)}


def metadata(version: Path) -> dict[str, Any]:
    return json.loads((version / "metadata.json").read_text(encoding="utf-8"))


def weights_of(version: Path) -> set[str]:
    with safe_open(version / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_every_edit_of_the_guide_is_one_that_is_found_here() -> None:
    assert list(STEPS) == ["text.py", "training/evaluation.py", "training/model.py", "network/head.py"]
    assert GUIDE.count("\n+++ ") == len(STEPS)


@pytest.fixture
def tree(tmp_path: Path, python: Python) -> Tree:
    """A tiny job whose texts have links."""
    tree = Tree(tmp_path, python)
    for number, name in enumerate(("train", "valid", "test")):
        rows = [(text + LINK, label) for text, label in tiny.sentences(80, first=80 * number)]
        tiny.write_csv(tree.texts / f"{name}.csv", rows)
    return tree


def test_each_edit_of_the_guide_counts_in_a_training(tree: Tree) -> None:
    package = tree.folder / "tuneserve"

    def train(file: str = "") -> tuple[Path, set[Path]]:
        """The version and the cached tokens that come of one edit, or of none."""
        before = (package / file).read_text(encoding="utf-8") if file else ""
        if file:
            STEPS[file].apply(package)
        [version], tokens = tree.train()
        if file:
            (package / file).write_text(before, encoding="utf-8")
        return version, tokens

    plain, tokens = train()
    before = trained_ids(tokens)

    _, tokens = train("text.py")
    after = trained_ids(tokens)
    words = len(re.findall(r"\w+|[^\w\s]+", LINK))  # as the tiny tokenizer splits it
    assert sum(map(len, after)) == sum(map(len, before)) - len(before) * (words - 1)

    version, tokens = train("training/evaluation.py")
    assert not tokens
    for split in ("valid", "test"):
        assert metadata(version)["metrics"][split]["top3_accuracy"] == 1.0  # of two labels
        assert "top3_accuracy" not in metadata(plain)["metrics"][split]

    version, _ = train("training/model.py")
    focal, usual = (metadata(one)["history"][0]["train_loss"] for one in (version, plain))
    assert 0 < focal < usual

    version, _ = train("network/head.py")
    added = weights_of(version) - weights_of(plain)
    assert added == {f"classifier.{n}.{name}" for n in (0, 2) for name in ("weight", "bias")}


def test_the_commands_of_the_guide_work_once_its_edits_are_made(tree: Tree, tmp_path: Path) -> None:
    clone = copy_project(tmp_path / "clone")
    own = clone / "tests" / "test_mine.py"
    own.write_text("\n\n".join(step.test for step in STEPS.values()), encoding="utf-8")
    test, short_run = COMMAND.findall(GUIDE)
    said = shell(".venv/bin/pytest --quiet tests/test_mine.py", clone)
    assert re.search(r"^4 failed in ", said.stdout, re.MULTILINE), said.stdout  # each without its edit

    for step in STEPS.values():
        step.apply(clone / "production" / "docker-res" / "tuneserve")
    said = shell(test, clone)
    assert said.returncode == 0, said.stdout + said.stderr

    small = {name: tree.environment[name] for name in ("DATASET", "BASE_MODEL", "NUM_MAX_POSITIONS", "OMP_NUM_THREADS")}
    said = shell(short_run.replace("/tmp/mine", str(tmp_path / "mine")), clone, **small, **tiny.paths(tmp_path / "own"))
    assert said.returncode == 0, said.stdout + said.stderr
    [version] = (tmp_path / "mine" / "versions").iterdir()
    assert "top3_accuracy" in metadata(version)["metrics"]["test"]
    assert "classifier.2.weight" in weights_of(version)


def shell(code: str, clone: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "-ec", code], cwd=clone, env=os.environ | variables, capture_output=True, text=True, check=False
    )
