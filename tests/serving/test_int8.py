"""PRECISION=int8 at serving: the graph of a version that has one, and words in the log where there is none."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from tuneserve.artifact import GOLDEN_INT8, Version, describe_files, read_golden, read_version
from tuneserve.files import write_json
from tuneserve.settings import Settings
from tuneserve.tasks.classifier import Classifier, load_classifier

INT8 = Settings.from_environ({"PRECISION": "int8", "DEVICE": "cpu"})
FP32 = Settings.from_environ({"PRECISION": "fp32", "DEVICE": "cpu"})
TEXTS = ["the film was great", "the food was awful", "it is not very warm and one two three"]


def train(folder: Path, precision: str) -> Version:
    dataset = tiny.write_csv(folder / "reviews.csv", tiny.sentences(240))
    return tiny.train(dataset, folder, N_EPOCHS="3", DEVICE="cpu", PRECISION=precision)


@pytest.fixture(scope="module")
def with_int8(tmp_path_factory: pytest.TempPathFactory) -> Version:
    return train(tmp_path_factory.mktemp("int8"), "int8")


@pytest.fixture(scope="module")
def without_int8(tmp_path_factory: pytest.TempPathFactory) -> Version:
    return train(tmp_path_factory.mktemp("fp32"), "fp32")


@pytest.fixture
def copied(with_int8: Version, tmp_path: Path) -> Callable[[Callable[[Path], None]], Version]:
    """The version with something changed in its folder, as if it had been saved so."""

    def copy(change: Callable[[Path], None]) -> Version:
        folder = tmp_path / with_int8.id
        shutil.copytree(with_int8.folder, folder)
        change(folder)
        metadata = json.loads((folder / "metadata.json").read_text())
        (folder / "metadata.json").unlink()
        write_json(folder / "metadata.json", metadata | describe_files(folder))
        return read_version(folder)

    return copy


def scores(classifier: Classifier) -> Any:
    return np.array([list(one.scores.values()) for one in classifier.predict(TEXTS)])  # type: ignore[union-attr]


def test_a_version_trained_with_int8_says_what_that_cost(with_int8: Version) -> None:
    found = with_int8.metadata["engine"]["int8"]
    assert found["accepted"]
    assert set(found) >= {"valid_accuracy", "valid_accuracy_int8", "difference", "bytes"}
    assert {"engine/int8.xml", "engine/int8.bin", GOLDEN_INT8} <= set(with_int8.metadata["files"])
    assert with_int8.metadata["precision"] in ("fp32", "bf16")


def test_the_int8_graph_serves_where_it_is_asked_for(with_int8: Version, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    served, plain = (load_classifier(with_int8, settings, threads=1) for settings in (INT8, FP32))
    lines = [line for line in caplog.messages if line.startswith("engine: ")]
    assert [line.split(", ")[2] for line in lines] == ["int8", "fp32"]
    assert not any(record.levelname == "WARNING" for record in caplog.records)
    difference = np.abs(scores(served) - scores(plain)).max()
    assert 1e-6 < difference < 0.1
    assert [one.label for one in served.predict(TEXTS[:2])] == ["good", "bad"]  # type: ignore[union-attr]


def test_a_version_without_it_is_served_as_auto_and_the_log_says_so(
    without_int8: Version, caplog: pytest.LogCaptureFixture
) -> None:
    served = load_classifier(without_int8, INT8, threads=1)
    auto = load_classifier(without_int8, Settings.from_environ({"DEVICE": "cpu"}), threads=1)
    assert np.array_equal(scores(served), scores(auto))
    [line] = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert line == (
        "PRECISION=int8 has no int8 graph to serve, and serves as `auto`: this version was trained without it"
    )


def test_a_refused_graph_is_not_served_and_the_log_says_why(
    copied: Callable[..., Version], caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(folder: Path) -> None:
        metadata = json.loads((folder / "metadata.json").read_text())
        metadata["engine"]["int8"] = {"accepted": False, "reason": "accuracy 80.00% where 90.00% was"}
        write_json(folder / "metadata.json", metadata)

    load_classifier(copied(refuse), INT8, threads=1)
    assert "when this version was saved: accuracy 80.00% where 90.00% was" in caplog.text


def test_a_graph_that_does_not_answer_as_when_it_was_saved_does_not_serve(
    copied: Callable[..., Version], caplog: pytest.LogCaptureFixture
) -> None:
    def flip(folder: Path) -> None:
        path = folder / "engine" / "int8.bin"
        content = np.frombuffer(path.read_bytes(), dtype=np.uint8).copy()
        content[::3] ^= 0x40
        path.write_bytes(content.tobytes())

    version = copied(flip)
    served = load_classifier(version, INT8, threads=1)
    assert "the int8 graph does not serve" in caplog.text
    auto = load_classifier(version, Settings.from_environ({"DEVICE": "cpu"}), threads=1)
    assert np.array_equal(scores(served), scores(auto))


def test_int8_is_held_to_its_own_answers(copied: Callable[..., Version], caplog: pytest.LogCaptureFixture) -> None:
    def move(folder: Path) -> None:
        content = json.loads((folder / GOLDEN_INT8).read_text())
        low, high = content[0]["scores"]
        content[0]["scores"][low] -= 0.06
        content[0]["scores"][high] += 0.06
        (folder / GOLDEN_INT8).write_text(json.dumps(content))

    load_classifier(copied(move), INT8, threads=1)
    assert "a probability differs by 0.06" in caplog.text


def test_both_files_ask_the_same_texts(with_int8: Version) -> None:
    torch_says, int8_says = read_golden(with_int8), read_golden(with_int8, GOLDEN_INT8)
    assert torch_says.texts == int8_says.texts
    assert torch_says.scores != int8_says.scores


def test_serving_it_needs_no_nncf(
    with_int8: Version, python: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    code = (
        "import sys\n"
        "sys.modules['nncf'] = None\n"
        "from pathlib import Path\n"
        "from tuneserve.artifact import read_version\n"
        "from tuneserve.tasks.classifier import load_classifier\n"
        "from tuneserve.settings import Settings\n"
        "settings = Settings.from_environ({'PRECISION': 'int8', 'DEVICE': 'cpu'})\n"
        "import logging; logging.basicConfig(level=logging.INFO, stream=sys.stdout)\n"
        "load_classifier(read_version(Path(sys.argv[1])), settings, threads=1)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = python("-c", code, with_int8.folder)
    assert done.returncode == 0, done.stderr
    assert "packed, int8, 1 threads" in done.stdout
