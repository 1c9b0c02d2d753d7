"""The optimizer against torch's own AdamW over all weights, which is what it stands for."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from torch.nn import functional
from torch.optim import AdamW
from transformers import PreTrainedModel

from tuneserve.network.forward import choose_forward
from tuneserve.network.optimizer import Optimizer
from tuneserve.training.model import freeze_body
from tuneserve.training.tokens import Batch, collate

CPU = torch.device("cpu")
WORDS, STEPS, TEXTS = 60, 30, 10
NEVER, RARE = 59, 58
EMBEDDING = "bert.embeddings.word_embeddings.weight"


def batches(steps: int = STEPS) -> Iterator[Batch]:
    """A batch a step: every word now and then, `RARE` in each eighth batch, `NEVER` in none."""
    for step in range(steps):
        split = tiny.make_split([3, 9, 4, 1, 7, 5, 5, 2, 8, 3], words=RARE, seed=step)
        if step % 8 == 3:
            split.ids[::5] = RARE
        yield collate(split, list(range(TEXTS)), CPU)


def loss(model: PreTrainedModel, batch: Batch, *, of: int = TEXTS) -> torch.Tensor:
    input_ids, mask = batch.padded(0)
    logits = model(input_ids=input_ids, attention_mask=mask).logits.float()
    return functional.cross_entropy(logits, batch.label_ids, reduction="sum") / of


def step(optimizer: Optimizer, model: PreTrainedModel, batch: Batch, share: float = 1.0) -> float:
    optimizer.begin(batch.input_ids.unique())
    loss(model, batch).backward()
    optimizer.collect()
    return optimizer.step(share)


def train(model: PreTrainedModel, *, learning_rate: float = 1e-3, max_norm: float = 1e9, **named: Any) -> Any:
    """The weights after all steps; the model keeps its own."""
    model = copy.deepcopy(model)
    steps = named.pop("steps", STEPS)
    precision = named.pop("precision", "fp32")
    with Optimizer(model, learning_rate=learning_rate, max_norm=max_norm, precision=precision) as optimizer:
        for batch in batches(steps):
            step(optimizer, model, batch)
        optimizer.settle()
    return weights(model)


def train_plainly(model: PreTrainedModel, *, learning_rate: float = 1e-3, max_norm: float = 1e9) -> Any:
    """The same with torch's own optimizer, which moves every row at every step."""
    model = copy.deepcopy(model)
    groups = []
    for name, parameter in model.named_parameters():
        head = name.startswith(("classifier.", "bert.pooler."))
        decays = parameter.ndim == 2 and name != EMBEDDING
        rate = learning_rate * (3 if head else 1)
        groups.append({"params": [parameter], "lr": rate, "weight_decay": 0.01 if decays else 0.0})
    optimizer = AdamW(groups)
    for batch in batches():
        optimizer.zero_grad()
        loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return weights(model)


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def strayed(found: torch.Tensor, wanted: torch.Tensor, start: torch.Tensor) -> float:
    """How far from where it should be, as a share of the way there."""
    return float((found - wanted).norm() / (wanted - start).norm())


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny.make_classifier(words=WORDS).eval()


@pytest.mark.parametrize("max_norm", [1e9, 0.5])
def test_dense_weights_are_those_of_plain_adamw(model: PreTrainedModel, max_norm: float) -> None:
    model.get_input_embeddings().weight.requires_grad = False
    before, found, wanted = weights(model), train(model, max_norm=max_norm), train_plainly(model, max_norm=max_norm)
    for name in found:
        if name == EMBEDDING:
            assert torch.equal(found[name], before[name])
        elif "key.bias" not in name:  # its gradient is rounding alone, and Adam makes steps of that
            assert strayed(found[name], wanted[name], before[name]) < 1e-4, name


def test_rows_that_are_rarely_read_go_where_plain_adamw_takes_them(model: PreTrainedModel) -> None:
    before, found, wanted = weights(model), train(model), train_plainly(model)
    rows, true_rows, first_rows = (one[EMBEDDING] for one in (found, wanted, before))
    assert strayed(rows, true_rows, first_rows) < 0.03
    assert strayed(rows[RARE], true_rows[RARE], first_rows[RARE]) < 0.05
    assert strayed(found["classifier.weight"], wanted["classifier.weight"], before["classifier.weight"]) < 0.01


