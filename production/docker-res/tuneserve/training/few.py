"""Training on few texts: every one is learned from, and cross-validation says how far to trust what was learned.

A validation split of ten texts can neither choose nor calibrate anything. So nothing is held out:

1. The head begins as a logistic regression on what the untrained body says of the texts, which with a handful of texts
   is better than any fine-tuning (linear probing, then fine-tuning: Kumar et al., 2202.10054).
2. The whole model is trained from there on all texts but a fold's, and answers the fold's: at several shares of the
   way from where it began to where it ended (weights interpolated, Wortsman et al., 2109.01903).
3. The smallest share whose log loss, calibrated, is not surely worse than the best one's is taken, the model is trained
   on all texts, and the temperature is that of the answers to texts that were not learned from.
"""

import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from transformers import PreTrainedModel

from tuneserve.hardware import Precision
from tuneserve.network.forward import choose_forward
from tuneserve.training.calibration import fit_temperature
from tuneserve.training.checkpoint import NoCheckpoints, Position
from tuneserve.training.evaluation import EVALUATION_TOKENS, Array, predict_logits
from tuneserve.training.loop import Recipe, Run, fit_model
from tuneserve.training.model import last_linear
from tuneserve.training.tokens import TokenizedSplit, collate, sorted_batches
from tuneserve.training.world import World

logger = logging.getLogger(__name__)

FOLDS = 4
ENOUGH_HELD_OUT = 200
"""Texts that were held out once, from which on no further fold is trained for."""
LEARNED = 0.01
"""Training loss in nats below which another pass would only make the model surer."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the way from the logistic regression to the model as it was trained, in ascending order."""
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Inverse strengths of regularization (`C` of scikit-learn) that are tried, for features of mean square length 1."""
MOST_ITERATIONS = 500
TOLERANCE = 0.5
"""Standard errors by which a simpler model's log loss may be above the best one's."""

Weights = tuple[Array, Array]
"""Of a linear layer: [labels, channels] and [labels]."""


@dataclass(frozen=True)
class HeldOut:
    """Which training texts were answered by a model that had not learned from them, and how."""

    rows: Array
    """int64 [texts], ascending."""
    logits: Array
    """float [texts, labels], not yet divided by a temperature."""
    share: float
    """Of the way that was chosen."""
    folds: int
    seconds: float

    def record(self) -> dict[str, Any]:
        """What a version's metadata says of it."""
        return {
            "folds": self.folds,
            "texts": len(self.rows),
            "share_of_fine_tuning": self.share,
            "seconds": round(self.seconds, 3),
        }


