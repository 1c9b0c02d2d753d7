"""The training loop, written out.

`fit` goes over epochs and batches, `Gradient` over the parts of a step, and `Learner` is forward, loss and backward.
They are read together, which is why the module is a little long.
"""

import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from tuneserve.errors import TrainingError
from tuneserve.hardware import Precision
from tuneserve.network.forward import Forward, choose_forward
from tuneserve.network.optimizer import Optimizer
from tuneserve.progress import Progress
from tuneserve.training.checkpoint import Checkpoints, Position, Step
from tuneserve.training.dynamics import Dynamics
from tuneserve.training.evaluation import validate
from tuneserve.training.model import loss_of
from tuneserve.training.tokens import Array, Batch, TokenizedSplit, collate, shuffled_batches, split_rows
from tuneserve.training.world import ALONE, World

logger = logging.getLogger(__name__)

WARMUP_FRACTION = 0.1
EXPLODED = 4.0
"""Times the loss of plain guessing, or of the untrained model if that is worse; a smoothed loss beyond it does not come
back."""

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

INTERRUPTED = "interrupted in epoch %d after batch %d of %d; the same command goes on from there"


@dataclass(frozen=True)
class Recipe:
    """How to train; `learning_rate` is the body's peak, `class_weights` go by label id.

    `patience` counts epochs without a better validation after which training ends; 0 is never. `select_by` names the
    validation metric that chooses the best epoch. Without validation, training ends after an epoch whose loss is below
    `learned`.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    max_norm: float
    seed: int
    class_weights: Sequence[float] | None = None
    label_smoothing: float = 0.0
    patience: int = 0
    select_by: Literal["macro_f1", "accuracy", "loss"] = "macro_f1"
    learned: float = 0.0


@dataclass(frozen=True)
class Run:
    """What a training is surrounded by.

    Args:
        checkpoints: where this run's are kept.
        stopping: asked after each step and, in one process, between the parts of a step.
        record: told the figures of each step and epoch.
        world: the processes that train together; each takes its share of every batch.
        dynamics: told what the model says of texts before it learns from them.
    """

    checkpoints: Checkpoints
    stopping: Callable[[], bool] = lambda: False
    record: Callable[[int, Mapping[str, float]], None] = lambda step, figures: None
    world: World = ALONE
    dynamics: Dynamics | None = None


def fit_model(
    model: PreTrainedModel,
    tokens: Mapping[str, TokenizedSplit],
    labels: Sequence[str],
    recipe: Recipe,
    run: Run,
    *,
    precision: Precision,
    validate: Callable[..., dict[str, float]] | None = validate,
) -> Position:
    """Train all of the model that needs a gradient, the fastest way that it can be fed; see `fit`."""
    forward = choose_forward(model)
    position = fit(model, forward, tokens, labels, recipe, run, precision=precision, validate=validate)
    forward.remove()
    return position


def fit(
    model: nn.Module,
    forward: Forward,
    tokens: Mapping[str, TokenizedSplit],
    labels: Sequence[str],
    recipe: Recipe,
    run: Run,
    *,
    precision: Precision,
    validate: Callable[..., dict[str, float]] | None = validate,
) -> Position:
    """Train `model` in place, on the device it is on, and leave it with its best epoch's weights, in fp32.

    A run that was interrupted goes on where its newest checkpoint stands. When `stopping` answers yes, the run saves
    one more and returns early: then `finished` of the position is false.

    Args:
        model: in fp32; parameters that need no gradient stay as they are.
        forward: how a batch goes through it.
        tokens: `train`, of which every epoch sees each text once, and `valid`.
        labels: names by id.
        recipe: epochs, rates, seed.
        run: checkpoints, signals, trackers, other processes.
        precision: of the model's products; master weights, word embeddings and the optimizer stay fp32.
        validate: figures at the end of an epoch, `validation_loss` and the metric that the recipe selects by; None
            where no texts are held out: then the last epoch's weights are taken.

    Raises:
        TrainingError: the loss is not a finite number any more, or memory does not hold a single text.
        StoreError: a checkpoint cannot be written.
    """
    train, checkpoints, world = tokens["train"], run.checkpoints, run.world
    steps = math.ceil(len(train) / recipe.batch_size)
    guess = math.log(max(2, int(train.label_ids.max()) + 1))
    with Optimizer(
        model, learning_rate=recipe.learning_rate, max_norm=recipe.max_norm, precision=precision
    ) as optimizer:
        position = checkpoints.restore(optimizer, world)
        if position.texts:
            logger.info("resuming in epoch %d after batch %d of %d", position.epoch + 1, position.step, steps)
        learn = Learner(forward, recipe, optimizer.gradient.device)
        gradient = Gradient(learn, optimizer, train, run, seed=recipe.seed)
        gradient.part_tokens = position.part_tokens or gradient.part_tokens

        while not position.finished:
            order = np.random.default_rng([recipe.seed, position.epoch])
            batches = shuffled_batches(train.lengths, recipe.batch_size, order)
            title = f"epoch {position.epoch + 1}/{recipe.epochs}"
            model.train()
            with Progress(title, total=len(train), done=position.step * recipe.batch_size) as progress:
                for rows in batches[position.step :]:
                    began = time.perf_counter()
                    done = position.epoch * steps + position.step
                    step = gradient.of(rows, done)
                    if step.whole:
                        share = warm_up_and_fall(done, steps * recipe.epochs)
                        norm = optimizer.step(share, world.add_up)
                        position.part_tokens = gradient.part_tokens
                        position.count_step(len(rows), step, seconds=time.perf_counter() - began)
                        _require_sense(position, step.loss, norm, guess, recipe.learning_rate)
                        progress.advance(len(rows), loss=step.loss)
                        rate = recipe.learning_rate * share
                        run.record(done + 1, {"loss": step.loss, "learning_rate": rate, "gradient_norm": norm})
                    if step.stop or checkpoints.due():
                        checkpoints.save(position, optimizer, world)
                    if step.stop:
                        logger.info(INTERRUPTED, position.epoch + 1, position.step, steps)
                        return position
            figures = {"train_loss": position.loss_sum / len(train)}
            last = position.epoch + 1 == recipe.epochs or figures["train_loss"] < recipe.learned
            if validate is not None or last:
                optimizer.settle()
            model.eval()
            if validate is not None:
                figures |= validate(
                    forward, tokens["valid"], labels, device=gradient.device, stopping=run.stopping, world=world
                )
            if world.any(run.stopping()):
                checkpoints.save(position, optimizer, world)
                logger.info(INTERRUPTED, position.epoch + 1, position.step, steps)
                return position
            logger.info("epoch=%d; %s", position.epoch + 1, " ".join(f"{k}={v:.4f};" for k, v in figures.items()))
            run.record(position.epoch * steps + steps, figures)
            if validate is None:
                better = last
            else:
                better = position.best is None or rank(figures, recipe.select_by) > rank(
                    position.best, recipe.select_by
                )
            position.count_epoch(figures, better=better, epochs=recipe.epochs, patience=recipe.patience)
            position.finished |= validate is None and last
            if better and not position.finished:
                checkpoints.save_best(optimizer, world)
            if validate is not None or last:  # few texts have many short epochs
                checkpoints.save(position, optimizer, world)
        if position.best_epoch != position.epoch:
            logger.info("epoch %d was the best: its weights are taken", position.best_epoch)
            checkpoints.load_best(optimizer, world)
    return position


class Gradient:
    """The gradient of a step's loss, made in parts that memory holds.

    Out of memory, the step is begun again in parts of half the tokens; it stays the same step. Random numbers follow
    from the seed and the step, so that a step made again, or after a resumption, is made alike.
    """

    def __init__(
        self,
        learn: "Learner",
        optimizer: Optimizer,
        train: TokenizedSplit,
        run: Run,
        *,
        seed: int,
    ) -> None:
        self.learn, self.optimizer, self.train, self.seed = learn, optimizer, train, seed
        self.stopping, self.world, self.dynamics, self.lengths = run.stopping, run.world, run.dynamics, train.lengths
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
        answers: list[tuple[Array, torch.Tensor]] = []
        for part in split_rows(rows[self.world.rank :: self.world.size], self.lengths, self.part_tokens):
            if self.world.size == 1 and self.stopping():
                return Step(whole=False)
            batch = collate(train, part, self.device)
            part_loss, logits = self.learn(batch, total_weight)
            loss += part_loss
            answers.append((part, logits))
            self.optimizer.collect()
            longest, tokens = int(batch.lengths.max()), int(batch.lengths.sum())
            padded_tokens += len(part) * longest if self.learn.forward.pads else tokens
        if self.dynamics is not None:  # the step is whole; one that is begun again has been seen once
            for part, logits in answers:
                self.dynamics.see(part, logits)
        return Step(padded_tokens=padded_tokens, loss=float(loss))


class Learner:
    """Forward, loss and backward of a step, or of so many of its texts as memory holds at once."""

    def __init__(self, forward: Forward, recipe: Recipe, device: torch.device) -> None:
        self.forward, self.label_smoothing = forward, recipe.label_smoothing
        weights = recipe.class_weights
        self.class_weights = None if weights is None else torch.tensor(weights, device=device)

    def __call__(self, batch: Batch, total_weight: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
        """Leave the gradient in the model, and return loss and logits; `total_weight` is that of the step's texts."""
        logits = self.forward(batch).float()
        losses = loss_of(
            logits, batch.label_ids, class_weights=self.class_weights, label_smoothing=self.label_smoothing
        )
        loss = losses.sum() / total_weight
        loss.backward()
        return loss.detach(), logits.detach()  # all else is freed with this function's names, before the next part


