"""From tokens to trained weights: the whole network, or the head over a body that stays as it is."""

import copy
import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from tuneserve.code import code_hash
from tuneserve.hardware import Precision
from tuneserve.network.forward import Forward, cast, choose_forward
from tuneserve.settings import Settings
from tuneserve.training import features
from tuneserve.training.checkpoint import Checkpoints, Position
from tuneserve.training.evaluation import predict_logits, score_epoch
from tuneserve.training.loop import Recipe, fit
from tuneserve.training.model import freeze_body
from tuneserve.training.tokens import TokenizedSplit
from tuneserve.training.world import World

logger = logging.getLogger(__name__)

FEATURES_CODE = (
    "text.py",
    "network",
    *(f"training/{name}.py" for name in ("features", "model", "recipe", "tokens")),
)
"""What makes a frozen body's features; an edit in it makes them anew."""
HEAD_PASSES = 100
"""Most passes over a frozen body's features; N_EPOCHS may ask for more."""
HEAD_PATIENCE = 5
"""Passes without a better validation after which the head has converged."""


@dataclass(frozen=True)
class Run:
    """One training, as the settings want it."""

    settings: Settings
    model: PreTrainedModel
    tokens: Mapping[str, TokenizedSplit]
    labels: list[str]
    precision: Precision
    checkpoints: Checkpoints
    stopping: Callable[[], bool]
    world: World
    record: Callable[[int, Mapping[str, float]], None] = lambda step, figures: None

    def learn(self) -> Position:
        """Train all that needs a gradient."""
        forward = choose_forward(self.model)
        seen = self._fit(self.model, forward, self.tokens, self.recipe(), self.precision)
        forward.remove()
        return seen

    def learn_head(self, base: str) -> Position:
        """Train what follows the body's last hidden state, on features that are made once; `base` names the body.

        Passes go on until the validation has not improved for a while: they cost next to nothing.
        """
        freeze_body(self.model)
        began = time.perf_counter()
        body = copy.deepcopy(self.model).eval()
        encoder = features.Encoder(body, choose_forward(body, learns=False))
        head = features.Head(self.model)
        if not features.agree(encoder, head):
            logger.info("the head of this model cannot be trained by itself: every pass goes through the body")
            return self.learn()
        cast(body, self.precision)
        tables = {}
        for name in features.SPLITS:
            folder = self.settings.data_path / "features" / self._key(base, self.tokens[name])
            tables[name] = features.encode(encoder, self.tokens[name], folder, stopping=self.stopping)
            if self.stopping():
                return Position()
        encoded_s = time.perf_counter() - began
        recipe = replace(
            self.recipe(),
            epochs=max(HEAD_PASSES, self.settings.n_epochs),
            patience=self.recipe().patience or HEAD_PATIENCE,
        )
        forward = features.LookUp(head, tables, self.model.device)
        seen = self._fit(head, forward, features.as_splits(self.tokens), recipe, "fp32")
        tokens = int(self.tokens["train"].starts[-1])
        return replace(seen, fit_s=seen.fit_s + encoded_s, tokens=tokens, places=tokens)

    def recipe(self) -> Recipe:
        """The settings as the training loop takes them."""
        settings, train = self.settings, self.tokens["train"]
        weights = None
        if settings.class_weights == "balanced":
            sizes = np.bincount(train.label_ids, minlength=len(self.labels))
            weights = (len(train) / (len(self.labels) * sizes)).tolist()
        return Recipe(
            epochs=settings.n_epochs,
            batch_size=settings.batch_size,
            learning_rate=settings.lr,
            max_norm=settings.max_norm,
            seed=settings.seed,
            class_weights=weights,
            label_smoothing=settings.label_smoothing,
            patience=settings.patience,
            select_by=settings.select_by,
        )

    def _fit(
        self,
        model: nn.Module,
        forward: Forward,
        tokens: Mapping[str, TokenizedSplit],
        recipe: Recipe,
        precision: Precision,
    ) -> Position:
        def validate() -> dict[str, float]:
            logits = predict_logits(
                forward,
                tokens["valid"],
                labels=len(self.labels),
                device=self.model.device,
                stopping=self.stopping,
                world=self.world,
            )
            return score_epoch(logits, tokens["valid"].label_ids, self.labels)

        return fit(
            model,
            forward,
            tokens["train"],
            recipe,
            precision=precision,
            validate=validate,
            checkpoints=self.checkpoints,
            stopping=self.stopping,
            record=self.record,
            world=self.world,
        )

    def _key(self, base: str, split: TokenizedSplit) -> str:
        key = hashlib.sha256(f"{base} {self.precision} {code_hash(*FEATURES_CODE)}".encode())
        for array in (split.starts, split.ids):
            key.update(np.ascontiguousarray(array).view(np.uint8).data)
        return key.hexdigest()[:32]
