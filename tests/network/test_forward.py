"""Texts end to end against padded rows: the same logits, the same gradients, and a model that is left as it was."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from tuneserve.network import attention
from tuneserve.network.forward import Forward, Packed, Padded, cast, choose_forward
from tuneserve.training.tokens import Batch, collate

CPU = torch.device("cpu")
NARROW = {"local_attention": 8, "global_attn_every_n_layers": 2}
PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "distilbert": ("distilbert", {}),
    "roberta": ("roberta", {}),
    "roberta whose first position is 2": ("roberta", {"pad_token_id": 1}),
    "electra": ("electra", {"pad_token_id": 0, "embedding_size": 16}),
    "xlm-roberta": ("xlm-roberta", {"pad_token_id": 1}),
    "camembert": ("camembert", {"pad_token_id": 1}),
    "modernbert": ("modernbert", {}),
    "modernbert of means": ("modernbert", {"classifier_pooling": "mean"}),
    "modernbert of a narrow window": ("modernbert", NARROW),
    "modernbert of means and a narrow window": ("modernbert", NARROW | {"classifier_pooling": "mean"}),
}
LENGTHS = {
    "mixed": [1, 2, 5, 60, 33, 33, 7, 1],
    "equal": [9] * 6,
    "shortest": [1, 1, 2],
    "alone": [1],
    "long": [62, 61, 60, 62, 1],
}
BF16 = 2**-8


def make(name: str) -> PreTrainedModel:
    kind, changed = PACKED[name]
    return tiny.make_classifier(kind, **changed)


def make_batch(lengths: list[int], device: torch.device = CPU) -> Batch:
    split = tiny.make_split(lengths)
    return collate(split, np.arange(len(split)), device)


def logits_and_gradients(model: PreTrainedModel, forward: Forward, batch: Batch) -> tuple[Any, dict[str, Any]]:
    model.zero_grad()
    logits = forward(batch)
    functional.cross_entropy(logits, batch.label_ids).backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return logits.detach(), gradients


def far_apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Their distance, in lengths of the second."""
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))


@pytest.mark.parametrize("block_scores", [attention.BLOCK_SCORES, 300])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", PACKED)
def test_packed_texts_have_the_logits_and_gradients_of_padded_ones(
    name: str, lengths: str, block_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK_SCORES", block_scores)  # a few texts a block, and one
    model = make(name)
    forward = choose_forward(model)
    assert isinstance(forward, Packed)
    model.double().train()
    model.set_attn_implementation("sdpa")  # in float64, transformers' eager attention has NaN beyond a narrow window
    batch = make_batch(LENGTHS[lengths])
    found, gradients = logits_and_gradients(model, forward, batch)
    wanted, true_gradients = logits_and_gradients(model, Padded(model), batch)
    assert len(wanted.unique(dim=0)) == len(wanted)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert gradients.keys() == true_gradients.keys()
    whole = torch.cat([one.flatten() for one in true_gradients.values()]).norm()
    for parameter, gradient in true_gradients.items():
        limit = 1e-6 * gradient.norm() + 1e-9 * whole  # a key's bias has no gradient but for rounding
        assert (gradients[parameter] - gradient).norm() <= limit, parameter


@pytest.mark.parametrize("name", PACKED)
def test_in_bf16_they_differ_by_its_rounding(name: str) -> None:
    model = make(name)
    forward = choose_forward(model)
    batch = make_batch(LENGTHS["mixed"] + LENGTHS["long"])
    exact, exact_gradients = logits_and_gradients(model, forward, batch)
    cast(model, "bf16")
    for each in (forward, Padded(model)):
        found, gradients = logits_and_gradients(model, each, batch)
        assert found.dtype == torch.bfloat16
        assert far_apart(found.float(), exact) < 6 * BF16, type(each)
        whole = torch.cat([one.flatten() for one in exact_gradients.values()])
        assert far_apart(torch.cat([one.float().flatten() for one in gradients.values()]), whole) < 12 * BF16


def test_the_mean_of_a_long_text_is_rounded_once_and_not_at_every_token() -> None:
    model = tiny.make_classifier("modernbert", classifier_pooling="mean", max_position_embeddings=2048)
    forward = choose_forward(model)
    assert isinstance(forward, Packed)
    forward._spans = attention.Spans(np.array([1537]), CPU)
    states = torch.rand(1, 1537, 32, generator=torch.Generator().manual_seed(0)) + 1
    mean = forward._pool(states.bfloat16())
    assert mean.dtype == torch.bfloat16
    torch.testing.assert_close(mean[0, 0].float(), states[0].mean(0), rtol=BF16, atol=0)


def test_a_cast_model_keeps_the_frequencies_of_its_rotary_positions() -> None:
    model = tiny.make_classifier("modernbert")
    before = dict(model.named_buffers())
    cast(model, "bf16")
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    assert before
    assert all(one.dtype == before[name].dtype for name, one in model.named_buffers())


@pytest.mark.parametrize("kind", ["deberta-v2", "mpnet"])
def test_encoders_that_cannot_be_packed_are_padded(kind: str) -> None:
    model = tiny.make_classifier(kind)
    assert isinstance(choose_forward(model), Padded)
    logits = choose_forward(model)(make_batch([1, 30, 5]))
    torch.testing.assert_close(logits[:1], Padded(model)(make_batch([1])), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("bert", {"attention_probs_dropout_prob": 0.1}),
        ("distilbert", {"attention_dropout": 0.1}),
        ("modernbert", {"attention_dropout": 0.1}),
    ],
)
def test_dropout_inside_attention_is_not_forgotten(kind: str, changed: dict[str, float]) -> None:
    assert isinstance(choose_forward(tiny.make_classifier(kind, **changed)), Padded)
    kept = dict.fromkeys(changed, 0.0)
    assert isinstance(choose_forward(tiny.make_classifier(kind, **kept, hidden_dropout_prob=0.1)), Packed)


