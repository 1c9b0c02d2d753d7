"""Training that was interrupted, on disk: weights, optimizer, and the position in the data.

Random states are not in it: the order of the texts follows from the seed and the epoch, dropout from the seed and
the step. One safetensors file a checkpoint, replaced whole; its header holds what is not a tensor, as JSON. No pickles.
"""

import json
import logging
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tuneserve.artifact import is_disk_error
from tuneserve.errors import StoreError
from tuneserve.files import new_file
from tuneserve.network.optimizer import Optimizer
from tuneserve.training.world import World

logger = logging.getLogger(__name__)

OTHER_RUNS = 2
"""Runs with other settings or data whose checkpoints are kept, so that one may return to them."""
KEPT = 2
"""Checkpoints kept of one run: the newest, and the one before in case the newest cannot be read."""
BEST = "best.safetensors"


@dataclass(frozen=True)
class Step:
    """What a step has seen: its tokens, those with padding included; the mean loss over all processes.

    `stop`: a process was asked to stop. Not `whole`: that was in its middle, and there is no gradient.
    """

    tokens: int = 0
    padded_tokens: int = 0
    loss: float = 0.0
    stop: bool = False
    whole: bool = True


@dataclass
class Position:
    """How far a run has come: `step` batches into `epoch` (both from 0), and what it has seen.

    `first_loss` is that of the untrained model; `padded_tokens` includes padding; `best_epoch` counts from 1, 0 being
    none yet; `part_tokens` is the loop's, 0 being its default.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    first_loss: float = 0.0
    smooth_loss: float = 0.0
    texts: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    fit_s: float = 0.0
    part_tokens: int = 0
    best_epoch: int = 0
    idle_epochs: int = 0
    finished: bool = False
    history: list[dict[str, float]] = field(default_factory=list)

    def count_step(self, texts: int, step: Step, *, seconds: float) -> None:
        """One more batch is learned."""
        if self.texts == 0:
            self.first_loss = self.smooth_loss = step.loss
        self.smooth_loss = 0.95 * self.smooth_loss + 0.05 * step.loss
        self.step += 1
        self.texts += texts
        self.tokens += step.tokens
        self.padded_tokens += step.padded_tokens
        self.fit_s += seconds
        self.loss_sum += step.loss * texts

    @property
    def best(self) -> dict[str, float] | None:
        """The figures of the best epoch so far."""
        return self.history[self.best_epoch - 1] if self.best_epoch else None

    def record(self) -> dict[str, Any]:
        """What a version's metadata says of its run."""
        return {
            "history": self.history,
            "best_epoch": self.best_epoch,
            "fit_s": round(self.fit_s, 3),
            "tokens_per_s": round(self.tokens / self.fit_s, 1),
            "padding_share": round(1 - self.tokens / self.padded_tokens, 4),
        }

    def count_epoch(self, figures: dict[str, float], *, better: bool, epochs: int, patience: int) -> None:
        """One more epoch is validated; `better`: it is the best so far."""
        before = [one["validation_loss"] for one in self.history if "validation_loss" in one]
        moved = better or figures.get("validation_loss", math.inf) < min(before, default=math.inf)
        self.history.append(figures)
        self.epoch, self.step, self.loss_sum = self.epoch + 1, 0, 0.0
        self.best_epoch = self.epoch if better else self.best_epoch
        self.idle_epochs = 0 if moved else self.idle_epochs + 1
        self.finished = self.epoch >= epochs or (patience > 0 and self.idle_epochs >= patience)


