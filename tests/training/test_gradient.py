"""The gradient of a step: the same whatever the parts, and whatever memory there is."""

import copy
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from tuneserve.errors import TrainingError
from tuneserve.network.forward import Forward, Packed, Padded, choose_forward
from tuneserve.network.optimizer import Optimizer
from tuneserve.training.checkpoint import NoCheckpoints, Step
from tuneserve.training.dynamics import Dynamics
from tuneserve.training.loop import Gradient, Learner, Recipe, Run, is_out_of_memory
from tuneserve.training.tokens import Batch, collate
from tuneserve.training.world import ALONE, World

CPU = torch.device("cpu")
LENGTHS = [3, 30, 30, 4, 17, 1, 60, 9, 9, 22]
SPLIT = tiny.make_split(LENGTHS)
ROWS = np.random.default_rng(0).permutation(len(LENGTHS))
RECIPE = Recipe(epochs=1, batch_size=len(LENGTHS), learning_rate=1e-3, max_norm=1.0, seed=1)


class Short(Packed):
    """Has memory for so many tokens; with more it fails in a layer's backward pass, when others have their gradient."""

    def __init__(self, model: PreTrainedModel, tokens: int) -> None:
        super().__init__(model)
        self.tokens, self.tried = tokens, list[int]()
        model.bert.encoder.layer[0].register_forward_hook(self.watch)

    def __call__(self, batch: Batch) -> torch.Tensor:
        self.tried.append(int(batch.lengths.sum()))
        return super().__call__(batch)

    def watch(self, layer: torch.nn.Module, states: Any, output: torch.Tensor) -> None:
        output.register_hook(self.allocate)

    def allocate(self, gradient: torch.Tensor) -> None:
        if self.tried[-1] > self.tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@contextmanager
def a_gradient(
    forward: Callable[[PreTrainedModel], Forward] = choose_forward,
    *,
    recipe: Recipe = RECIPE,
    stopping: Callable[[], bool] = lambda: False,
    world: World = ALONE,
    dynamics: Dynamics | None = None,
    part_tokens: int = 10_000,
    **model: Any,
) -> Iterator[Gradient]:
    classifier = tiny.make_classifier(**model).train()
    with Optimizer(classifier, learning_rate=1e-3, max_norm=1.0, precision="fp32") as optimizer:
        learn = Learner(forward(classifier), recipe, CPU)
        run = Run(NoCheckpoints(), stopping, world=world, dynamics=dynamics)
        gradient = Gradient(learn, optimizer, SPLIT, run, seed=recipe.seed)
        gradient.part_tokens = part_tokens
        yield gradient


def all_of(gradient: Gradient) -> torch.Tensor:
    rows = gradient.optimizer.rows
    assert rows is not None
    return torch.cat([gradient.optimizer.gradient, rows.gradient.flatten()])


def plain(model: PreTrainedModel, recipe: Recipe) -> tuple[float, torch.Tensor]:
    """Loss and gradient's norm as torch has them, over the whole batch at once."""
    batch = collate(SPLIT, ROWS, CPU)
    weights = None if recipe.class_weights is None else torch.tensor(recipe.class_weights)
    loss = functional.cross_entropy(
        Padded(model)(batch), batch.label_ids, weights, label_smoothing=recipe.label_smoothing
    )
    loss.backward()
    return loss.item(), torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None]).norm()


@pytest.mark.parametrize(("weights", "tokens"), [(1, 4096), (10_800_000, 4096), (86_000_000, 930), (1 << 30, 256)])
def test_a_large_model_gets_smaller_parts_for_signals_are_looked_at_between_them(weights: int, tokens: int) -> None:
    optimizer = SimpleNamespace(gradient=torch.zeros(1).expand(weights))
    gradient = Gradient(Padded, optimizer, SPLIT, Run(NoCheckpoints()), seed=1)  # type: ignore[arg-type]
    assert gradient.part_tokens == tokens


