"""What was said of texts before they were learned: each once an epoch, whatever happens to a step."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from scipy.special import softmax

from tuneserve.training import dynamics
from tuneserve.training.checkpoint import Checkpoints
from tuneserve.training.dynamics import Dynamics
from tuneserve.training.loop import Recipe, Run, fit_model
from tuneserve.training.world import ALONE, World

TEXTS = tiny.make_split([5, 9, 7, 6] * 10)
RECIPE = Recipe(epochs=2, batch_size=8, learning_rate=1e-3, max_norm=1.0, seed=3)


def test_the_mean_is_over_the_times_that_a_text_was_answered() -> None:
    seen = Dynamics(TEXTS, 3, seed=0)
    first, second = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 9.0]]), torch.tensor([[3.0, 1.0, 1.0]])
    seen.see(np.array([7, 2]), first)
    seen.see(np.array([2]), second)
    rows, mean = seen.mean(ALONE)
    assert rows.tolist() == [2, 7]
    assert mean[0] == pytest.approx((softmax(first[1].numpy()) + softmax(second[0].numpy())) / 2, rel=1e-5)
    assert mean[1] == pytest.approx(softmax(first[0].numpy()), rel=1e-5)


def test_of_more_texts_than_are_kept_the_same_sample_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = dynamics.draw_rows
    monkeypatch.setattr(dynamics, "draw_rows", lambda texts, seed: draw(texts, seed, most=11))
    seen, again = Dynamics(TEXTS, 3, seed=5), Dynamics(TEXTS, 3, seed=5)
    assert len(set(seen.rows.tolist())) == 11
    assert seen.rows.tolist() == again.rows.tolist() != Dynamics(TEXTS, 3, seed=6).rows.tolist()
    seen.see(np.arange(len(TEXTS)), torch.randn(len(TEXTS), 3))
    rows, mean = seen.mean(ALONE)
    assert rows.tolist() == seen.rows.tolist()
    assert mean.sum(1) == pytest.approx(np.ones(11), rel=1e-5)


def test_a_training_that_was_interrupted_has_seen_what_one_that_was_not_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def trained(folder: Path, *, looks: list[int]) -> tuple[Any, Any]:
        for after in [*looks, 10_000]:
            model, seen = tiny.make_classifier(), Dynamics(TEXTS, 3, seed=0)
            checkpoints = Checkpoints(folder, every_minutes=999)
            checkpoints.more = seen.tensors()
            asked = iter(range(100_000))
            run = Run(checkpoints, lambda asked=asked, after=after: next(asked) >= after, dynamics=seen)  # type: ignore[misc]
            tokens = {"train": TEXTS, "valid": TEXTS}
            finished = fit_model(model, tokens, ["a", "b", "c"], RECIPE, run, precision="fp32").finished
            assert finished == (after == 10_000)
        return seen.mean(ALONE)

    rows, mean = trained(tmp_path / "whole", looks=[])
    assert rows.tolist() == list(range(len(TEXTS)))
    again, same = trained(tmp_path / "interrupted", looks=[5, 3])
    assert sum("resuming" in one.getMessage() for one in caplog.records) == 2
    assert again.tolist() == rows.tolist()
    assert np.array_equal(mean, same)


def test_several_processes_add_up_what_each_has_seen() -> None:
    class Two(World):
        def add_up(self, tensor: torch.Tensor) -> None:
            tensor.mul_(2)  # the other one has seen the same

    seen = Dynamics(TEXTS, 3, seed=0)
    seen.see(np.array([4]), torch.tensor([[0.0, 1.0, 2.0]]))
    rows, mean = seen.mean(Two(size=2))
    assert rows.tolist() == [4]
    assert mean.sum() == pytest.approx(1)
    assert seen.tensors()["dynamics.counts"].sum() == 1  # a checkpoint still keeps its own