def is_out_of_memory(error: Exception) -> bool:
    """Whether a library failed for want of memory; on a CPU, and in cuBLAS, they only say so in words."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or SHORT_OF_MEMORY.search(str(error)) is not None


def rank(figures: Mapping[str, float], select_by: str) -> tuple[float, float]:
    """What makes one epoch better than another: a higher metric or a lower loss, and a lower loss at equal metrics."""
    loss = figures["validation_loss"]
    return (-loss if select_by == "loss" else figures[f"validation_{select_by}"]), -loss


def warm_up_and_fall(step: int, steps: int) -> float:
    """Share of the peak rate at a step: a linear rise over the first tenth of all steps, then a linear fall to zero."""
    warm_up = max(1, round(steps * WARMUP_FRACTION))
    return (step + 1) / warm_up if step < warm_up else (steps - step) / max(1, steps - warm_up)


def _require_sense(position: Position, loss: float, norm: float, guess: float, learning_rate: float) -> None:
    reason = ""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        reason = f"The loss became {loss}, its gradient's norm {norm}"
    elif position.smooth_loss > EXPLODED * max(guess, position.first_loss):
        reason = f"The loss rose to {position.smooth_loss:.3g}, where plain guessing has {guess:.3g}"
    if reason:
        raise TrainingError(
            f"{reason}, in epoch {position.epoch + 1} at batch {position.step}. "
            f"LR={learning_rate:g} is probably too high; try a third of it."
        )
