"""A version that can be asked: texts in, predictions out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuneserve.artifact import Version
from tuneserve.errors import TuneserveError
from tuneserve.serving.engine import Engine
from tuneserve.tokenization import TextEncoder, Tokens

Array = np.ndarray[Any, np.dtype[Any]]

BATCH_TEXTS = 32
"""Texts that go through the engine together."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to one text: the likeliest label, the probability of each, and how much of the text was read."""

    label: str
    scores: dict[str, float]
    tokens: int
    truncated: bool
    model_version: str


class Classifier:
    """Tokenizer, engine and label names of one version. Not for several threads at once."""

    def __init__(self, version: Version, engine: Engine) -> None:
        self.version = version
        self._engine = engine
        self._encoder = TextEncoder.from_folder(
            version.folder, max_tokens=version.metadata["settings"]["num_max_positions"]
        )
        config = json.loads((version.folder / "config.json").read_text(encoding="utf-8"))
        self._pad_id = config.get("pad_token_id") or 0

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """Classify texts; the answers come in their order, in batches of like length inside.

        Raises:
            TuneserveError: the engine gave a figure that is not a number.
        """
        tokens = self._encoder.encode(texts)
        order = sorted(range(len(tokens)), key=lambda place: len(tokens[place].ids))
        predictions: dict[int, Prediction] = {}
        for first in range(0, len(order), BATCH_TEXTS):
            places = order[first : first + BATCH_TEXTS]
            for place, row in zip(places, self._probabilities([tokens[place] for place in places]), strict=True):
                predictions[place] = self._describe(tokens[place], row)
        return [predictions[place] for place in range(len(texts))]

    def _probabilities(self, tokens: list[Tokens]) -> Array:
        longest = max(len(one.ids) for one in tokens)
        input_ids = np.full((len(tokens), longest), self._pad_id, dtype=np.int64)
        mask = np.zeros_like(input_ids)
        for row, one in enumerate(tokens):
            input_ids[row, : len(one.ids)] = one.ids
            mask[row, : len(one.ids)] = 1
        logits = self._engine.infer(input_ids, mask).astype(np.float64)
        if not np.isfinite(logits).all():
            raise TuneserveError("The model gave a figure that is not a number.")
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities: Array = odds / odds.sum(axis=1, keepdims=True)
        return probabilities

    def _describe(self, tokens: Tokens, probabilities: Array) -> Prediction:
        labels = self.version.labels
        return Prediction(
            label=labels[int(probabilities.argmax())],
            scores=dict(zip(labels, probabilities.tolist(), strict=True)),
            tokens=len(tokens.ids),
            truncated=tokens.truncated,
            model_version=self.version.id,
        )
