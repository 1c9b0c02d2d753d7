"""The exported graph, compared with torch on real graphs of tiny encoders."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from tuneserve.network.graph import Graph
from tuneserve.training import export
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
    description = export.export(model, tmp_path, split, threads=1)
    assert description is not None
    assert description["layout"] == layout
    assert json.loads((tmp_path / "engine" / "engine.json").read_text()) == description
    graph = Graph(tmp_path, precision="fp32", threads=1, max_tokens=32)
    graph.begin(graph.prepare([split.text_ids(row).tolist() for row in range(len(split))]))
    assert graph.result() == pytest.approx(logits_of(model, split), abs=1e-4)


def test_a_graph_that_computes_something_else_is_not_taken(
    split: TokenizedSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = export._by_graph

    def wrong(*arguments: Any) -> Any:
        found = true(*arguments)
        found[0] += 0.01
        return found

    monkeypatch.setattr(export, "_by_graph", wrong)
    assert export.export(tiny.make_classifier("bert").eval(), tmp_path, split, threads=1) is None
    assert not (tmp_path / "engine").exists()


def test_a_number_format_that_costs_accuracy_may_not_serve() -> None:
    right = np.tile([0.9, 0.1], (100, 1))
    coarse = right.copy()
    coarse[:2] = [0.1, 0.9]
    labels = np.zeros(100, dtype=int)
    differences = {"fp32": 0.0, "bf16": 0.8}
    assert export._judge({"fp32": right, "bf16": coarse}, right, labels, differences)["formats"] == ["fp32"]
    coarse[0] = right[0]
    assert export._judge({"fp32": right, "bf16": coarse}, right, labels, differences)["formats"] == ["fp32", "bf16"]
