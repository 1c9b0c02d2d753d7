"""The exported forms of tiny encoders: real graphs, made by OpenVINO and NNCF, compared, and taken or left."""

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from tuneserve.errors import SettingsError
from tuneserve.network.graph import Graph
from tuneserve.settings import Settings
from tuneserve.signals import Stop
from tuneserve.training import exporters, int8_graph, job, openvino_graph
from tuneserve.training.tokens import TokenizedSplit

LENGTHS = [3, 9, 17, 30, 5, 5, 12, 28, 4, 21]


@pytest.fixture
def split() -> TokenizedSplit:
    return tiny.make_split(LENGTHS)


def logits_of(model: Any, split: TokenizedSplit) -> Any:
    with torch.no_grad():
        rows = [torch.tensor(split.text_ids(row).astype(np.int64))[None] for row in range(len(split))]
        return torch.cat([model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for ids in rows]).numpy()


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("bert", "packed"),
        ("roberta", "packed"),
        ("distilbert", "packed"),
        ("modernbert", "packed"),
        ("deberta-v2", "padded"),
    ],
)
def test_a_graph_answers_as_torch_does(kind: str, layout: str, split: TokenizedSplit, tmp_path: Path) -> None:
    model = tiny.make_classifier(kind).eval()
    description = openvino_graph.export(model, tmp_path, split, threads=1)
    assert description is not None
    assert description["layout"] == layout
    assert json.loads((tmp_path / "engine" / "engine.json").read_text()) == description
    graph = Graph(tmp_path, precision="fp32", threads=1, max_tokens=32)
    graph.begin(graph.prepare([split.text_ids(row).tolist() for row in range(len(split))]))
    assert graph.result() == pytest.approx(logits_of(model, split), abs=1e-4)


def test_a_conversion_that_raises_leaves_the_log_as_it_was(
    split: TokenizedSplit, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unknown(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, states: torch.Tensor) -> torch.Tensor:
            raise ValueError("nothing that a graph could hold")

    monkeypatch.setattr(openvino_graph._InRows, "forward", lambda *_: Unknown.apply(None))
    monkeypatch.setattr(openvino_graph._InPadding, "forward", lambda *_: Unknown.apply(None))
    caplog.set_level(logging.INFO)
    before, filters = logging.getLogger().level, warnings.filters[:]
    assert openvino_graph.export(tiny.make_classifier(), tmp_path, split, threads=1) is None
    assert (logging.getLogger().level, warnings.filters) == (before, filters)
    assert "cannot be exported for the CPU engine" in caplog.text


def test_a_graph_that_computes_something_else_is_not_taken(
    split: TokenizedSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = openvino_graph._by_graph

    def wrong(*arguments: Any) -> Any:
        found = true(*arguments)
        found[0, 0] += 0.1
        return found

    monkeypatch.setattr(openvino_graph, "_by_graph", wrong)
    assert openvino_graph.export(tiny.make_classifier("bert").eval(), tmp_path, split, threads=1) is None
    assert not (tmp_path / "engine").exists()


def test_a_number_format_that_costs_accuracy_may_not_serve() -> None:
    right = np.tile([0.9, 0.1], (100, 1))
    coarse = right.copy()
    coarse[:2] = [0.1, 0.9]
    labels = np.zeros(100, dtype=int)
    differences = {"fp32": 0.0, "bf16": 0.8}
    assert openvino_graph._judge({"fp32": right, "bf16": coarse}, right, labels, differences)["formats"] == ["fp32"]
    coarse[0] = right[0]
    assert openvino_graph._judge({"fp32": right, "bf16": coarse}, right, labels, differences)["formats"] == [
        "fp32",
        "bf16",
    ]


def exported(folder: Path, kind: str = "bert", *, states: bool = False) -> TokenizedSplit:
    """A version's graph in a folder, and a split whose labels are what that graph answers."""
    split = tiny.make_split(LENGTHS * 4)
    assert openvino_graph.export(tiny.make_classifier(kind).eval(), folder, split, threads=1, states=states) is not None
    texts = [split.text_ids(row) for row in range(len(split))]
    answers = int8_graph.graph_logits(folder, texts, int8=False, threads=1, max_tokens=32).argmax(axis=1)
    return TokenizedSplit(split.ids, split.starts, answers, split.truncated)


@pytest.mark.parametrize(
    ("kind", "layout", "states"),
    [("bert", "packed", False), ("modernbert", "packed", True), ("deberta-v2", "padded", True)],
)
def test_an_int8_graph_answers_nearly_as_the_other_one(kind: str, layout: str, states: bool, tmp_path: Path) -> None:
    split = exported(tmp_path, kind, states=states)
    description = int8_graph.quantize(tmp_path, split, split, threads=1, seed=0, most_accuracy_lost=0.5)
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
    texts = [split.text_ids(row) for row in range(len(LENGTHS))]
    asked: dict[str, Any] = {"int8": False, "threads": 1, "max_tokens": 32}
    alone = np.concatenate([int8_graph.graph_logits(tmp_path, [text], **asked) for text in texts])
    assert int8_graph.graph_logits(tmp_path, texts, **asked) == pytest.approx(alone, abs=0.02)


def test_a_graph_that_costs_accuracy_is_refused_and_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    split = exported(tmp_path)
    caplog.set_level("INFO")
    found = int8_graph.quantize(tmp_path, split, split, threads=1, seed=0, most_accuracy_lost=-1)["int8"]
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
    found = int8_graph.judge(before, after, np.zeros(1000, dtype=int), openvino_graph.MOST_ACCURACY_LOST)
    assert found["accepted"] == accepted
    assert found["difference"] == -wrong / 1000


def test_what_is_no_number_is_refused_even_if_the_label_is_right() -> None:
    before = np.tile([0.9, 0.1], (10, 1))
    after = np.full_like(before, np.nan)  # whose largest is its first
    found = int8_graph.judge(before, after, np.zeros(10, dtype=int), openvino_graph.MOST_ACCURACY_LOST)
    assert (found["valid_accuracy_int8"], found["accepted"], found["largest_difference"]) == (1.0, False, None)


def test_a_graph_that_cannot_be_made_leaves_the_other_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = exported(tmp_path)
    monkeypatch.setitem(sys.modules, "nncf", None)
    found = int8_graph.quantize(tmp_path, split, split, threads=1, seed=0)["int8"]
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
    marks = {}
    for precision in ("auto", "fp32", "bf16", "int8"):
        settings = Settings.from_environ(environment | {"PRECISION": precision})
        marks[precision] = job.fingerprint_run(settings, base, splits, exporters.choose_exporters(settings))
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
