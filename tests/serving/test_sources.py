"""What a folder is that a server of many models is given; the import is another program here."""

import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tuneserve.artifact import Version
from tuneserve.errors import ArchiveError, BaseModelError, HandlerError, NotFoundError, StoreError
from tuneserve.hardware import memory_used
from tuneserve.serving.sources import PROCESS, Sources
from tuneserve.settings import Settings
from tuneserve.tasks.handler import Invocation

IMPORT = """
import json, os, pathlib, shutil, sys
root, task = pathlib.Path(os.environ["MODEL_PATH"]), os.environ["TASK"]
assert not {"MODEL", "MODELS"} & set(os.environ) and sys.argv[2] == "--child"
with open(os.environ["TOLD"], "a") as file:
    file.write(task + "\\n")
root.mkdir(parents=True)
if task == "feature-extraction":
    (root / "training.json").write_text(json.dumps({"phase": "failed", "reason": "it is no encoder"}))
    sys.exit(4)
shutil.copytree(os.environ["VERSION"], root / "versions" / "imported")
(root / "champion").write_text("imported")
"""


@pytest.fixture
def make(version: Version, tmp_path: Path) -> Any:
    (tmp_path / "import.py").write_text(IMPORT)
    (tmp_path / "models").mkdir()

    def make(**variables: str) -> Sources:
        places = {"MODELS": str(tmp_path / "models"), "DATA_PATH": str(tmp_path / "data")}
        environ = places | {"TOLD": str(tmp_path / "told"), "VERSION": str(version.folder), "MODEL": "x"}
        settings = Settings.from_environ(places | variables)
        command = [sys.executable, str(tmp_path / "import.py")]
        return Sources(settings, threads=1, importing=command, environ=environ)

    return make


def model(folder: Path, architecture: str | None, weights: bytes = b"weights") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]} if architecture else {}))
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_a_version_is_opened_as_it_is(make: Any, version: Version) -> None:
    assert make().prepare(version.folder) == version.folder


def test_a_hugging_face_model_is_imported_once_by_its_content(make: Any, tmp_path: Path) -> None:
    one = model(tmp_path / "one", "BertForSequenceClassification")
    shutil.copytree(one, tmp_path / "two")
    folders = [make().prepare(one), make().prepare(tmp_path / "two")]
    assert folders[0] == folders[1]
    assert folders[0].name == "imported"
    (one / "model.safetensors").write_bytes(b"others, as many")
    sources = make()
    assert sources.prepare(one) != folders[0]
    assert (tmp_path / "told").read_text().split() == ["text-classification"] * 2


@pytest.mark.parametrize(
    ("architecture", "variables", "words"),
    [
        ("BertModel", {}, "'BertModel', which does not say what it is for; this server knows text-classification, "),
        (None, {}, "the architecture ''"),
        ("BertForMaskedLM", {}, "TASK says which is meant"),
        ("BertModel", {"TASK": "feature-extraction"}, "it is no encoder"),
        ("BertModel", {"HF_TASK": "feature-extraction"}, "it is no encoder"),
        ("BertModel", {"TASK": "feature-extraction", "HF_TASK": "text-classification"}, "it is no encoder"),
    ],
)
def test_a_model_whose_task_is_not_known_or_does_not_fit_says_so(
    make: Any, tmp_path: Path, architecture: str | None, variables: dict[str, str], words: str
) -> None:
    with pytest.raises(BaseModelError) as caught:
        make(**variables).prepare(model(tmp_path / "m", architecture))
    assert words in str(caught.value)


def test_what_is_no_model_is_refused(make: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match=r"neither metadata\.json nor config\.json nor code/inference\.py"):
        make().prepare(tmp_path / "empty")
    with pytest.raises(NotFoundError, match="There is no folder"):
        make().prepare(tmp_path / "nowhere")


def test_names_are_those_in_the_folder_and_lead_nowhere_else(make: Any, tmp_path: Path) -> None:
    (tmp_path / "models" / "one").mkdir()
    for name in ("two.tar.gz", "notes.txt"):
        (tmp_path / "models" / name).write_bytes(b"")
    sources = make()
    found = [sources.find(name).name for name in ("one", "two", "two.tar.gz")]
    assert found == ["one", "two.tar.gz", "two.tar.gz"]
    for name in ("", ".", "..", "../models/one", "one/", "three", "notes.txt", "a\0b", "x" * 5000):
        with pytest.raises(NotFoundError):
            sources.find(name)
    with pytest.raises(ArchiveError, match=r"two\.tar\.gz"):
        sources.prepare(tmp_path / "models" / "two.tar.gz")


def test_an_archive_is_unpacked_once_and_what_is_in_it_is_a_model_as_any_other(make: Any, tmp_path: Path) -> None:
    one = model(tmp_path / "one", "BertForSequenceClassification")
    with tarfile.open(tmp_path / "one.tar.gz", "w:gz") as archive:
        archive.add(one, ".")
    sources = make()
    assert sources.prepare(tmp_path / "one.tar.gz") == sources.prepare(one)
    assert len(list((tmp_path / "data" / "unpacked").iterdir())) == 1
    shutil.rmtree(one)
    (tmp_path / "one.tar.gz").rename(tmp_path / "two.tar.gz")
    assert sources.prepare(tmp_path / "two.tar.gz").name == "imported"


def test_a_model_with_code_answers_by_it_and_one_that_cannot_be_loaded_says_why(make: Any, tmp_path: Path) -> None:
    (tmp_path / "echo" / "code").mkdir(parents=True)
    program = tmp_path / "echo" / "code" / "inference.py"
    program.write_text(
        "def model_fn(folder): return 5\ndef transform_fn(model, data, kind, accept): return data * model"
    )
    sources = make()
    assert sources.size(tmp_path / "echo") == len(program.read_bytes()) + PROCESS
    before = memory_used()
    handler = sources.open(sources.prepare(tmp_path / "echo"), "echo")
    assert memory_used() - before > PROCESS / 2
    [answer] = handler.predict([Invocation(b"ab", "text/plain")])
    assert (handler.id, answer.body) == ("echo", b"ababababab")
    handler.close()
    program.write_text("raise KeyError('weights')")
    with pytest.raises(HandlerError, match="weights"):
        sources.open(tmp_path / "echo", "echo")
