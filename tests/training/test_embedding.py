"""An embedding model: imported, exported, and answering as transformers does by itself."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from fastapi.testclient import TestClient
from transformers import AutoModel, AutoTokenizer
from wire import wait_until

import tuneserve
from tuneserve.artifact import Version, describe_files
from tuneserve.errors import BaseModelError, DataError, StoreError, TextError
from tuneserve.files import write_json
from tuneserve.lifecycle.store import Store
from tuneserve.report.writing import write_report
from tuneserve.serving.application import Application
from tuneserve.settings import Settings
from tuneserve.tasks.embedder import Embedding
from tuneserve.training import job
from tuneserve.training.imported import bring_in

TEXTS = ["a great film", "awful food and not very warm", " two <br /> three ", "film " * 40]
LIMIT = 24


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder in sentence-transformers' layout; its weights are large enough for every text to be another."""
    folder = tiny.make_base_model(tmp_path_factory.mktemp("encoder"), initializer_range=0.5)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": LIMIT})
    return folder


def pool(folder: Path, how: dict[str, Any], *kinds: str) -> None:
    types = ["Transformer", "Pooling", *kinds]
    paths = ["", *(f"{number}_{kind}" for number, kind in enumerate(types[1:], 1))]
    modules = [
        {"idx": index, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(zip(paths, types, strict=True))
    ]
    write_json(folder / "modules.json", modules)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **how})


def settings(environment: dict[str, str], **changed: str) -> Settings:
    usual = {name: value for name, value in environment.items() if name != "NUM_MAX_POSITIONS"}
    return Settings.from_environ(usual | {"TASK": "feature-extraction"} | changed)