def fit_few(
    model: PreTrainedModel,
    train: TokenizedSplit,
    labels: Sequence[str],
    recipe: Recipe,
    run: Run,
    *,
    precision: Precision,
    body: bool = True,
) -> tuple[Position, HeldOut | None]:
    """Train the model in place on all texts; see the module.

    Args:
        model: in fp32.
        train: all texts.
        labels: names by id.
        recipe: epochs, rates, seed; patience and the choice of an epoch mean nothing here.
        run: checkpoints of the last training, which learns from all texts; signals, trackers, other processes.
        precision: as `loop.fit`.
        body: whether it is trained, or the head alone.

    Returns:
        How far the last training came, and the answers to texts held out; None if the run was asked to stop.

    Raises:
        TrainingError: as `loop.fit`.
        StoreError: as `loop.fit`.
    """
    began = time.perf_counter()
    recipe = replace(recipe, patience=0, learned=LEARNED)
    folds = draw_folds(train.label_ids, recipe.seed)
    features = read_features(model, train)
    start: Start | None = None
    if features is not None:
        start = choose_start(features, train.label_ids, len(labels), folds, recipe.class_weights)
        logger.info("the head begins as a logistic regression on frozen features (C=%g)", start.strength)
    shares = SHARES if body else SHARES[:1]
    if start is None:
        shares = SHARES[-1:]
    apart = Run(NoCheckpoints(), run.stopping, world=run.world)
    held: list[Array] = []
    answers: list[Array] = []
    for number in asked(folds):
        rows, rest = np.flatnonzero(folds == number), np.flatnonzero(folds != number)
        logger.info("fold %d of %d: %d texts are held out", number + 1, FOLDS, len(rows))
        twin = copy.deepcopy(model)
        if start is not None:
            set_head(twin, start.fit(rest), run.world)
        at: list[Array] = []
        for _ in along(twin, train.select(rest), labels, recipe, apart, shares, precision):
            at.append(answer(twin, train.select(rows), len(labels), run.stopping, run.world))
        if run.world.any(run.stopping()):
            return Position(), None
        held.append(rows)
        answers.append(np.stack(at))
        del twin  # before the next one is made
    order = np.argsort(np.concatenate(held), kind="stable")
    rows, logits = np.concatenate(held)[order], np.concatenate(answers, axis=1)[:, order]
    chosen = choose(logits, train.label_ids[rows])
    found = HeldOut(rows, logits[chosen], shares[chosen], len(held), time.perf_counter() - began)
    right = float((found.logits.argmax(1) == train.label_ids[rows]).mean())
    logger.info(
        "%d texts are few: none is held out, %d-fold cross-validation took %.0f%% of the way from the logistic "
        "regression to fine-tuning (%.1f%% of %d held-out texts right)",
        *(len(train), FOLDS, 100 * found.share, 100 * right, len(rows)),
    )
    if start is not None:
        set_head(model, start.fit(np.arange(len(train))), run.world)
    *_, position = along(model, train, labels, recipe, run, [found.share], precision)
    if not position.finished:
        return position, None
    return replace(position, fit_s=position.fit_s or time.perf_counter() - began), found


def draw_folds(label_ids: Array, seed: int, *, folds: int = FOLDS) -> Array:
    """The fold of each text, int [texts], each label spread over all; -1, never held out, where it is its label's only.

    Args:
        label_ids: int [texts].
        seed: of the draw.
        folds: how many.
    """
    rng = np.random.default_rng([seed, folds])
    found = np.full(len(label_ids), -1)
    offset = 0
    for label in np.unique(label_ids):
        rows = rng.permutation(np.flatnonzero(label_ids == label))
        if len(rows) > 1:
            found[rows] = (offset + np.arange(len(rows))) % folds
            offset += len(rows)
    return found


def asked(folds: Array) -> list[int]:
    """The folds that are held out one after the other: none that is empty, and no more than are needed."""
    sizes = np.bincount(folds[folds >= 0], minlength=FOLDS)
    before = np.cumsum(sizes) - sizes
    return np.flatnonzero((sizes > 0) & (before < ENOUGH_HELD_OUT)).tolist()


@torch.inference_mode()
def read_features(model: PreTrainedModel, split: TokenizedSplit) -> Array | None:
    """What the last linear layer reads of each text, float32 [texts, channels]; None if it is not rows of numbers."""
    last = last_linear(model)
    if last is None:
        return None
    training = model.training
    model.eval()
    forward = choose_forward(model, learns=False)
    seen: list[torch.Tensor] = []
    hook = last.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    features = np.empty((len(split), last.in_features), dtype=np.float32)
    try:
        for rows in sorted_batches(split.lengths, EVALUATION_TOKENS):
            forward(collate(split, rows, model.device))
            states = seen.pop()
            if states.shape != (len(rows), last.in_features):
                return None
            features[rows] = states.float().cpu().numpy()
    finally:
        hook.remove()
        forward.remove()
        model.train(training)
    return features if np.isfinite(features).all() else None


