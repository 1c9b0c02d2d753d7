"""The loop: its schedule, which epoch it keeps, and when it gives up."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import PreTrainedModel

from tuneserve.errors import TrainingError
from tuneserve.network.forward import choose_forward
from tuneserve.training.checkpoint import Checkpoints, Position
from tuneserve.training.loop import Recipe, Run, fit, warm_up_and_fall

LENGTHS = [5, 9, 12, 4, 7, 7, 20, 3]
STEPS = 3
"""Of an epoch, at three texts each."""
LOSS = {"loss", "learning_rate", "gradient_norm"}
"""What is recorded of a step."""


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
def test_the_rate_rises_to_its_peak_in_the_first_tenth_and_falls_to_nearly_nothing(steps: int) -> None:
    shares = [warm_up_and_fall(step, steps) for step in range(steps)]
    peak = shares.index(max(shares))
    assert max(shares) == 1
    assert peak <= max(1, steps // 10)
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert 0 < shares[-1] <= 1 / max(1, steps - peak - 1) + 1e-9


class Exam:
    """Validation figures that were decided beforehand, and the weights that were there when they were asked for."""

    def __init__(self, model: PreTrainedModel, scores: Sequence[tuple[float, ...]]) -> None:
        self.model, self.scores = model, scores
        self.weights: list[dict[str, torch.Tensor]] = []

    def __call__(self, *_: Any, **__: Any) -> dict[str, float]:
        f1, *accuracy, loss = self.scores[len(self.weights)]
        self.weights.append({name: one.detach().clone() for name, one in self.model.state_dict().items()})
        return {"validation_loss": loss, "validation_accuracy": (accuracy or [f1])[0], "validation_macro_f1": f1}


def run(
    folder: Path,
    scores: Sequence[tuple[float, ...]],
    *,
    model: PreTrainedModel | None = None,
    every_minutes: float = 10.0,
    stopping: Callable[[], bool] = lambda: False,
    record: Callable[[int, Mapping[str, float]], None] = lambda step, figures: None,
    **recipe: Any,
) -> tuple[PreTrainedModel, Exam, Position]:
    model = model or tiny.make_classifier()
    exam = Exam(model, scores)
    split = tiny.make_split(LENGTHS)
    named = {"epochs": len(scores), "batch_size": 3, "learning_rate": 1e-3, "max_norm": 1.0, "seed": 1} | recipe
    position = fit(
        model,
        choose_forward(model),
        {"train": split, "valid": split},
        ["a", "b", "c"],
        Recipe(**named),
        Run(Checkpoints(folder / "checkpoints", every_minutes=every_minutes), stopping, record),
        precision="fp32",
        validate=exam,
    )
    return model, exam, position


def same(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> bool:
    kept = {name.replace(".embedding.weight", ".weight"): one for name, one in weights.items()}
    return all(torch.equal(one, kept[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([(0.5, 1.0), (0.8, 1.0), (0.7, 1.0)], 2),
        ([(0.5, 1.0), (0.6, 1.0), (0.7, 9.0)], 3),
        ([(0.8, 0.5), (0.8, 0.4), (0.8, 0.6)], 2),
        ([(0.8, 0.5), (0.8, 0.5), (0.8, 0.5)], 1),
    ],
)
def test_the_best_epochs_weights_are_kept(tmp_path: Path, scores: list[tuple[float, float]], best: int) -> None:
    model, exam, position = run(tmp_path, scores)
    assert position.best_epoch == best
    assert [same(model, weights) for weights in exam.weights] == [epoch == best for epoch in (1, 2, 3)]


@pytest.mark.parametrize(("select_by", "best"), [("macro_f1", 1), ("accuracy", 2), ("loss", 3)])
def test_the_metric_that_is_selected_by_chooses_the_epoch(tmp_path: Path, select_by: str, best: int) -> None:
    figures = [(0.9, 0.6, 0.5), (0.7, 0.8, 0.5), (0.8, 0.7, 0.4)]  # macro F1, accuracy, loss
    model, exam, position = run(tmp_path, figures, select_by=select_by)
    assert position.best_epoch == best
    assert [same(model, weights) for weights in exam.weights] == [epoch == best for epoch in (1, 2, 3)]


def test_an_interrupted_run_still_selects_by_its_metric(tmp_path: Path) -> None:
    figures = [(0.7, 0.8, 0.5), (0.9, 0.6, 0.5)]
    named: dict[str, Any] = {"epochs": 2, "select_by": "accuracy"}
    seen: list[int] = []
    _, _, first = run(
        tmp_path,
        figures[:1],
        stopping=lambda: STEPS + 1 in seen,
        record=lambda step, _: seen.append(step),
        **named,
    )
    assert (first.epoch, first.step) == (1, 1)
    _, _, position = run(tmp_path, figures[1:], **named)
    assert (position.best_epoch, position.epoch) == (1, 2)


def test_patience_ends_a_run_that_no_longer_gets_better(tmp_path: Path) -> None:
    scores = [(0.5, 1.0), (0.7, 0.9), (0.6, 0.95), (0.6, 0.8), (0.6, 0.9), (0.7, 0.9), (0.9, 0.1)]
    model, exam, position = run(tmp_path, scores, patience=2)
    assert len(exam.weights) == 6  # the fourth had the lowest loss so far, the two after it nothing
    assert position.finished
    assert position.best_epoch == 2
    assert same(model, exam.weights[1])


class Killed(BaseException):
    """Stands for kill -9: nothing is done any more."""


@pytest.mark.parametrize("after", [1, STEPS, 2 * STEPS - 1, 2 * STEPS, 2 * STEPS + 2])
@pytest.mark.parametrize("killed", [False, True])
def test_an_interrupted_run_keeps_the_best_epochs_weights_too(tmp_path: Path, after: int, killed: bool) -> None:
    scores = [(0.5, 1.0), (0.8, 1.0), (0.7, 1.0)]
    whole, _, position = run(tmp_path / "whole", scores)
    assert position.best_epoch == 2
    seen: list[tuple[int, set[str]]] = []

    def record(step: int, figures: Mapping[str, float]) -> None:
        if killed and len([1 for _, names in seen if "loss" in names]) == after:
            raise Killed
        seen.append((step, set(figures)))

    named: dict[str, Any] = {"epochs": 3, "record": record, "every_minutes": 0.0 if killed else 10.0}
    if killed:
        with pytest.raises(Killed):
            run(tmp_path, scores, **named)
        done = sum("train_loss" in names for _, names in seen)
        killed = False
    else:
        _, _, position = run(tmp_path, scores, stopping=lambda: (after, LOSS) in seen, **named)
        assert not position.finished
        done = position.epoch
    model, _, position = run(tmp_path, scores[done:], **named)
    assert position.best_epoch == 2
    assert same(model, whole.state_dict())
    assert [step for step, names in seen if names == LOSS] == list(range(1, 3 * STEPS + 1))
    assert [step for step, names in seen if "validation_loss" in names] == [STEPS, 2 * STEPS, 3 * STEPS]
    assert all(place == 0 or seen[place - 1][0] <= step for place, (step, _) in enumerate(seen))


def test_a_run_that_is_over_is_not_trained_on(tmp_path: Path) -> None:
    scores = [(0.5, 1.0), (0.8, 1.0), (0.7, 1.0)]
    first, _, _ = run(tmp_path, scores)
    again, exam, position = run(tmp_path, [], epochs=3)
    assert exam.weights == []
    assert position.finished
    assert same(again, first.state_dict())


def test_a_head_that_was_sure_of_something_else_is_no_explosion(tmp_path: Path) -> None:
    """As when a base model is a classifier already, whose labels mean other things."""
    model = tiny.make_classifier()
    with torch.no_grad():
        model.classifier.bias += torch.tensor([0.0, 40.0, 0.0])
    _, _, position = run(tmp_path, [(0.5, 1.0)], model=model, batch_size=8)
    assert position.first_loss > 4 * np.log(3)


def test_a_loss_that_explodes_stops_the_run_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"loss (rose to|became) .+LR=1 is probably too high; try a third of it"):
        run(tmp_path, [(0.5, 1.0)] * 60, learning_rate=1.0, max_norm=1e9)
