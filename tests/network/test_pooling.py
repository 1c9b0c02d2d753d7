"""A layer of uniform attention gives the first token the mean, to every program that loads the folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from tuneserve.network.forward import Padded, Texts, choose_forward
from tuneserve.network.pooling import append_mean, is_uniform
from tuneserve.training.model import build_model

LENGTHS = (3, 9, 17, 5)


def made(folder: Path, *, mean: bool, kind: str = "bert") -> Path:
    base = tiny.make_base_model(folder / "base", kind)
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": mean}))
    return base


def texts() -> Texts:
    split = tiny.make_split(LENGTHS, words=len(tiny.SPECIAL) + len(tiny.WORDS))
    return Texts(torch.from_numpy(split.ids).long(), np.array(LENGTHS))


def build(folder: Path, *, reads_mean: bool = True) -> torch.nn.Module:
    model = build_model(folder, ["a", "b", "c"], dropout=0.0, seed=0, device=torch.device("cpu"), reads_mean=reads_mean)
    with torch.no_grad():
        model.classifier.weight.mul_(50)
    return model.eval()


@torch.inference_mode()
def test_the_classifier_reads_the_mean_of_the_tokens(tmp_path: Path) -> None:
    base = made(tmp_path, mean=True)
    model, body = build(base), AutoModel.from_pretrained(base).eval()
    ids, mask = texts().padded(0)
    states = body(input_ids=ids, attention_mask=mask).last_hidden_state
    means = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    read = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
    alike = torch.nn.functional.cosine_similarity(read, means - means.mean(1, keepdim=True))
    first = torch.nn.functional.cosine_similarity(read, states[:, 0])
    assert (alike > 0.98).all()
    assert (alike > first).all()


@torch.inference_mode()
def test_packed_texts_and_a_reloaded_folder_give_the_same(tmp_path: Path) -> None:
    model = build(made(tmp_path, mean=True))
    wanted = Padded(model)(texts())
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert torch.allclose(Padded(again)(texts()), wanted, atol=1e-6)
    forward = choose_forward(model, learns=False)
    assert not forward.pads
    assert torch.allclose(forward(texts()), wanted, atol=1e-5)
    forward.remove()
    assert torch.allclose(Padded(model)(texts()), wanted, atol=1e-6)


def test_the_packed_way_asks_that_layer_for_no_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tuneserve.network import attention

    asked: list[bool] = []
    usual = attention.Spans.attend

    def counted(self: attention.Spans, *given: object, **named: object) -> torch.Tensor:
        asked.append(bool(named.get("first_only")))
        return usual(self, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(attention.Spans, "attend", counted)
    for mean, first_only in ((True, 0), (False, 1)):
        asked.clear()
        forward = choose_forward(build(made(tmp_path / str(mean), mean=mean)), learns=False)
        asked.clear()
        forward(texts())
        assert sum(asked) == first_only


@pytest.mark.parametrize(("mean", "kind", "layers"), [(True, "bert", 3), (False, "bert", 2), (True, "distilbert", 2)])
def test_a_layer_is_added_where_the_base_model_says_mean_and_is_like_bert(
    tmp_path: Path, mean: bool, kind: str, layers: int
) -> None:
    base = made(tmp_path, mean=mean, kind=kind)
    assert build(base).config.num_hidden_layers == layers
    assert build(base, reads_mean=False).config.num_hidden_layers == 2


def test_the_layer_is_not_trained_and_stays_uniform(tmp_path: Path) -> None:
    model = build(made(tmp_path, mean=True))
    layer = model.base_model.encoder.layer[-1]
    assert is_uniform(layer.attention.self)
    assert not any(one.requires_grad for one in layer.parameters())
    assert not is_uniform(model.base_model.encoder.layer[0].attention.self)


def test_what_has_no_layers_of_bert_has_no_uniform_attention() -> None:
    assert not is_uniform(torch.nn.Linear(2, 2))
    model = tiny.make_classifier()
    append_mean(model)
    assert model.config.num_hidden_layers == 3
