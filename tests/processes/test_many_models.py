"""Many models by the real command: a version, and a classifier of Hugging Face's that is imported on the way."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from processes.test_server import Start, environment, start
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tuneserve.hardware import memory_used
from tuneserve.lifecycle.store import Store
from tuneserve.settings import PROJECT

__all__ = ["environment", "start"]
RUN = PROJECT / "production" / "docker-res" / "run.py"
TARGET = "X-Amzn-SageMaker-Target-Model"
ALONE = {"Connection": "close"}


@pytest.fixture
def folder(store: Path, tmp_path: Path) -> Path:
    """Two models that call the same things by other names."""
    folder = tmp_path / "many"
    version = Store(store).champion().folder
    folder.mkdir()
    (folder / "ours").symlink_to(version)
    AutoModelForSequenceClassification.from_pretrained(version).save_pretrained(folder / "theirs")
    AutoTokenizer.from_pretrained(version).save_pretrained(folder / "theirs")
    config = json.loads((folder / "theirs" / "config.json").read_text())
    config |= {"id2label": {"0": "dull", "1": "warm"}, "label2id": {"dull": 0, "warm": 1}}
    (folder / "theirs" / "config.json").write_text(json.dumps(config))
    return folder


def test_models_come_and_go_and_what_was_imported_is_there_again(
    start: Start, environment: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    environment |= {"DATA_PATH": str(tmp_path / "data"), "NUM_MAX_POSITIONS": "32"}
    environment["MODEL_PATH"] = str(tmp_path / "none")
    server = start(environment, "run.py", "multimodel")
    server.wait_for(200, "/ping")
    ask = httpx.Client(base_url=server.url, timeout=120, headers=ALONE)
    for name in ("ours", "theirs"):
        found = ask.post("/models", json={"model_name": name, "url": str(folder / name)})
        assert found.status_code == 200, found.text
    labels = [
        ask.post(f"/models/{name}/invoke", json={"inputs": "a great film"}).json()[0]["label"]
        for name in ("ours", "theirs")
    ]
    assert labels == ["good", "warm"]
    assert ask.post("/models", json={"model_name": "x", "url": str(tmp_path / "nowhere")}).status_code == 404
    taken = ask.get("/models").json()["memory"]["used"]
    assert 0.5 < taken / memory_used(pid=server.process.pid) < 2
    assert [ask.delete(f"/models/{name}").status_code for name in ("ours", "theirs", "ours")] == [200, 200, 404]
    assert ask.get("/models").json()["models"] == []
    assert server.end()[0] == 0
    again = start(environment | {"MODELS": str(folder), "PINNED_MODELS": "ours"}, "run.py", "serve")
    again.wait_for(200, "/ping")
    ask = httpx.Client(base_url=again.url, timeout=120, headers=ALONE)
    [found] = ask.post("/invocations", json="a great film", headers={TARGET: "theirs"}).json()
    assert found["label"] == "warm"
    code, output = again.end()
    assert code == 0, output
    assert "importing" not in output
    assert "model 'ours' is loaded" in output
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"MODELS": "/nowhere"}, "MODELS=/nowhere: there is no such folder."),
        ({"MODELS": "/usr", "PINNED_MODELS": "bin, none"}, "There is no model 'none' here. It should be in MODELS."),
        ({"MODELS": "/usr", "MODEL": "x"}, "a server has one model, or a folder of them"),
        ({"MODELS": "/usr", "MEMORY_LIMIT": "much"}, "MEMORY_LIMIT='much' is not bytes, or a number with a unit"),
    ],
)
def test_what_cannot_be_served_ends_at_once(python: Any, tmp_path: Path, variables: dict[str, str], words: str) -> None:
    done = python(RUN, "serve", **tiny.paths(tmp_path), **variables)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
