"""What a job says of itself at its start."""

from pathlib import Path

import pytest

from tuneserve.files import write_json
from tuneserve.lifecycle.store import Store
from tuneserve.settings import Settings
from tuneserve.summary import summarize


def said(tmp_path: Path, verb: str = "train-serve", **variables: str) -> dict[str, str]:
    settings = Settings.from_environ({"MODEL_PATH": str(tmp_path / "models"), **variables})
    first, *lines = summarize(settings, verb, threads=3)
    assert first.startswith("tuneserve ")
    assert first.endswith(f": {verb}")
    return dict(line.split(": ", 1) for line in lines)


def test_ten_lines_at_most_say_what_will_be_done(tmp_path: Path) -> None:
    found = said(tmp_path, N_EPOCHS="2", LR="1e-5", PORT="8001", HOST="127.0.0.1")
    assert len(found) < 10
    assert found["machine"].startswith("DEVICE=auto, 3 threads")
    assert found["data"].startswith("sample; ")
    assert found["base model"] == "sentence-transformers/all-MiniLM-L6-v2, whole"
    assert found["training"].startswith("2 epochs in batches of 32, LR=1e-05, ")
    assert found["store"].endswith("which has no model yet")
    assert found["serving"] == "http://127.0.0.1:8001 (page at /, API at /docs); API_KEY is not set"


@pytest.mark.parametrize(
    ("verb", "names"),
    [
        ("train", {"machine", "data", "base model", "training", "store"}),
        ("serve", {"machine", "store", "feedback", "serving"}),
    ],
)
def test_a_verb_says_what_it_does_and_no_more(tmp_path: Path, verb: str, names: set[str]) -> None:
    assert set(said(tmp_path, verb)) == names


def test_what_is_set_is_said_and_no_secret(tmp_path: Path) -> None:
    variables = {
        "API_KEY": "hidden-key",
        "DATASET": "https://me:hidden-word@example.org/a.csv?sig=hidden-sign",
        "RETRAIN_SCHEDULE": "0 3 * * *",
        "RETRAIN_ON_DRIFT": "1",
        "TRAIN_BODY": "0",
        "KEEP_TEXTS": "1",
    }
    found = said(tmp_path, **variables)
    assert "hidden" not in str(found)
    assert found["later trainings"] == "when asked (POST /retrain) and at '0 3 * * *' and on drift"
    assert "TRAIN_BODY=0" in found["base model"]
    assert found["serving"].endswith("API_KEY is set")
    assert found["feedback"].endswith("with their texts")


def test_the_store_is_looked_at(tmp_path: Path) -> None:
    store = Store(tmp_path / "models")
    store.prepare()
    (store.versions_folder / "one").mkdir()
    write_json(store.versions_folder / "one" / "metadata.json", {"labels": ["a", "b"]})
    store.promote("one")
    assert said(tmp_path)["store"].endswith("1 version, of which one answers")
    store.pointer.write_text("../two")
    assert "which has a fault" in said(tmp_path)["store"]
