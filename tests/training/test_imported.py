"""`run.py import`: a classifier that was fine-tuned elsewhere becomes a version, without training."""

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tuneserve
from tuneserve.errors import BaseModelError, DataError, NoModelError, StoreError
from tuneserve.lifecycle.decision import read_decision
from tuneserve.lifecycle.store import Store
from tuneserve.settings import Settings
from tuneserve.training.imported import bring_in

TEXTS = ["a great film", "awful food"]


@pytest.fixture
def foreign(store: Path, tmp_path: Path) -> Path:
    """A fine-tuned classifier as transformers saves one, and nothing else."""
    version = Store(store).champion()
    folder = tmp_path / "foreign"
    AutoModelForSequenceClassification.from_pretrained(version.folder).save_pretrained(folder)
    AutoTokenizer.from_pretrained(version.folder).save_pretrained(folder)
    return folder


def rename(folder: Path, labels: list[str]) -> None:
    config = json.loads((folder / "config.json").read_text())
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    (folder / "config.json").write_text(json.dumps(config | names))


def settings(environment: dict[str, str], **changed: str) -> Settings:
    return Settings.from_environ({"MAX_ACCURACY_DROP": "1", "MAX_LATENCY_INCREASE": "100"} | environment | changed)


def scores(folder: Path) -> list[list[float]]:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        return [row.tolist() for row in model(**batch).logits.softmax(1)]


def test_it_is_tested_published_and_answers_as_before(environment: dict[str, str], foreign: Path) -> None:
    version = bring_in(str(foreign), settings(environment), threads=1)
    store = Store(Path(environment["MODEL_PATH"]))
    assert store.champion().id == version.id
    assert version.labels == ["bad", "good"]
    assert version.metadata["imported"]
    assert version.metadata["metrics"]["test"]["accuracy"] > 0.9
    found = tuneserve.load(store.root).predict(TEXTS)
    for one, wanted in zip(found, scores(foreign), strict=True):
        assert list(one.scores.values()) == pytest.approx(wanted, abs=1e-3)
    again = bring_in(str(foreign), settings(environment), threads=1)
    assert again.id == version.id


def test_labels_in_another_order_keep_their_meaning(environment: dict[str, str], foreign: Path) -> None:
    rename(foreign, ["good", "bad"])  # what it calls good is bad
    few = {"MIN_VALID": "100"}  # nothing is held out of so few texts; it has learned from none of them
    version = bring_in(str(foreign), settings(environment | few), threads=1)
    assert version.labels == ["good", "bad"]
    assert version.metadata["metrics"]["test"]["accuracy"] < 0.1
    assert len(json.loads((version.folder / "golden.json").read_text())) == 5


def test_other_labels_than_the_datas_are_untested_and_only_first(environment: dict[str, str], foreign: Path) -> None:
    rename(foreign, ["1 star", "5 stars"])
    with pytest.raises(DataError, match="name texts with the model's labels"):
        bring_in(str(foreign), settings(environment), threads=1)
    environment = environment | {"DATASET": "sample", "NUM_TRAIN": "60", "NUM_TEST": "40"}
    version = bring_in(str(foreign), settings(environment), threads=1)
    decision = read_decision(version)
    assert decision is not None
    assert "nothing tested it" in decision.sentence
    assert version.metadata["metrics"] == {}
    root = Path(environment["MODEL_PATH"])
    assert "1 star" in tuneserve.load(root).predict(TEXTS)[0].scores
    assert version.id in Store(root).table()
    rename(foreign, ["1", "5"])
    with pytest.raises(DataError, match="name texts with the model's labels"):  # there is a champion now
        bring_in(str(foreign), settings(environment), threads=1)


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "decision.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_version_of_another_store_is_taken_over_as_it_is(environment: dict[str, str], store: Path) -> None:
    given = Store(store).champion()
    settings_here = settings(environment | {"DATASET": "/nowhere", "NUM_MAX_POSITIONS": "512"})
    version = bring_in(str(given.folder), settings_here, threads=1)
    here = Store(Path(environment["MODEL_PATH"]))
    assert here.champion().id == version.id == given.id
    assert files(version.folder) == files(given.folder)
    decision = read_decision(version)
    assert decision is not None
    assert "the store it comes from" in decision.sentence
    assert bring_in(str(given.folder), settings_here, threads=1).id == version.id
    assert len(here.versions()) == 1


