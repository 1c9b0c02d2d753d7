"""Many models by the real command: a version, and a classifier of Hugging Face's that is imported on the way."""

import json
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import many
import pytest
import tiny
import writers
from processes.test_server import Start, environment, start
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tuneserve.artifact import read_version
from tuneserve.hardware import memory_used
from tuneserve.lifecycle.store import Store
from tuneserve.settings import PROJECT, Settings
from tuneserve.tasks.catalog import load_model
from tuneserve.tasks.classifier import Prediction

__all__ = ["environment", "start"]
RUN = PROJECT / "production" / "docker-res" / "run.py"
TARGET = "X-Amzn-SageMaker-Target-Model"
ECHO = """
def model_fn(folder): return folder
def transform_fn(model, data, content_type, accept):
    if content_type != "text/csv":
        raise LookupError("no table")
    return f"{data} {content_type}", "text/plain"
"""
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
    writers.make_causal(folder / "writes")
    (tmp_path / "echo" / "code").mkdir(parents=True)
    (tmp_path / "echo" / "code" / "inference.py").write_text(ECHO)
    with tarfile.open(folder / "echo.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "echo", ".")
    return folder


def test_models_come_and_go_and_what_was_imported_is_there_again(
    start: Start, environment: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    environment |= {"DATA_PATH": str(tmp_path / "data"), "NUM_MAX_POSITIONS": "32"}
    environment["MODEL_PATH"] = str(tmp_path / "none")
    server = start(environment, "run.py", "multimodel")
    server.wait_for(200, "/ping")
    ask = httpx.Client(base_url=server.url, timeout=300, headers=ALONE)
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
    changed = {"MODELS": str(folder), "PINNED_MODELS": "ours", "REQUEST_TIMEOUT_S": "300"}
    again = start(environment | changed, "run.py", "serve")
    again.wait_for(200, "/ping")
    ask = httpx.Client(base_url=again.url, timeout=300, headers=ALONE)
    [found] = ask.post("/invocations", json="a great film", headers={TARGET: "theirs"}).json()
    assert found["label"] == "warm"
    said = ask.post("/invocations", content="é,1", headers={TARGET: "echo.tar.gz", "Content-Type": "text/csv"})
    assert (said.text, said.headers["Content-Type"]) == ("é,1 text/csv", "text/plain; charset=utf-8")
    asked = {"inputs": "a great film", "parameters": {"max_new_tokens": 3}}
    [written] = ask.post("/models/writes/invoke", json=asked).json()
    assert written["generated_text"].startswith("a great film")
    assert len(written["generated_text"]) > len("a great film")
    failed = ask.post("/models/echo/invoke", content="{}")
    assert (failed.status_code, failed.json()["type"]) == (400, "LookupError")
    code, output = again.end()
    assert code == 0, output
    assert re.findall(r"importing \S+ for (\S+)", output) == ["text-generation"]
    assert "model 'ours' is loaded" in output
    assert not (tmp_path / "none").exists()


def test_versions_on_one_frozen_body_share_it(start: Start, environment: dict[str, str], tmp_path: Path) -> None:
    labels = {"first": {"bad": "bad", "good": "good"}, "second": {"bad": "cold", "good": "hot"}}
    (tmp_path / "many").mkdir()
    for name, of in labels.items():
        rows = [(text, of[label]) for text, label in tiny.sentences(160)]
        version = tiny.train(tiny.write_csv(tmp_path / name / "t.csv", rows), tmp_path / name, TRAIN_BODY="0")
        (tmp_path / "many" / name).symlink_to(version.folder)
    environment |= {"MODELS": str(tmp_path / "many"), "REQUEST_TIMEOUT_S": "300", "DATA_PATH": str(tmp_path / "data")}
    server = start(environment, "run.py", "serve")
    server.wait_for(200, "/ping")
    texts = ["a great film", "awful"] * 8
    asked = {"inputs": texts, "parameters": {"top_k": None}}

    def ask(name: str) -> list[dict[str, float]]:
        with httpx.Client(base_url=server.url, timeout=300, headers=ALONE) as client:
            found = client.post(f"/models/{name}/invoke", json=asked).json()
            return [{one["label"]: one["score"] for one in of} for of in found]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, [*labels] * 8))
    for index, name in enumerate(labels):
        version = read_version((tmp_path / "many" / name).resolve())
        alone = load_model(version, Settings.from_environ({"DEVICE": "cpu"}), threads=1)
        wanted = [one.scores for one in alone.predict(texts) if isinstance(one, Prediction)]
        alone.close()
        for found in answers[index::2]:
            assert found == [pytest.approx(one, abs=0.02) for one in wanted]
    shown = httpx.get(f"{server.url}/models").json()["models"]
    assert min(one["bytes"] for one in shown) < 40_000 < 100_000 < max(one["bytes"] for one in shown)
    code, output = server.end()
    assert code == 0, output
    assert output.count("a body is loaded") == output.count("engine: OpenVINO") == 1


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


def test_many_archives_in_little_memory_give_no_wrong_answer(store: Path, tmp_path: Path) -> None:
    version = str(Store(store).champion().folder)
    options = ["--archives", "30", "--loaded", "6", "--clients", "6", "--seconds", "6", "--version", version]
    run = many.find_out(many.parse(options), tmp_path)
    assert run.undeserved == []
    assert max(run.memory) <= run.limit
    assert run.figures["model_evictions_total"] > 0
    assert run.figures['model_loads_total{outcome="loaded"}'] > 6
    assert sum(run.statuses["one"].values()) > 6
    assert "| undeserved answers | 0 |" in many.tabulate(run)