def without_positions(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = model.bert.embeddings.forward

    def counting_from_the_row(*arguments: Any, position_ids: Any = None, **named: Any) -> Any:
        rows = named["input_ids"].shape[1]
        return usual(*arguments, position_ids=torch.arange(rows)[None].clamp(max=65), **named)

    monkeypatch.setattr(model.bert.embeddings, "forward", counting_from_the_row)


def reads_the_last_token(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = model.bert.pooler.forward
    monkeypatch.setattr(model.bert.pooler, "forward", lambda states: usual(states.flip(1)))


def mixes_neighbours(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = model.bert.encoder.layer[0].intermediate
    usual = layer.forward
    monkeypatch.setattr(layer, "forward", lambda states: usual(states + states.roll(1, dims=1)))


@pytest.mark.parametrize("spoil", [without_positions, reads_the_last_token, mixes_neighbours])
def test_a_model_whose_packed_form_would_be_wrong_is_padded(spoil: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make_classifier()
    assert isinstance(choose_forward(model), Packed)
    spoil(model, monkeypatch)
    assert isinstance(choose_forward(model), Padded)


def test_a_decoder_is_padded() -> None:
    assert isinstance(choose_forward(tiny.make_classifier("bert", is_decoder=True)), Padded)


def test_a_head_that_gives_all_texts_the_same_logits_proves_nothing() -> None:
    model = tiny.make_classifier("bert", is_decoder=True)
    torch.nn.init.zeros_(model.classifier.weight)
    assert isinstance(choose_forward(model), Padded)


@pytest.mark.parametrize("name", PACKED)
def test_a_model_that_was_packed_is_as_it_was(name: str, tmp_path: Path) -> None:
    model = make(name).train()
    batch = make_batch(LENGTHS["mixed"])
    before = Padded(model)(batch)
    forward = choose_forward(model)
    forward(batch)
    assert model.training
    assert torch.equal(Padded(model)(batch), before)  # with its hooks still there
    model.save_pretrained(tmp_path)
    saved = (tmp_path / "config.json").read_text()
    assert attention.IMPLEMENTATION not in saved
    assert not {key for key in json.loads(saved) if "attn_implementation" in key}
    assert model.config._attn_implementation == "eager"
    forward.remove()
    assert torch.equal(Padded(model)(batch), before)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


def test_a_packed_pass_that_fails_leaves_the_model_as_it_was() -> None:
    model = tiny.make_classifier()
    forward, batch = choose_forward(model), make_batch([3, 5])
    before = Padded(model)(batch)
    with pytest.raises(IndexError):
        forward(Batch(batch.input_ids + 50, batch.lengths, batch.label_ids))
    assert torch.equal(Padded(model)(batch), before)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bert", "modernbert of a narrow window"])
def test_on_a_gpu_bf16_goes_through_its_own_kernel_and_agrees(name: str) -> None:
    device = torch.device("cuda")
    model = make(name).to(device)
    forward = choose_forward(model)
    assert isinstance(forward, Packed)
    batch = make_batch(LENGTHS["mixed"] + LENGTHS["long"], device)
    exact, exact_gradients = logits_and_gradients(model, forward, batch)
    cast(model, "bf16")
    found, gradients = logits_and_gradients(model, forward, batch)
    assert far_apart(found.float(), exact) < 6 * BF16
    whole = torch.cat([one.flatten() for one in exact_gradients.values()])
    assert far_apart(torch.cat([one.float().flatten() for one in gradients.values()]), whole) < 12 * BF16


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_the_last_layer_works_for_first_tokens_alone(kind: str) -> None:
    model = tiny.make_classifier(kind)
    forward, batch = choose_forward(model), make_batch([3, 5, 7])
    seen: list[tuple[int, ...]] = []
    for layer in model.base_model.encoder.layer:
        layer.intermediate.register_forward_hook(lambda module, states, output: seen.append(states[0].shape[:-1]))
    forward(batch)
    assert seen == [(1, 15), (1, 3)]