def test_the_moments_of_every_row_are_those_of_plain_adamw(model: PreTrainedModel) -> None:
    plain = copy.deepcopy(model)
    adamw = AdamW(plain.parameters(), lr=0.0, weight_decay=0.0)
    with Optimizer(model, learning_rate=1e-12, max_norm=1e9, precision="fp32") as optimizer:
        for batch in batches():
            step(optimizer, model, batch)
            adamw.zero_grad()
            loss(plain, batch).backward()
            adamw.step()
        for _ in range(2):  # the second time, nothing is left to do
            optimizer.settle()
        wanted = adamw.state[plain.get_input_embeddings().weight]
        for name in ("exp_avg", "exp_avg_sq"):
            found, true = optimizer.tensors()[f"rows.{name}"], wanted[name]
            torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-4 * float(true.abs().max()))


def test_rows_that_are_never_read_stay_as_they_are(model: PreTrainedModel) -> None:
    rows = train(model)[EMBEDDING]
    assert torch.equal(rows[NEVER], weights(model)[EMBEDDING][NEVER])
    moved = (rows != weights(model)[EMBEDDING]).any(dim=1)
    assert moved[5 : RARE + 1].all()


def test_the_gradient_is_clipped_at_its_norm_over_all_weights(model: PreTrainedModel) -> None:
    [batch] = batches(1)
    plain = copy.deepcopy(model)
    loss(plain, batch).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(plain.parameters(), 1e9))
    moments = {}
    for max_norm in (norm * 2, norm / 4):
        clipped = copy.deepcopy(model)
        with Optimizer(clipped, learning_rate=1e-3, max_norm=max_norm, precision="fp32") as optimizer:
            assert step(optimizer, clipped, batch) == pytest.approx(norm, rel=1e-5)
            tensors = optimizer.tensors()
            moments[max_norm] = torch.cat(
                [one.flatten() for name, one in tensors.items() if name.endswith("exp_avg")]
            ).norm()
    assert moments[norm * 2] == pytest.approx(0.1 * norm, rel=1e-5)
    assert moments[norm / 4] == pytest.approx(0.1 * norm / 4, rel=1e-5)


