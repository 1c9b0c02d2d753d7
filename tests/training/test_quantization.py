"""The int8 graph of tiny encoders: made by NNCF itself, compared, and taken or left."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from tuneserve.errors import SettingsError
from tuneserve.settings import PROJECT, Settings
from tuneserve.signals import Stop
from tuneserve.training import export, job, quantization
from tuneserve.training.tokens import TokenizedSplit

LENGTHS = [3, 9, 17, 30, 5, 5, 12, 28, 4, 21] * 4


def exported(folder: Path, kind: str = "bert") -> TokenizedSplit:
    """A version's graph in a folder, and a split whose labels are what that graph answers."""
    split = tiny.make_split(LENGTHS)
    assert export.export(tiny.make_classifier(kind).eval(), folder, split, threads=1) is not None
    texts = [split.text_ids(row) for row in range(len(split))]
    answers = quantization.graph_logits(folder, texts, int8=False, threads=1, max_tokens=32).argmax(axis=1)
    return TokenizedSplit(split.ids, split.starts, answers, split.truncated)


@pytest.mark.parametrize(("kind", "layout"), [("bert", "packed"), ("modernbert", "packed"), ("deberta-v2", "padded")])
def test_an_int8_graph_answers_nearly_as_the_other_one(kind: str, layout: str, tmp_path: Path) -> None:
    split = exported(tmp_path, kind)
    description = quantization.quantize(tmp_path, split, split, threads=1, seed=0, most_accuracy_lost=0.5)
    found = description["int8"]
    assert description["layout"] == layout
    assert json.loads((tmp_path / "engine" / "engine.json").read_text()) == description
    assert found["accepted"], found
    assert found["valid_accuracy"] == 1.0
    assert found["difference"] == pytest.approx(found["valid_accuracy_int8"] - 1)
    assert 0 < found["largest_difference"] < 0.2
    files = [tmp_path / "engine" / name for name in ("int8.xml", "int8.bin")]
    assert found["bytes"] == sum(path.stat().st_size for path in files)
    assert files[1].stat().st_size < (tmp_path / "engine" / "model.bin").stat().st_size / 2
    assert 'element_type="i8"' in files[0].read_text()


def test_answers_come_in_the_order_of_the_texts(tmp_path: Path) -> None:
    split = exported(tmp_path)
    texts = [split.text_ids(row) for row in range(len(split))]
    asked: dict[str, Any] = {"int8": False, "threads": 1, "max_tokens": 32}
    alone = np.concatenate([quantization.graph_logits(tmp_path, [text], **asked) for text in texts])
    assert quantization.graph_logits(tmp_path, texts, **asked) == pytest.approx(alone, abs=0.02)


def test_a_graph_that_costs_accuracy_is_refused_and_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    split = exported(tmp_path)
    caplog.set_level("INFO")
    found = quantization.quantize(tmp_path, split, split, threads=1, seed=0, most_accuracy_lost=-1)["int8"]
    assert not found["accepted"]
    assert found["valid_accuracy"] == 1.0
    assert "bytes" not in found
    assert sorted(path.name for path in (tmp_path / "engine").iterdir()) == ["engine.json", "model.bin", "model.xml"]
    [line] = [line for line in caplog.messages if "int8" in line]
    assert line.startswith(f"int8 graph refused, the other one serves: accuracy {found['valid_accuracy_int8']:.2%}")


@pytest.mark.parametrize(("wrong", "accepted"), [(0, True), (2, True), (3, False), (4, False)])
def test_three_tenths_of_a_point_are_too_much(wrong: int, accepted: bool) -> None:
    before = np.tile([0.9, 0.1], (1000, 1))
    after = before.copy()
    after[:wrong] = [0.1, 0.9]
    found = quantization.judge(before, after, np.zeros(1000, dtype=int), export.MOST_ACCURACY_LOST)
    assert found["accepted"] == accepted
    assert found["difference"] == -wrong / 1000


def test_what_is_no_number_is_refused_even_if_the_label_is_right() -> None:
    before = np.tile([0.9, 0.1], (10, 1))
    after = np.full_like(before, np.nan)  # whose largest is its first
    found = quantization.judge(before, after, np.zeros(10, dtype=int), export.MOST_ACCURACY_LOST)
    assert (found["valid_accuracy_int8"], found["accepted"], found["largest_difference"]) == (1.0, False, None)


def test_a_graph_that_cannot_be_made_leaves_the_other_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = exported(tmp_path)
    monkeypatch.setitem(sys.modules, "nncf", None)
    found = quantization.quantize(tmp_path, split, split, threads=1, seed=0)["int8"]
    assert found == {"accepted": False, "reason": "it cannot be made (ModuleNotFoundError)"}
    assert not (tmp_path / "engine" / "int8.xml").exists()


def test_without_nncf_a_training_is_refused_before_it_begins(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    settings = Settings.from_environ(environment | {"PRECISION": "int8"})
    with pytest.raises(SettingsError, match=r"requirements-int8\.txt, or build\.py --build-arg EXTRAS=int8"):
        job.train(settings, Stop(), threads=1)
    assert not settings.model_path.exists()


def test_int8_is_another_training_and_the_other_formats_are_not(environment: dict[str, str]) -> None:
    base, splits = job.gather(Settings.from_environ(environment))
    marks = {
        precision: job.fingerprint_run(Settings.from_environ(environment | {"PRECISION": precision}), base, splits)
        for precision in ("auto", "fp32", "bf16", "int8")
    }
    assert marks["auto"] == marks["fp32"] == marks["bf16"] != marks["int8"]


def test_a_version_without_the_graph_is_trained_again_when_it_is_asked_for(environment: dict[str, str]) -> None:
    # The graph's description is most of so small a version, and a CPU with bf16 trains the two in different formats.
    environment |= {"MAX_LATENCY_INCREASE": "9", "MAX_ACCURACY_DROP": "1"}
    versions = [
        job.train(Settings.from_environ(environment | {"PRECISION": precision}), Stop(), threads=1)
        for precision in ("fp32", "int8", "int8", "fp32")
    ]
    ids = [version.id for version in versions if version is not None]
    assert ids[0] == ids[3] != ids[1] == ids[2]
    assert len(list((Path(environment["MODEL_PATH"]) / "versions").iterdir())) == 2


def test_quantizing_reports_to_nobody_prints_nothing_and_changes_no_logger(
    python: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    """In a process without pytest, for NNCF leaves its telemetry out where it sees that."""
    split = exported(tmp_path)
    np.savez(tmp_path / "split.npz", ids=split.ids, starts=split.starts, labels=split.label_ids, cut=split.truncated)
    code = (
        "import logging, sys\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from tuneserve.training.quantization import quantize\n"
        "from tuneserve.training.tokens import TokenizedSplit\n"
        "split = TokenizedSplit(*np.load('split.npz').values())\n"
        "found = quantize(Path('.'), split, split, threads=1, seed=0, most_accuracy_lost=1)\n"
        "assert found['int8']['accepted'], found\n"
        "assert 'nncf' in sys.modules\n"
        "assert sys.modules['openvino_telemetry'] is None\n"
        "assert logging.getLoggerClass() is logging.Logger\n"
    )
    done = python("-c", code, PYTHONPATH=str(PROJECT / "production" / "docker-res"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "intel").exists()
