"""`from tuneserve import load`: a version in Python, in a process of its own as a notebook's is."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import tuneserve
from tuneserve.errors import NoModelError, StoreError, TextError
from tuneserve.settings import PROJECT

Python = Callable[..., "subprocess.CompletedProcess[str]"]

ASK = """
import json, sys
from tuneserve import load
model = load(sys.argv[1])
answers = model.predict(["a great film", " ", "awful food"])
print(json.dumps([model.id, model.labels, [getattr(one, "label", str(one)) for one in answers]]))
print("torch" in sys.modules, file=sys.stderr)
"""


def test_a_store_and_a_version_are_loaded_in_two_lines_without_torch(python: Python, store: Path) -> None:
    champion = (store / "champion").read_text().strip()
    for folder in (store, store / "versions" / champion):
        done = python("-c", ASK, folder)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [champion, ["bad", "good"], ["good", "the text is empty", "bad"]]
        assert done.stderr.split()[-1] == "False"


def test_settings_are_given_by_name(store: Path) -> None:
    long = "a great film " * 50
    assert isinstance(tuneserve.load(store, long_text="error").predict([long])[0], TextError)
    [answer] = tuneserve.load(store, long_text="window").predict([long])
    assert not isinstance(answer, TextError)
    assert (answer.label, answer.truncated) == ("good", False)


def test_a_folder_that_holds_no_model_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(NoModelError, match="no model in"):
        tuneserve.load(tmp_path)
    (tmp_path / "metadata.json").write_text("{}")
    with pytest.raises(StoreError, match="labels: Field required"):
        tuneserve.load(tmp_path)


def test_the_snippets_of_the_documentation_run(python: Python, store: Path, tmp_path: Path) -> None:
    snippets = re.findall(r"^```python\n(.*?)^```", (PROJECT / "docs" / "scoring.md").read_text(), re.M | re.S)
    assert len(snippets) == 2
    (tmp_path / "models").symlink_to(store)
    for snippet in snippets:
        done = python("-c", f"import os; os.chdir({str(tmp_path)!r})\n{snippet}")
        assert done.returncode == 0, done.stderr