@pytest.mark.parametrize("parts", [1, 5])
def test_a_step_in_parts_is_the_same_step(model: PreTrainedModel, parts: int) -> None:
    whole, pieces = copy.deepcopy(model), copy.deepcopy(model)
    split = tiny.make_split([3, 9, 4, 1, 7, 5, 5, 2, 8, 3], words=RARE)
    batch = collate(split, list(range(TEXTS)), CPU)
    with (
        Optimizer(whole, learning_rate=1e-3, max_norm=0.5, precision="fp32") as one,
        Optimizer(pieces, learning_rate=1e-3, max_norm=0.5, precision="fp32") as other,
    ):
        other.gradient.fill_(7.0)  # what an earlier step left
        norm = step(one, whole, batch)
        other.begin(batch.input_ids.unique())
        for first in range(parts):
            loss(pieces, collate(split, list(range(first, TEXTS, parts)), CPU)).backward()
            other.collect()
        assert other.step(1.0) == pytest.approx(norm, rel=1e-5)
        torch.testing.assert_close(other.gradient, one.gradient, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(other.rows.exp_avg, one.rows.exp_avg, rtol=1e-4, atol=1e-7)


def test_weights_that_the_loss_does_not_depend_on_stay(model: PreTrainedModel) -> None:
    model.idle = torch.nn.Parameter(torch.ones(2))
    [batch] = batches(1)
    with Optimizer(model, learning_rate=1e-3, max_norm=1.0, precision="fp32") as optimizer:
        optimizer.gradient.fill_(7.0)  # what an earlier step left
        step(optimizer, model, batch)
    assert torch.equal(model.idle, torch.ones(2))


def test_a_dropped_step_leaves_no_trace(model: PreTrainedModel) -> None:
    first, second = batches(2)
    found = []
    for dropped in (False, True):
        trained = copy.deepcopy(model)
        with Optimizer(trained, learning_rate=1e-3, max_norm=1.0, precision="fp32") as optimizer:
            step(optimizer, trained, first)
            if dropped:
                optimizer.begin(second.input_ids.unique())
                loss(trained, second).backward()
                optimizer.collect()
                loss(trained, second).backward()
                optimizer.drop()
            step(optimizer, trained, second)
        found.append(weights(trained))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_optimizer_goes_on_from_its_tensors(model: PreTrainedModel, precision: Any) -> None:
    named: dict[str, Any] = {"learning_rate": 1e-3, "max_norm": 1.0, "precision": precision}
    other, saved = copy.deepcopy(model), {}
    whole = train(model, max_norm=1.0, precision=precision)
    with Optimizer(copy.deepcopy(model), **named) as optimizer:
        for batch in list(batches())[:11]:
            step(optimizer, optimizer.model, batch)
        saved = {name: one.clone() for name, one in optimizer.tensors().items()}
    with Optimizer(other, **named) as optimizer:
        for name, one in optimizer.tensors().items():
            one.copy_(saved[name])
        optimizer.refresh()
        for batch in list(batches())[11:]:
            step(optimizer, other, batch)
        optimizer.settle()
    assert all(torch.equal(one, whole[name]) for name, one in weights(other).items())


def test_in_bf16_the_model_computes_with_a_rounded_copy_of_fp32_weights(model: PreTrainedModel) -> None:
    [batch] = batches(1)
    with Optimizer(model, learning_rate=1e-3, max_norm=1.0, precision="bf16") as optimizer:
        step(optimizer, model, batch)
        assert {one.dtype for one in model.parameters() if one.requires_grad} == {torch.bfloat16}
        assert {one.dtype for one in optimizer.tensors().values() if one.is_floating_point()} == {torch.float32}
        assert torch.equal(optimizer.weights, optimizer.masters.bfloat16())
        inside = model(input_ids=batch.input_ids[None]).logits
        assert inside.dtype == torch.bfloat16
        masters = optimizer.masters.clone()
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    assert all(one.requires_grad for one in model.parameters())
    names = {name for name, _ in model.named_parameters()}
    assert EMBEDDING in names
    assert sum(one.numel() for name, one in model.named_parameters() if name != EMBEDDING) == len(masters)
    assert torch.equal(torch.sort(torch.cat([o.flatten() for o in optimizer.parameters]))[0], torch.sort(masters)[0])
    assert (masters != masters.bfloat16()).any()


def test_steps_too_small_for_bf16_add_up(model: PreTrainedModel) -> None:
    scale = "bert.encoder.layer.0.output.LayerNorm.weight"  # of ones, whose neighbour in bf16 is 1.0078
    found, wanted = train(model, learning_rate=2e-5, precision="bf16"), train(model, learning_rate=2e-5)
    assert (found[scale] - 1).abs().max() < 1e-3
    assert strayed(found[scale], wanted[scale], weights(model)[scale]) < 0.05
    assert strayed(found[EMBEDDING], wanted[EMBEDDING], weights(model)[EMBEDDING]) < 0.05


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_weights_come_back_to_the_bit(model: PreTrainedModel, precision: Any) -> None:
    freeze_body(model)
    before, found = weights(model), train(model, precision=precision)
    moved = {name for name in found if not torch.equal(found[name], before[name])}
    assert moved == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("kind", [*tiny.KINDS, "convbert"])
def test_within_a_step_the_model_reads_the_words_it_always_reads(kind: str) -> None:
    """Padding included: ConvBERT's convolutions look at it."""
    padding = {} if kind in tiny.KINDS else {"pad_token_id": 0}
    model = tiny.make_classifier(kind, words=WORDS, **padding).eval()
    forward = choose_forward(model)
    [batch] = batches(1)
    with Optimizer(model, learning_rate=1e-3, max_norm=1.0, precision="fp32") as optimizer, torch.no_grad():
        usual = forward(batch)
        optimizer.begin(batch.input_ids.unique())
        torch.testing.assert_close(forward(batch), usual, rtol=0, atol=1e-6)
