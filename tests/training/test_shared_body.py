"""The head of a frozen body as a file of its own, and what names the body."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from jobs import train
from torch import nn

from tuneserve.artifact import HEAD, is_whole
from tuneserve.network.forward import probe
from tuneserve.network.graph import Graph
from tuneserve.network.numpy_head import NumpyHead
from tuneserve.training import features, openvino_graph, shared_body


def states_of(model: Any) -> Any:
    """What the head reads of some texts [texts, channels], and the logits that the model makes of it."""
    encoder = features.Encoder(model, shared_body.choose_forward(model, learns=False))
    states, logits = encoder(probe(model))
    encoder.remove()
    encoder.forward.remove()
    return states.numpy(), logits.numpy()


@pytest.mark.parametrize("kind", sorted(tiny.KINDS))
@pytest.mark.parametrize("labels", [2, 5])
def test_a_head_in_numpy_gives_the_models_logits(kind: str, labels: int, tmp_path: Path) -> None:
    model = tiny.make_classifier(kind, labels=labels).eval()
    states, logits = states_of(model)
    assert shared_body.write_head(model, tmp_path) is not None
    found = NumpyHead.read(tmp_path / HEAD)(states)
    assert found.dtype == np.float32
    assert found == pytest.approx(logits, abs=1e-5)
    assert len(logits[0]) == labels
    assert [states_of(model)[1].tolist()] == [logits.tolist()]  # nothing of the looking is left in the model


@pytest.mark.parametrize("kind", ["bert", "modernbert", "deberta-v2"])
def test_the_body_is_named_by_all_that_makes_its_states_and_by_nothing_of_the_head(kind: str, tmp_path: Path) -> None:
    def name(model: Any) -> str:
        found = shared_body.write_head(model, tmp_path)
        assert found is not None
        return found["sha256"]

    first = name(tiny.make_classifier(kind))
    other_head = tiny.make_classifier(kind)
    with torch.no_grad():
        for parameter in features.Head(other_head).parameters():
            parameter.add_(0.1)
    other_head.config.id2label = {0: "x", 1: "y", 2: "z"}
    assert name(other_head) == first
    assert name(tiny.make_classifier(kind, labels=5)) == first
    other_body = tiny.make_classifier(kind)
    with torch.no_grad():
        next(other_body.base_model.parameters()).view(-1)[0].add_(1e-6)
    assert name(other_body) != first
    assert name(tiny.make_classifier(kind, layer_norm_eps=1e-3, norm_eps=1e-3)) != first


class Gate(nn.Module):
    """An activation that NumPy's head does not know, with a weight of its own or without."""

    def __init__(self, weight: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 0.5)) if weight else None

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values.sin() if self.weight is None else values * self.weight


@pytest.mark.parametrize("weight", [True, False])
def test_a_head_of_other_things_has_no_file(weight: bool, tmp_path: Path) -> None:
    model = tiny.make_classifier().eval()
    model.bert.pooler.activation = Gate(weight)
    assert shared_body.write_head(model, tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["bert", "modernbert", "deberta-v2"])
def test_the_graph_gives_states_and_logits(kind: str, tmp_path: Path) -> None:
    model, split = tiny.make_classifier(kind).eval(), tiny.make_split([3, 9, 17, 30, 5])
    assert shared_body.write_head(model, tmp_path) is not None
    description = openvino_graph.export(model, tmp_path, split, threads=1, states=True)
    assert description is not None
    found = []
    for states in (False, True):
        graph = Graph(tmp_path, precision="fp32", threads=1, max_tokens=32, states=states)
        graph.begin(graph.prepare([split.text_ids(row).tolist() for row in range(len(split))]))
        found.append(graph.result())
    assert NumpyHead.read(tmp_path / HEAD)(found[1]) == pytest.approx(found[0], abs=1e-4)


@pytest.mark.usefixtures("brief")
def test_versions_on_one_frozen_body_name_the_same_body_and_others_none(environment: dict[str, str]) -> None:
    frozen = {"TRAIN_BODY": "0", "N_EPOCHS": "1"}
    one, other = train(environment | frozen, LR="1e-2"), train(environment | frozen, LR="3e-3", SEED="7")
    assert one.metadata["body"] == other.metadata["body"]
    assert one.metadata["sha256"][HEAD] != other.metadata["sha256"][HEAD]
    assert is_whole(one)
    (one.folder / HEAD).write_bytes(b"")
    assert not is_whole(one)
    whole = train(environment, N_EPOCHS="1")
    assert "body" not in whole.metadata
    assert not (whole.folder / HEAD).exists()