@dataclass(frozen=True)
class Start:
    """A logistic regression as the weights of the last layer.

    Args:
        features: float [texts, channels].
        label_ids: int [texts].
        labels: how many there are.
        strength: the inverse strength of its regularization.
        class_weights: by label id.
    """

    features: Array
    label_ids: Array
    labels: int
    strength: float
    class_weights: Sequence[float] | None = None

    def fit(self, rows: Array) -> Weights:
        """The weights that these texts teach; a label that none of them has is as unlikely as the rarest."""
        features, label_ids = self.features[rows], self.label_ids[rows]
        scale = float(np.sqrt((features**2).sum(1).mean())) or 1.0
        known = np.unique(label_ids)
        weights = np.zeros((self.labels, features.shape[1]))
        bias = np.zeros(self.labels)
        if len(known) > 1:
            of_class = None if self.class_weights is None else {one: self.class_weights[one] for one in known}
            fitted = LogisticRegression(C=self.strength, max_iter=MOST_ITERATIONS, class_weight=of_class)
            fitted.fit(features / scale, label_ids)
            found, intercept = fitted.coef_ / scale, fitted.intercept_
            if len(known) == 2:  # scikit-learn gives the second label's alone
                found, intercept = np.concatenate([-found, found]) / 2, np.concatenate([-intercept, intercept]) / 2
            bias[:] = intercept.min()
            weights[known], bias[known] = found, intercept
        return weights, bias


def choose_start(
    features: Array, label_ids: Array, labels: int, folds: Array, class_weights: Sequence[float] | None
) -> Start:
    """The regression whose strength gives the least log loss on the folds that it has not seen."""
    best: tuple[float, Start] | None = None
    for strength in STRENGTHS:
        start = Start(features, label_ids, labels, strength, class_weights)
        loss = 0.0
        for number in asked(folds):
            rows = np.flatnonzero(folds == number)
            weights, bias = start.fit(np.flatnonzero(folds != number))
            loss += losses(features[rows] @ weights.T + bias, label_ids[rows]).sum()
        if best is None or loss < best[0]:
            best = loss, start
    assert best is not None
    return best[1]


@torch.no_grad()
def set_head(model: PreTrainedModel, weights: Weights, world: World) -> None:
    """Give the last layer these weights, in all processes those of the leading one."""
    last = last_linear(model)
    assert last is not None
    for parameter, values in zip((last.weight, last.bias), weights, strict=True):
        if parameter is None:
            continue
        given = torch.from_numpy(values).to(parameter) if world.leads else torch.zeros_like(parameter)
        world.add_up(given)
        parameter.copy_(given)


def along(
    model: PreTrainedModel,
    train: TokenizedSplit,
    labels: Sequence[str],
    recipe: Recipe,
    run: Run,
    shares: Sequence[float],
    precision: Precision,
) -> Iterator[Position]:
    """Train the model, and leave it at each of these shares of the way from where it was, one after the other."""
    if shares[0] == 0.0:
        tokens = int(train.starts[-1])
        yield Position(texts=len(train), tokens=tokens, padded_tokens=tokens, finished=True)
    later = [share for share in shares if share > 0.0]
    if not later:
        return
    before = {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}
    position = fit_model(model, {"train": train}, labels, recipe, run, precision=precision, validate=None)
    if not position.finished:
        yield position
        return
    after = {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}
    for share in later:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in after:
                    parameter.copy_(torch.lerp(before[name], after[name], share))
        yield position


def answer(
    model: PreTrainedModel, split: TokenizedSplit, labels: int, stopping: Callable[[], bool], world: World
) -> Array:
    """Logits float [texts, labels] of the model as it is."""
    training = model.training
    model.eval()
    forward = choose_forward(model, learns=False)
    logits = predict_logits(forward, split, labels=labels, device=model.device, stopping=stopping, world=world)
    forward.remove()
    model.train(training)
    return logits


def losses(logits: Array, label_ids: Array) -> Array:
    """The log loss of each text in nats, float [texts]."""
    found: Array = -log_softmax(np.asarray(logits, dtype=np.float64), axis=1)[np.arange(len(label_ids)), label_ids]
    return found


def choose(logits: Array, label_ids: Array) -> int:
    """The first of several models that is not worse than the best by more than TOLERANCE standard errors.

    Args:
        logits: float [models, texts, labels]; the simplest model first.
        label_ids: int [texts].
    """
    of_models = np.stack([losses(one / fit_temperature(one, label_ids), label_ids) for one in logits])
    best = of_models[of_models.mean(1).argmin()]
    worse = of_models - best
    error = worse.std(1, ddof=1) / np.sqrt(len(label_ids)) if len(label_ids) > 1 else np.zeros(len(logits))
    return int(np.argmax(worse.mean(1) <= TOLERANCE * error))
