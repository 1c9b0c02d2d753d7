"""Checkpoints on disk: whole ones, torn ones, and what a killed process leaves."""

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from tuneserve.errors import StoreError
from tuneserve.lifecycle.status import Status
from tuneserve.network.optimizer import Optimizer
from tuneserve.training import checkpoint
from tuneserve.training.checkpoint import Checkpoints, Position, Step
from tuneserve.training.world import ALONE, World


@pytest.fixture
def optimizer() -> Iterator[Optimizer]:
    with Optimizer(tiny.make_classifier(), learning_rate=1e-3, max_norm=1.0, precision="bf16") as optimizer:
        yield optimizer


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "run", every_minutes=10)


def save(checkpoints: Checkpoints, optimizer: Optimizer, *, step: int) -> None:
    """A checkpoint whose tensors all hold the step's number."""
    for tensor in optimizer.tensors().values():
        tensor.fill_(step)
    checkpoints.save(Position(epoch=1, step=step, history=[{"validation_loss": 0.1}]), optimizer, ALONE)


def files(checkpoints: Checkpoints) -> list[Path]:
    return sorted(checkpoints.folder.iterdir())


def test_the_newest_is_restored_and_the_two_newest_are_kept(checkpoints: Checkpoints, optimizer: Optimizer) -> None:
    assert checkpoints.restore(optimizer, ALONE) == Position()
    for step in (1, 2, 10):
        save(checkpoints, optimizer, step=step)
    assert [path.name for path in files(checkpoints)] == ["00001-00000002.safetensors", "00001-00000010.safetensors"]
    for tensor in optimizer.tensors().values():
        tensor.zero_()
    assert checkpoints.restore(optimizer, ALONE) == Position(epoch=1, step=10, history=[{"validation_loss": 0.1}])
    assert all((tensor == 10).all() for tensor in optimizer.tensors().values())
    assert (optimizer.weights == 10).all()  # what the model computes with, too


