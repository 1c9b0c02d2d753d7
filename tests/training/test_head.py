"""Layers of one's own behind the body: one class, named in one place, is trained, saved, exported and served."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from tuneserve.errors import BaseModelError, StoreError
from tuneserve.network import head
from tuneserve.serving.engines import torch_engine
from tuneserve.settings import Settings
from tuneserve.tasks.classifier import Classifier, Prediction, load_classifier
from tuneserve.training import job
from tuneserve.training.model import build_model

TEXTS = ["a great film", "awful food", "the film was good and the food was bad"]
CPU = Settings.from_environ({"DEVICE": "cpu", "PRECISION": "fp32"})


class TwoLayers(BertForSequenceClassification):
    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        hidden = config.hidden_size
        self.classifier = nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, config.num_labels))
        self.post_init()


def test_a_class_of_ones_own_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(head, "NETWORK", TwoLayers)
        version = tiny.train(tiny.write_csv(tmp_path / "in.csv", tiny.sentences(160)), tmp_path)
        by_torch = Classifier(version, torch_engine.load(version, CPU, threads=1))
        network = TwoLayers.from_pretrained(version.folder).eval()
    by_graph = load_classifier(version, CPU, threads=1)
    assert "classifier.2.weight" in network.state_dict()
    for text, one, other in zip(TEXTS, by_torch.predict(TEXTS), by_graph.predict(TEXTS), strict=True):
        assert isinstance(one, Prediction)
        assert isinstance(other, Prediction)
        wanted = scores(network, by_torch.body.read([text])[0])
        assert list(one.scores.values()) == pytest.approx(wanted, abs=1e-4)
        assert list(other.scores.values()) == pytest.approx(wanted, abs=1e-3)
    assert by_torch.predict(TEXTS[:1])[0].label == "good"  # type: ignore[union-attr]
    with pytest.raises(StoreError, match="not of this class"):
        torch_engine.load(version, CPU, threads=1)
    for model in (by_torch, by_graph):
        model.close()


def test_a_base_model_of_another_architecture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.make_base_model(tmp_path / "base", "roberta")  # its weights have the names of BERT's
    monkeypatch.setattr(head, "NETWORK", TwoLayers)
    with pytest.raises(BaseModelError, match=r"TwoLayers in network/head\.py is made for bert, and .* kind roberta"):
        build_model(base, ["bad", "good"], dropout=0, seed=0, device=torch.device("cpu"))


def test_layers_that_nothing_would_load_again_are_refused_before_they_are_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*about: Any, **options: Any) -> Any:
        network = build_model(*about, **options)
        network.classifier = nn.Sequential(network.classifier)
        return network

    monkeypatch.setattr(job, "build_model", build)
    with pytest.raises(BaseModelError, match=r"classifier\.0\.bias.*network/head\.py"):
        tiny.train(tiny.write_csv(tmp_path / "in.csv", tiny.sentences(40)), tmp_path)


def scores(network: nn.Module, tokens: Any) -> list[float]:
    with torch.inference_mode():
        logits = network(input_ids=torch.tensor([tokens.ids])).logits[0]
    return torch.softmax(logits, dim=0).tolist()