def by_transformers(folder: Path, *, first: bool = False) -> Any:
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        [text.strip() for text in TEXTS], padding=True, truncation=True, max_length=LIMIT, return_tensors="pt"
    )
    with torch.inference_mode():
        states, mask = model(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
        return (states[:, 0] if first else (states * mask).sum(1) / mask.sum(1)).numpy()


def describe_again(version: Version) -> None:
    """Let the metadata say that the files are as they were saved."""
    (version.folder / "metadata.json").unlink()
    write_json(version.folder / "metadata.json", version.metadata | describe_files(version.folder))


def vectors(answers: Any) -> Any:
    assert all(isinstance(one, Embedding) for one in answers)
    return np.array([one.vector for one in answers])


@pytest.mark.parametrize("engine", ["graph", "torch"])
@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token"])
@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_its_vectors_are_those_of_transformers(
    environment: dict[str, str], encoder: Path, tmp_path: Path, kind: str, pooling: str, engine: str
) -> None:
    folder = tiny.make_base_model(tmp_path / "encoder", kind, initializer_range=0.5)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": LIMIT})
    pool(folder, {f"pooling_mode_{pooling}": True, "pooling_mode_max_tokens": False}, "Normalize")
    version = bring_in(str(folder), settings(environment), threads=1)
    assert version.metadata["engine"]["layout"] == ("packed" if kind == "bert" else "padded")
    if engine == "torch":
        (version.folder / "engine" / "engine.json").unlink()
        describe_again(version)
    model = tuneserve.load(version.folder, precision="fp32", device="cpu")
    found = model.predict(TEXTS)
    wanted = by_transformers(folder, first=pooling == "cls_token")
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    assert vectors(found) == pytest.approx(wanted, abs=1e-5)
    assert [one.truncated for one in found] == [False, False, False, True]
    model.close()


def test_how_many_tokens_are_read_is_the_models_to_say_and_the_variables_to_change(
    environment: dict[str, str], encoder: Path, tmp_path: Path
) -> None:
    assert bring_in(str(encoder), settings(environment), threads=1).max_tokens == LIMIT
    assert bring_in(str(encoder), settings(environment, NUM_MAX_POSITIONS="16"), threads=1).max_tokens == 16
    silent = tiny.make_base_model(tmp_path / "silent")
    assert bring_in(str(silent), settings(environment), threads=1).max_tokens == 64


def test_an_import_tries_no_report_and_one_that_is_asked_for_is_refused(
    environment: dict[str, str], encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(job, "write_report", lambda *about: tried.append(about))
    version = bring_in(str(encoder), settings(environment, REPORT="1"), threads=1)
    assert tried == []
    with pytest.raises(StoreError, match="it is for TASK=feature-extraction"):
        write_report(Store(Path(environment["MODEL_PATH"])), version, settings(environment))
    assert not list(version.folder.glob("report/*"))


def test_it_is_imported_once_and_the_newest_is_the_champion(
    environment: dict[str, str], encoder: Path, tmp_path: Path
) -> None:
    first = bring_in(str(encoder), settings(environment), threads=1)
    store = Store(Path(environment["MODEL_PATH"]))
    assert bring_in(str(encoder), settings(environment), threads=1).id == first.id == store.champion().id
    other = bring_in(str(tiny.make_base_model(tmp_path / "other")), settings(environment), threads=1)
    assert store.champion().id == other.id != first.id
    assert "nothing tests it" in store.table()


@pytest.mark.parametrize(
    ("pooling", "kinds", "words"),
    [
        ({"pooling_mode_max_tokens": True}, [], "max_tokens"),
        ({"pooling_mode": "lasttoken"}, [], "lasttoken"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, [], "mean_tokens"),
        ({"pooling_mode_mean_tokens": True}, ["Dense"], "Dense"),
    ],
)
def test_what_would_be_other_vectors_is_refused(
    environment: dict[str, str], tmp_path: Path, pooling: dict[str, Any], kinds: list[str], words: str
) -> None:
    folder = tiny.make_base_model(tmp_path / "encoder")
    pool(folder, pooling, *kinds)
    with pytest.raises(BaseModelError, match=words):
        bring_in(str(folder), settings(environment), threads=1)


def test_a_folder_that_is_not_there_and_one_without_weights_are_refused(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(BaseModelError, match="MODEL=/nowhere"):
        bring_in("/nowhere", settings(environment), threads=1)
    folder = tiny.make_base_model(tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(BaseModelError, match="has no weights"):
        bring_in(str(folder), settings(environment), threads=1)


def test_a_store_of_classifiers_takes_none(environment: dict[str, str], encoder: Path, store: Path) -> None:
    with pytest.raises(DataError, match="another MODEL_PATH"):
        bring_in(str(encoder), settings(environment | {"MODEL_PATH": str(store)}), threads=1)


def test_weights_that_changed_do_not_serve(environment: dict[str, str], encoder: Path) -> None:
    version = bring_in(str(encoder), settings(environment), threads=1)
    pairs = json.loads((version.folder / "golden.json").read_text())
    pairs[1]["vector"] = pairs[0]["vector"]
    write_json(version.folder / "golden.json", pairs)
    describe_again(version)
    with pytest.raises(StoreError, match="does not answer as it did"):
        tuneserve.load(version.folder)


@pytest.fixture
def client(environment: dict[str, str], encoder: Path) -> Iterator[TestClient]:
    chosen = settings(environment, PRECISION="fp32")
    bring_in(str(encoder), chosen, threads=1)
    with TestClient(Application(chosen, threads=1).asgi) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        yield client


def test_one_text_or_several_are_embedded_over_http(client: TestClient, encoder: Path) -> None:
    answer = client.post("/embed", json={"inputs": TEXTS})
    found = np.array(answer.json())
    assert found.shape == (4, 32)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-6)
    assert answer.headers["X-Truncated"] == "3"
    assert answer.headers["X-Model-Version"] == client.get("/model").json()["version"]
    one = client.post("/embed/", json={"inputs": TEXTS[0]})
    assert one.json() == [pytest.approx(found[0], abs=1e-6)]
    assert "X-Truncated" not in one.headers
    raw = client.post("/embed", json={"inputs": TEXTS, "normalize": False}).json()
    assert np.array(raw) == pytest.approx(by_transformers(encoder), abs=1e-4)


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"inputs": []}, ["body", "inputs"], "at least 1"),
        ({"inputs": 7}, ["body", "inputs"], "array"),
        ({"inputs": ["film", 7]}, ["body", "inputs", 1], "string"),
        ({"inputs": ["film", " "]}, ["body", "inputs", 1], "empty"),
        ({"inputs": ["film", "film " * 40], "truncate": False}, ["body", "inputs", 1], "longer than the 24 tokens"),
        ({"inputs": "film", "normalize": 3}, ["body", "normalize"], "boolean"),
        ({}, ["body", "inputs"], "required"),
    ],
)
def test_bad_input_is_422_with_the_field_named(
    client: TestClient, body: dict[str, Any], field: list[Any], words: str
) -> None:
    answer = client.post("/embed", json=body)
    assert answer.status_code == 422
    [fault] = answer.json()["detail"]
    assert fault["loc"] == field
    assert words in fault["msg"]


def test_there_is_nothing_about_labels_where_answers_are_none(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert "/embed" in paths
    assert not [path for path in paths if path.startswith(("/inference", "/feedback", "/drift"))]


def test_a_text_error_is_that_texts_alone_in_python(environment: dict[str, str], encoder: Path) -> None:
    version = bring_in(str(encoder), settings(environment), threads=1)
    model = tuneserve.load(version.folder)
    good, bad = model.predict(["film", ""])
    assert isinstance(good, Embedding)
    assert isinstance(bad, TextError)
    assert good.agrees_with(model.predict(["film"])[0])
    assert not good.agrees_with(model.predict(["awful cold food"])[0])
    model.close()
