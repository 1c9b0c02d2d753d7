"""The gradient of one optimizer step, made in as many parts as memory needs."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from tuneserve.errors import TrainingError
from tuneserve.network.forward import Forward
from tuneserve.network.optimizer import Optimizer
from tuneserve.training.tokens import Array, Batch, TokenizedSplit, collate, split_rows
from tuneserve.training.world import World

logger = logging.getLogger(__name__)

PART_TOKENS = {"cpu": 4096, "cuda": 1 << 20}
"""Most tokens that go through the model at once; a step of more is made in parts, its gradients added up. On a CPU
larger parts are no faster, and a signal is looked at between them."""
PART_WORK = 8e10
"""Most tokens times weights of a part on a CPU: at 0.2 TFLOP/s it takes 2.4 s, whatever the size of the model."""
LEAST_TOKENS = 256
"""Tokens of a part that no model is too large for."""
SMALLEST_PART = 64
"""Tokens below which memory is not short but missing."""

SHORT_OF_MEMORY = re.compile(
    r"can't allocate memory|bad_alloc|STATUS_ALLOC_FAILED"
    r"|could not (create a primitive$|execute a primitive|create a mem)"
)
"""How torch's allocator, C++, cuBLAS and oneDNN say it; the last has these words for other failures too, rarely."""


class ForwardBackward(Protocol):
    """What the training loop does with the texts of a part; it leaves their gradient in the model."""

    forward: Forward
    class_weights: torch.Tensor | None

    def __call__(self, batch: Batch, total_weight: torch.Tensor | int) -> torch.Tensor:
        """Return the loss of the part, as a share of the mean over the step, whose texts weigh `total_weight`."""
        ...


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


class Gradient:
    """The gradient of a step's loss, made in parts that memory holds.

    Out of memory, the step is begun again in parts of half the tokens; it stays the same step. Random numbers follow
    from the seed and the step, so that a step made again, or after a resumption, is made alike.
    """

    def __init__(
        self,
        learn: ForwardBackward,
        optimizer: Optimizer,
        train: TokenizedSplit,
        *,
        seed: int,
        stopping: Callable[[], bool],
        world: World,
    ) -> None:
        self.learn, self.optimizer, self.train, self.seed = learn, optimizer, train, seed
        self.stopping, self.world, self.lengths = stopping, world, train.lengths
        self.device = optimizer.gradient.device
        self.part_tokens = PART_TOKENS[self.device.type]
        if self.device.type == "cpu":
            bearable = int(PART_WORK / max(1, optimizer.gradient.numel()))
            self.part_tokens = min(self.part_tokens, max(LEAST_TOKENS, bearable))

    def of(self, rows: Array, number: int) -> Step:
        """Leave this process' share of the gradient of step `number`, over these rows, in the optimizer.

        Raises:
            TrainingError: memory does not even hold the smallest part.
        """
        step = None
        while step is None:
            seed = np.random.SeedSequence([self.seed, number, self.world.rank]).generate_state(1)[0]
            torch.manual_seed(int(seed))
            try:
                step = self._in_parts(rows)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                largest = min(self.part_tokens, int(self.lengths[rows].max()) * len(rows))
                if largest <= SMALLEST_PART:
                    raise TrainingError(f"Memory does not hold a part of {largest} tokens: {error}") from error
            if step is None:  # and here the failed attempt's tensors are gone, which the error's traceback held
                self.part_tokens = largest // 2
                self.optimizer.drop()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                logger.warning("out of memory: going on with at most %d tokens at a time", self.part_tokens)
        if not step.whole:
            self.optimizer.drop()
        figures = torch.tensor(
            [step.loss, step.padded_tokens, self.stopping()], dtype=torch.float64, device=self.device
        )
        self.world.add_up(figures)
        loss, padded_tokens, stop = figures.tolist()
        stop = stop > 0 or not step.whole
        return Step(int(self.lengths[rows].sum()), int(padded_tokens), loss, stop=stop, whole=step.whole)

    def _in_parts(self, rows: Array) -> Step:
        train = self.train
        label_ids = torch.from_numpy(train.label_ids[rows]).to(self.device)
        weights = self.learn.class_weights
        total_weight = len(rows) if weights is None else weights[label_ids].sum()
        words = np.unique(np.concatenate([train.text_ids(row) for row in rows])).astype(np.int64)
        self.optimizer.begin(torch.from_numpy(words).to(self.device))
        loss, padded_tokens = torch.zeros((), device=self.device), 0
        for part in split_rows(rows[self.world.rank :: self.world.size], self.lengths, self.part_tokens):
            if self.world.size == 1 and self.stopping():
                return Step(whole=False)
            batch = collate(train, part, self.device)
            loss += self.learn(batch, total_weight)
            self.optimizer.collect()
            longest, tokens = int(batch.lengths.max()), int(batch.lengths.sum())
            padded_tokens += len(part) * longest if self.learn.forward.pads else tokens
        return Step(padded_tokens=padded_tokens, loss=float(loss))


def is_out_of_memory(error: Exception) -> bool:
    """Whether a library failed for want of memory; on a CPU, and in cuBLAS, they only say so in words."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or SHORT_OF_MEMORY.search(str(error)) is not None