@pytest.mark.parametrize("part_tokens", [1, 70, 10_000])
@pytest.mark.parametrize("kind", ["bert", "mpnet"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("class_weights", [None, [0.2, 1.0, 4.0]])
def test_loss_and_gradient_are_torchs_mean_over_the_batch_whatever_the_parts(
    part_tokens: int, kind: str, label_smoothing: float, class_weights: list[float] | None
) -> None:
    recipe = Recipe(**vars(RECIPE) | {"class_weights": class_weights, "label_smoothing": label_smoothing})
    loss, norm = plain(tiny.make_classifier(kind), recipe)
    with a_gradient(recipe=recipe, part_tokens=part_tokens, kind=kind) as gradient:
        step = gradient.of(ROWS, 0)
        assert step.loss == pytest.approx(loss, rel=1e-5)
        assert float(all_of(gradient).norm()) == pytest.approx(float(norm), rel=1e-4)
        assert step.tokens == sum(LENGTHS)
        padded = {1: sum(LENGTHS), 10_000: 60 * len(LENGTHS)}
        assert step.padded_tokens == (sum(LENGTHS) if kind == "bert" else padded.get(part_tokens, step.padded_tokens))
        assert (step.stop, step.whole) == (False, True)


def test_out_of_memory_the_step_is_made_in_smaller_parts_and_stays_the_same(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with a_gradient() as gradient:
        wanted = gradient.of(ROWS, 0), all_of(gradient)
    with a_gradient(lambda model: Short(model, 100)) as gradient:
        step, found = gradient.of(ROWS, 0), all_of(gradient)
        assert [record.getMessage() for record in caplog.records] == [
            f"out of memory: going on with at most {tokens} tokens at a time" for tokens in (300, 150)
        ]
        tried = gradient.learn.forward.tried
        refused, parts = tried[:2], tried[2:]
        assert min(refused) > 100 >= max(parts)
        assert sum(parts) == sum(LENGTHS)
        gradient.of(ROWS, 1)
        assert gradient.learn.forward.tried == [*refused, *parts, *parts]  # it does not try in vain again
    assert step.loss == pytest.approx(wanted[0].loss, rel=1e-5)
    assert step.padded_tokens == wanted[0].padded_tokens
    torch.testing.assert_close(found, wanted[1], rtol=1e-4, atol=1e-6)


def test_when_memory_does_not_hold_the_smallest_part_the_run_ends_and_says_so() -> None:
    with (
        a_gradient(lambda model: Short(model, 0)) as gradient,
        pytest.raises(TrainingError, match=r"Memory does not hold a part of \d\d tokens: CUDA out of memory"),
    ):
        gradient.of(ROWS, 0)


def test_other_errors_are_no_want_of_memory() -> None:
    with a_gradient() as gradient:
        gradient.learn.forward = lambda batch: (_ for _ in ()).throw(RuntimeError("of another kind"))
        with pytest.raises(RuntimeError, match="of another kind"):
            gradient.of(ROWS, 0)


@pytest.mark.parametrize("allocate", [lambda: torch.empty(1 << 60, dtype=torch.int8), lambda: np.ones(1 << 50)])
def test_want_of_memory_is_recognized(allocate: Callable[[], Any]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as found:
        allocate()
    assert is_out_of_memory(found.value)


@pytest.mark.parametrize(
    ("words", "short"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("could not create a primitive", True),  # oneDNN, whose kernels are compiled into memory too
        ("could not create a primitive descriptor for a matmul primitive", False),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_want_of_memory_is_known_by_its_words(words: str, short: bool) -> None:
    assert is_out_of_memory(RuntimeError(words)) is short


def test_what_a_part_needed_is_free_before_the_next() -> None:
    class Held(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
            ctx.kept = torch.zeros(1)
            kept.append(weakref.ref(ctx.kept))
            return logits.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient + ctx.kept

    class Watched(Packed):
        def __call__(self, batch: Batch) -> torch.Tensor:
            assert [one() for one in kept] == [None] * len(kept)
            return Held.apply(super().__call__(batch))

    kept: list[Any] = []
    with a_gradient(Watched, part_tokens=60) as gradient:
        gradient.of(ROWS, 0)
    assert len(kept) > 4


def test_dropout_follows_from_the_seed_and_the_step() -> None:
    def gradient_of(step: int, **changed: Any) -> torch.Tensor:
        with a_gradient(recipe=Recipe(**vars(RECIPE) | changed), hidden_dropout_prob=0.3) as gradient:
            torch.rand(step)  # whatever was drawn before does not matter
            gradient.of(ROWS, step)
            return all_of(gradient)

    assert torch.equal(gradient_of(3), gradient_of(3))
    assert not torch.equal(gradient_of(3), gradient_of(4))
    assert not torch.equal(gradient_of(3), gradient_of(3, seed=2))


def test_a_signal_is_seen_between_the_parts_and_the_step_is_forgotten() -> None:
    asked: list[bool] = []
    with a_gradient(stopping=lambda: bool(asked.append(True)) or len(asked) > 3, part_tokens=30) as gradient:
        step = gradient.of(ROWS, 0)
        assert step == Step(tokens=sum(LENGTHS), stop=True, whole=False)
        assert len(asked) == 5
        assert all(one.grad is None for one in gradient.optimizer.parameters)
        assert len(gradient.optimizer.rows.gradient) == 0


@pytest.mark.parametrize("texts", [10, 1])
def test_the_shares_of_two_processes_add_up_to_the_whole(texts: int) -> None:
    class Other(World):
        def add_up(self, tensor: torch.Tensor) -> None:
            """Nobody else is there."""

    found = []
    for world in (ALONE, Other(0, 2), Other(1, 2)):
        with a_gradient(world=world, part_tokens=70) as gradient:
            gradient.optimizer.gradient.fill_(7.0)  # what an earlier step left
            step = gradient.of(ROWS[:texts], 0)
            if not gradient.optimizer._collected:  # then `step` of the optimizer clears it
                gradient.optimizer.gradient.zero_()
            found.append((all_of(copy.copy(gradient)), step.loss, step.padded_tokens))
    (whole, loss, padded_tokens), *shares = found
    torch.testing.assert_close(shares[0][0] + shares[1][0], whole, rtol=1e-4, atol=1e-6)
    assert shares[0][1] + shares[1][1] == pytest.approx(loss, rel=1e-5)
    assert shares[0][2] + shares[1][2] == padded_tokens


def test_each_text_of_a_step_is_seen_once_also_out_of_memory() -> None:
    seen = Dynamics(SPLIT, 3, seed=0)
    with torch.no_grad():
        wanted = Padded(tiny.make_classifier())(collate(SPLIT, range(len(SPLIT)), CPU)).softmax(1).numpy()
    with a_gradient(lambda model: Short(model, 100), dynamics=seen) as gradient:
        gradient.of(ROWS, 0)
        assert len(gradient.learn.forward.tried) > 2  # it was begun again
    assert seen.tensors()["dynamics.counts"].tolist() == [1] * len(SPLIT)
    assert seen.mean(ALONE)[1] == pytest.approx(wanted, abs=1e-5)


def test_a_step_that_was_broken_off_is_not_seen() -> None:
    seen, looks = Dynamics(SPLIT, 3, seed=0), iter([False, False, True, True])
    with a_gradient(dynamics=seen, stopping=lambda: next(looks), part_tokens=60) as gradient:
        assert not gradient.of(ROWS, 0).whole
    assert seen.tensors()["dynamics.counts"].sum() == 0