def test_nothing_is_written_where_nothing_was_learned(checkpoints: Checkpoints, optimizer: Optimizer) -> None:
    position = checkpoints.restore(optimizer, ALONE)
    checkpoints.save(position, optimizer, ALONE)
    assert not checkpoints.folder.exists()
    save(checkpoints, optimizer, step=1)
    written = files(checkpoints)[0].stat().st_mtime_ns
    again = Checkpoints(checkpoints.folder, every_minutes=10)
    again.save(again.restore(optimizer, ALONE), optimizer, ALONE)
    assert files(checkpoints)[0].stat().st_mtime_ns == written


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_a_torn_one_is_left_out_and_the_one_before_is_taken(
    checkpoints: Checkpoints, optimizer: Optimizer, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for step in (1, 2):
        save(checkpoints, optimizer, step=step)
    newest = files(checkpoints)[-1]
    newest.write_bytes(newest.read_bytes()[:-1] if content is None else content)
    assert checkpoints.restore(optimizer, ALONE).step == 1
    assert all((tensor == 1).all() for tensor in optimizer.tensors().values())
    assert f"{newest} is damaged and left out" in caplog.text
    assert newest not in files(checkpoints)


def test_one_of_another_model_changes_nothing(checkpoints: Checkpoints, optimizer: Optimizer) -> None:
    save(checkpoints, optimizer, step=1)
    other = tiny.make_classifier(intermediate_size=48)
    with Optimizer(other, learning_rate=1e-3, max_norm=1.0, precision="fp32") as wider:
        before = {name: tensor.clone() for name, tensor in wider.tensors().items()}
        assert checkpoints.restore(wider, ALONE) == Position()
        assert all(torch.equal(before[name], tensor) for name, tensor in wider.tensors().items())


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError(), RuntimeError("can't allocate")])
def test_one_that_cannot_be_read_just_now_is_not_thrown_away(
    checkpoints: Checkpoints, optimizer: Optimizer, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    save(checkpoints, optimizer, step=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_read", fail)
        with pytest.raises(StoreError if isinstance(error, OSError) else type(error)):
            checkpoints.restore(optimizer, ALONE)
    assert checkpoints.restore(optimizer, ALONE).step == 1


def test_what_a_killed_process_left_half_written_is_cleared_away(
    checkpoints: Checkpoints, optimizer: Optimizer
) -> None:
    save(checkpoints, optimizer, step=1)
    checkpoints.save_best(optimizer, ALONE)
    whole = files(checkpoints)
    (checkpoints.folder / ".00001-00000002.safetensors-0123abcd").write_bytes(b"half")
    (checkpoints.folder / ".best.safetensors-0123abcd").write_bytes(b"half")
    assert checkpoints.restore(optimizer, ALONE).step == 1
    assert files(checkpoints) == whole


def test_the_best_weights_come_back_without_the_moments(checkpoints: Checkpoints, optimizer: Optimizer) -> None:
    for tensor in optimizer.tensors().values():
        tensor.fill_(3)
    checkpoints.save_best(optimizer, ALONE)
    for tensor in optimizer.tensors().values():
        tensor.fill_(4)
    checkpoints.load_best(optimizer, ALONE)
    found = {name: float(tensor.float().mean()) for name, tensor in optimizer.tensors().items()}
    assert {name for name, value in found.items() if value == 3} == {"masters", "rows.table"}
    assert (optimizer.weights == 3).all()
    (checkpoints.folder / checkpoint.BEST).unlink()
    with pytest.raises(StoreError, match="The best epoch's weights cannot be read from"):
        checkpoints.load_best(optimizer, ALONE)


def test_a_full_disk_is_said_and_the_last_one_stays(optimizer: Optimizer, disk: Any) -> None:
    checkpoints = Checkpoints(disk.path / "run", every_minutes=10)
    save_size = sum(tensor.nbytes for tensor in optimizer.tensors().values())
    assert save_size > 256 * 1024  # more than the disk holds
    with pytest.raises(StoreError, match="The checkpoint cannot be written to"):
        save(checkpoints, optimizer, step=1)
    assert files(checkpoints) == []


def test_a_disk_that_has_become_read_only_is_said(optimizer: Optimizer, disk: Any) -> None:
    checkpoints = Checkpoints(disk.path / "run", every_minutes=10)
    checkpoints.folder.mkdir()
    with Status(disk.path / "training.json") as status:
        disk.make_read_only()
        status.phase("training")  # what waits for a training can be told nothing more; that is no reason to end it
        with pytest.raises(StoreError, match="The checkpoint cannot be written to"):
            save(checkpoints, optimizer, step=1)


def test_one_is_due_when_its_time_has_passed_since_the_last(
    tmp_path: Path, optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("tuneserve.training.checkpoint.time.monotonic", lambda: now[0])
    checkpoints = Checkpoints(tmp_path, every_minutes=10)
    for saved in (1000, 1600):
        for seconds, due in ((599, False), (600, True), (601, True)):
            now[0] = saved + seconds
            assert checkpoints.due() == due
        now[0] = saved + 600
        save(checkpoints, optimizer, step=saved)


class Follower(World):
    """A process whose leader has found a checkpoint of step 3, with 3 in all tensors."""

    def broadcast_text(self, text: str) -> str:
        assert text == "{}"
        return json.dumps({"step": 3})

    def broadcast(self, tensor: torch.Tensor) -> None:
        tensor.fill_(3)


def test_only_the_leading_process_reads_and_writes(checkpoints: Checkpoints, optimizer: Optimizer) -> None:
    save(checkpoints, optimizer, step=1)
    (checkpoints.folder / ".what another process writes now").touch()
    whole = files(checkpoints)
    follower = Follower(rank=1)
    other = Checkpoints(checkpoints.folder, every_minutes=10)
    assert other.restore(optimizer, follower) == Position(step=3)
    assert all((tensor == 3).all() for tensor in optimizer.tensors().values())
    assert (optimizer.weights == 3).all()
    other.save(Position(step=2), optimizer, follower)
    other.save_best(optimizer, follower)
    other.load_best(optimizer, follower)
    assert files(checkpoints) == whole
    checkpoints.remove()
    assert not checkpoints.folder.exists()
    checkpoints.remove()  # again, where there is nothing


def test_a_position_counts_what_its_steps_have_seen() -> None:
    position = Position()
    assert position.best is None
    position.count_step(4, Step(tokens=40, padded_tokens=50, loss=2.0), seconds=0.5)
    position.count_step(2, Step(tokens=10, padded_tokens=33, loss=1.0), seconds=0.2504)
    assert position.smooth_loss == pytest.approx(1.95)
    counted = Position(step=2, texts=6, tokens=50, padded_tokens=83, fit_s=0.7504, loss_sum=10.0, first_loss=2.0)
    assert replace(position, smooth_loss=0.0) == counted
    assert position.record() == {
        "history": [],
        "best_epoch": 0,
        "fit_s": 0.75,
        "tokens_per_s": 66.6,
        "padding_share": 0.3976,
    }


@pytest.mark.parametrize(
    ("patience", "losses", "better", "best", "idle", "finished"),
    [
        (0, [1.0], [1], 1, 0, False),
        (0, [1.0, 1.0, 1.0, 1.0], [1, 0, 0, 0], 1, 3, False),
        (0, [1.0, 1.0, 1.0, 1.0, 1.0], [1, 0, 0, 0, 0], 1, 4, True),  # all of its epochs
        (2, [1.0, 1.0], [1, 0], 1, 1, False),
        (2, [1.0, 1.0, 1.1], [1, 0, 0], 1, 2, True),
        (2, [1.0, 1.0, 0.9], [1, 0, 0], 1, 0, False),  # not the best, but its loss still falls
        (2, [1.0, 0.8, 0.9, 1.1], [1, 1, 0, 1], 4, 0, False),
        (1, [1.0, 1.1], [1, 0], 1, 1, True),
    ],
)
def test_a_training_ends_after_its_epochs_or_where_its_patience_does(
    patience: int, losses: list[float], better: list[int], best: int, idle: int, finished: bool
) -> None:
    position = Position(step=7, loss_sum=3.0)
    for loss, one in zip(losses, better, strict=True):
        assert not position.finished
        position.count_epoch({"validation_loss": loss}, better=bool(one), epochs=5, patience=patience)
    history = [{"validation_loss": loss} for loss in losses]
    assert position.best == history[best - 1]
    assert position == Position(
        epoch=len(losses), best_epoch=best, idle_epochs=idle, finished=finished, history=history
    )


def test_of_other_unfinished_runs_the_newest_two_are_kept(checkpoints: Checkpoints, optimizer: Optimizer) -> None:
    save(checkpoints, optimizer, step=1)
    os.utime(checkpoints.folder, (0, 0))
    for day, name in enumerate(("c", "a", "d", "b"), 1):
        (folder := checkpoints.folder.with_name(name)).mkdir()
        os.utime(folder, (day, day))
    checkpoints.forget_others()
    assert {path.name for path in checkpoints.folder.parent.iterdir()} == {checkpoints.folder.name, "b", "d"}
    assert files(checkpoints)