def test_beside_a_champion_a_version_waits_to_be_promoted(
    environment: dict[str, str], store: Path, foreign: Path, caplog: pytest.LogCaptureFixture
) -> None:
    champion = bring_in(str(foreign), settings(environment), threads=1)
    version = bring_in(str(Store(store).champion().folder), settings(environment), threads=1)
    here = Store(Path(environment["MODEL_PATH"]))
    assert here.champion().id == champion.id
    assert read_decision(version) is None  # what the other store decided is not said here
    assert f"`run.py promote {version.id}`" in caplog.text
    assert here.promote(version.id).id == version.id


def test_a_version_that_is_damaged_or_for_another_task_is_not_taken_over(
    environment: dict[str, str], store: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(Store(store).champion().folder, tmp_path / "version")
    with pytest.raises(BaseModelError, match="is for TASK=text-classification"):
        bring_in(str(folder), settings(environment, TASK="feature-extraction"), threads=1)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match="its SHA-256 differs"):
        bring_in(str(folder), settings(environment), threads=1)
    assert Store(Path(environment["MODEL_PATH"])).champion_id() is None


def test_what_is_no_classifier_is_refused(environment: dict[str, str], tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="is no fine-tuned classifier: it has no weights"):
        bring_in(str(tiny_bert), settings(environment), threads=1)
    with pytest.raises(BaseModelError, match="there is no such folder"):
        bring_in(str(tmp_path / "none"), settings(environment), threads=1)
    one = shutil.copytree(tiny_bert, tmp_path / "one")
    tiny.make_classifier(labels=2, words=27).save_pretrained(one)
    rename(one, ["same", "same"])
    with pytest.raises(BaseModelError, match="two labels or more, all different"):
        bring_in(str(one), settings(environment), threads=1)


def test_a_model_in_the_place_of_a_store_says_how_it_is_served(foreign: Path) -> None:
    with pytest.raises(NoModelError, match=f"run.py import {foreign}"):
        Store(foreign).champion()


def as_pickle(folder: Path, content: object, *, parts: int = 1) -> Path:
    """The folder with weights as people saved them before safetensors."""
    (folder / "model.safetensors").unlink()
    names = ["pytorch_model.bin"] if parts == 1 else [f"pytorch_model-{part}-of-{parts}.bin" for part in range(parts)]
    for part, name in enumerate(names):
        one = dict(list(content.items())[part::parts]) if isinstance(content, dict) else content
        torch.save(one, folder / name)
    return folder


@pytest.mark.parametrize("parts", [1, 2])
def test_weights_in_a_pickle_are_read_as_tensors(environment: dict[str, str], foreign: Path, parts: int) -> None:
    wanted = scores(foreign)
    as_pickle(foreign, AutoModelForSequenceClassification.from_pretrained(foreign).state_dict(), parts=parts)
    version = bring_in(str(foreign), settings(environment), threads=1)
    found = tuneserve.load(Path(environment["MODEL_PATH"])).predict(TEXTS)
    for one, row in zip(found, wanted, strict=True):
        assert list(one.scores.values()) == pytest.approx(row, abs=1e-3)
    assert not list(version.folder.glob("*.bin"))
    assert bring_in(str(foreign), settings(environment), threads=1).id == version.id


class Malice:
    """What runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("kind", ["alone", "among tensors", "no tensors", "damaged"])
@pytest.mark.parametrize("task", ["text-classification", "feature-extraction"])
def test_a_pickle_that_holds_more_than_tensors_runs_nothing(
    environment: dict[str, str], foreign: Path, tmp_path: Path, kind: str, task: str
) -> None:
    marker = tmp_path / "ran"
    contents = {
        "alone": Malice(marker),
        "among tensors": {"a": torch.ones(2), "b": Malice(marker)},
        "no tensors": {"a": 1},
        "damaged": {},
    }
    as_pickle(foreign, contents[kind])
    if kind == "damaged":
        (foreign / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(BaseModelError, match="holds more than tensors"):
        bring_in(str(foreign), settings(environment, TASK=task), threads=1)
    assert not marker.exists()
    assert not any((Path(environment["DATA_PATH"]) / "unpickled").glob("*"))