class Checkpoints:
    """The checkpoints of one run, in a folder of their own; tensors that are not the optimizer's stand in `more`."""

    def __init__(self, folder: Path, *, every_minutes: float) -> None:
        self.folder = folder
        self.more: dict[str, torch.Tensor] = {}
        self._every_s = every_minutes * 60
        self._saved = time.monotonic()
        self._on_disk = ""

    def due(self) -> bool:
        """Whether the interval has passed since the last one."""
        return time.monotonic() - self._saved >= self._every_s

    def save(self, position: Position, optimizer: Optimizer, world: World) -> None:
        """Write a checkpoint and remove all but the newest two; only the leading process writes.

        Nothing is written where nothing was learned since the last one, or since the start.

        Raises:
            StoreError: the disk refuses.
        """
        self._saved = time.monotonic()
        content = json.dumps(asdict(position))
        if world.leads and content != self._on_disk:
            name = f"{position.epoch:05d}-{position.step:08d}.safetensors"
            self._write(name, optimizer.tensors() | self.more, {"position": content})
            self._on_disk = content
            for old in self._newest_first()[KEPT:]:
                old.unlink(missing_ok=True)

    def restore(self, optimizer: Optimizer, world: World) -> Position:
        """Load the newest checkpoint that is whole; without one, the position of a fresh start.

        Raises:
            StoreError: the disk refuses.
        """
        position = "{}"
        for unfinished in self.folder.glob(".*") if world.leads else []:  # a process was killed while it wrote
            unfinished.unlink(missing_ok=True)
        for path in self._newest_first() if world.leads else []:
            try:
                header = _read(path, optimizer.tensors() | self.more)
            except Exception as error:
                if is_disk_error(error):
                    raise StoreError(f"The checkpoint {path} cannot be read: {error}") from error
                if not isinstance(error, (SafetensorError, ValueError)):  # want of memory is not the file's fault
                    raise
                logger.warning("%s is damaged and left out: %s", path, error)
                path.unlink(missing_ok=True)
                continue
            position = header["position"]
            break
        found = Position(**json.loads(world.broadcast_text(position)))
        for tensor in optimizer.tensors().values():
            world.broadcast(tensor)
        optimizer.refresh()
        self._on_disk = json.dumps(asdict(found))
        return found

    def save_best(self, optimizer: Optimizer, world: World) -> None:
        """Keep the weights as the best so far.

        Raises:
            StoreError: the disk refuses.
        """
        if world.leads:
            self._write(BEST, optimizer.weights_alone(), {})

    def load_best(self, optimizer: Optimizer, world: World) -> None:
        """Give the leading process the weights that were kept as the best.

        Raises:
            StoreError: they cannot be read.
        """
        if world.leads:
            try:
                _read(self.folder / BEST, optimizer.weights_alone())
            except Exception as error:
                raise StoreError(f"The best epoch's weights cannot be read from {self.folder}: {error}") from error
            optimizer.refresh()

    def _write(self, name: str, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with new_file(self.folder / name) as temporary:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, metadata=header)
        except Exception as error:
            if is_disk_error(error):
                raise StoreError(f"The checkpoint cannot be written to {self.folder}: {error}") from error
            raise

    def forget_others(self) -> None:
        """Remove the checkpoints of runs that were left unfinished before the newest `OTHER_RUNS`."""
        others = [path for path in self.folder.parent.glob("[!.]*") if path != self.folder and path.is_dir()]
        for old in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)[OTHER_RUNS:]:
            logger.info("removing %s: the checkpoints of a run that was left unfinished", old)
            shutil.rmtree(old, ignore_errors=True)

    def remove(self) -> None:
        """Forget the run: it is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.safetensors"), reverse=True)


def _read(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Copy what a file holds into the tensors; nothing is changed unless it holds all of them, in their shapes."""
    with safe_open(path, framework="pt") as file:
        found = {name: file.get_tensor(name) for name in tensors}
        header = file.metadata() or {}
    if any(found[name].shape != tensor.shape for name, tensor in tensors.items()):
        raise ValueError(f"{path} is of another model")
    for name, tensor in tensors.items():
        tensor.copy_(found[name])
    return dict(header)


class NoCheckpoints(Checkpoints):
    """Nothing is kept: of a training that is begun again when it was interrupted."""

    def __init__(self) -> None:
        super().__init__(Path(os.devnull), every_minutes=math.inf)

    def save(self, *_: object) -> None:
        """Forget it."""

    def restore(self, *_: object) -> Position:
        """Start afresh."""
        return Position()

    def save_best(self, *_: object) -> None:
        """Forget it."""

    def load_best(self, *_: object) -> None:
        """Stay with the last epoch."""
