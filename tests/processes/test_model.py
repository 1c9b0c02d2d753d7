"""`MODEL`: a model that one brings along is served by the real command, without a store."""

import json
import shutil
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import httpx
import pytest
import tiny
from huggingface_hub import InferenceClient
from processes.test_server import Server, Start, environment, start
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tuneserve.lifecycle.store import Store
from tuneserve.settings import PROJECT

__all__ = ["environment", "start"]
RUN = PROJECT / "production" / "docker-res" / "run.py"


@pytest.fixture
def served(start: Start, environment: dict[str, str], tmp_path: Path) -> Any:
    """Starts a server of a model; the store that MODEL_PATH names is not there."""

    def begin(model: str | Path, *command: str, **changed: str) -> Server:
        places = {"MODEL_PATH": str(tmp_path / "none"), "DATA_PATH": str(tmp_path / "data")}
        return start(environment | places | {"MODEL": str(model)} | changed, *command)

    return begin


def test_an_encoder_is_served_at_once_the_second_time(served: Any, tmp_path: Path) -> None:
    encoder = tiny.make_base_model(tmp_path / "encoder")
    server = served(encoder, TASK="feature-extraction")
    server.wait_until_ready()
    [vector] = httpx.post(f"{server.url}/embed", json={"inputs": "a great film"}).json()
    asked = InferenceClient(f"{server.url}/embed").feature_extraction("a great film", normalize=True, truncate=False)
    assert asked.shape == (1, 32)
    assert asked[0] == pytest.approx(vector, abs=1e-6)
    version = httpx.get(f"{server.url}/model").json()["version"]
    assert server.end()[0] == 0
    assert not (tmp_path / "none").exists()
    again = served(encoder, "run.py", "train-serve", TASK="feature-extraction")
    again.wait_until_ready()
    assert httpx.get(f"{again.url}/model").json()["version"] == version
    assert again.end()[0] == 0


def test_a_classifier_answers_with_the_label_names_of_its_config(served: Any, store: Path, tmp_path: Path) -> None:
    folder = Store(store).champion().folder
    AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(tmp_path / "foreign")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "foreign")
    config = json.loads((tmp_path / "foreign" / "config.json").read_text())
    config |= {"id2label": {"0": "dull", "1": "warm"}, "label2id": {"dull": 0, "warm": 1}}
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(config))
    server = served(tmp_path / "foreign", NUM_MAX_POSITIONS="32")
    server.wait_until_ready()
    assert httpx.post(f"{server.url}/inference", json={"text": "a great film"}).json()["label"] == "warm"
    assert server.end()[0] == 0


def test_a_model_that_cannot_be_served_ends_the_server_with_the_reason(served: Any, tmp_path: Path) -> None:
    server = served(tmp_path / "nowhere", TASK="feature-extraction")
    output = server.output()
    assert server.process.returncode not in (0, None)
    assert f"MODEL={tmp_path / 'nowhere'}: there is no such folder." in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("verb", "variables", "words"),
    [
        ("train", {"TASK": "feature-extraction"}, "TASK=feature-extraction is not trained here"),
        ("train-serve", {"TASK": "feature-extraction"}, "name a model in MODEL"),
        ("train", {"MODEL": "somewhere"}, "a model to fine-tune is named in BASE_MODEL"),
        ("train-serve", {"MODEL": "somewhere"}, "a model to fine-tune is named in BASE_MODEL"),
    ],
)
def test_what_is_only_served_is_not_trained(
    python: Any, tmp_path: Path, verb: str, variables: dict[str, str], words: str
) -> None:
    done: CompletedProcess[str] = python(RUN, verb, **tiny.paths(tmp_path), **variables)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    shutil.rmtree(tmp_path / "LOG", ignore_errors=True)
