"""The classifier as a Model: an encoder whose outputs are logits, and its answers labels with their probabilities."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tuneserve.artifact import GOLDEN, Golden, Version, read_golden
from tuneserve.errors import StoreError, TextError
from tuneserve.lifecycle.drift import Observation, Reference, read_reference
from tuneserve.serving.engines.engine import Engine
from tuneserve.serving.model import Answer, Answers, wait_for
from tuneserve.settings import Settings
from tuneserve.tasks.body import Array, Body, LongText
from tuneserve.tasks.encoder import Encoder, load_encoder
from tuneserve.text import Tokens

logger = logging.getLogger(__name__)

GOLDEN_TOLERANCE = 0.05
"""Largest difference of a probability between a golden answer and this engine's; bf16 shows up to 0.02."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction(Answer):
    """The answer to one text: the likeliest label, the probability of each, and how much of the text was read."""

    label: str
    scores: dict[str, float]
    tokens: int

    @property
    def verdict(self) -> tuple[str, float]:
        """See `Answer`."""
        return self.label, self.scores[self.label]

    @property
    def probabilities(self) -> Mapping[str, float]:
        """See `Answer`."""
        return self.scores


class Classifier(Encoder):
    """An encoder with label names, and with what drift is judged by; see `Encoder`.

    Args:
        version: in the store.
        engine: of its own; or a body, whose tokenizer and queue are as they are.
        long_text: see `Body`.
        max_queue_tokens: see `Body`.
    """

    task = "text-classification"

    def __init__(
        self,
        version: Version,
        engine: Engine | Body,
        *,
        long_text: LongText = "truncate",
        max_queue_tokens: int = 32768,
    ) -> None:
        if not isinstance(engine, Body):
            options: dict[str, Any] = {"long_text": long_text, "max_queue_tokens": max_queue_tokens}
            engine = Body(version.folder, engine, max_tokens=version.max_tokens, **options)
        super().__init__(version, engine)
        self.labels = version.labels
        self._threshold = version.threshold
        if self._threshold == math.inf:
            said = version.metadata["abstention"]
            words = "every answer of version %s abstains: MAX_ERROR=%g cannot be promised (%s)"
            logger.warning(words, version.id, said["max_error"], said.get("reason"))

    @cached_property
    def reference(self) -> Reference | None:
        """See `Model`; it is read when it is first wanted."""
        try:
            found = read_reference(self.version)
        except StoreError as error:
            logger.warning("drift cannot be judged: %s", error)  # which is no reason not to answer
            return None
        return found.whole_texts() if found is not None and self.body.long_text == "error" else found

    def prove(self, golden: str = GOLDEN) -> None:
        """Ask what was stored with the model when it was saved, and compare the answers.

        Raises:
            StoreError: an answer differs: the files are damaged, or the engine computes something else.
        """
        stored = read_golden(self.version, golden)
        self.compare(stored, self.answers_to(stored.texts))

    def answers_to(self, golden_texts: Sequence[str]) -> Answers:
        """The answers to golden texts, whose stored answers are of texts that were cut."""
        return wait_for(self.read_and_compute(golden_texts, max_windows=1))

    def compare(self, stored: Golden, found: Answers) -> None:
        """Make sure that golden answers are given again; see `prove`."""
        for wanted, prediction in zip(stored.scores, found, strict=True):
            if isinstance(prediction, TextError) and self.body.long_text == "error":
                continue
            if not isinstance(prediction, Prediction):
                raise StoreError(f"version {self.id} cannot read a golden text: {prediction}")
            difference = max((abs(prediction.scores[label] - score) for label, score in wanted.items()), default=0.0)
            if not difference <= GOLDEN_TOLERANCE:
                raise StoreError(
                    f"version {self.id} does not answer as it did when it was saved: a probability differs "
                    f"by {difference:.3f}."
                )

    def describe(self, tokens: Tokens, outputs: Sequence[Array]) -> Prediction:
        """The prediction that follows from the logits float [labels] of each of a text's windows."""
        # In lists: what NumPy wants for a handful of figures would be most of the work here.
        values = _softmax(outputs[0])
        if len(outputs) > 1:
            values = [sum(column) / len(outputs) for column in zip(*map(_softmax, outputs), strict=True)]
        label_id = values.index(max(values))
        ids, unknown_id = tokens.ids, self.body.encoder.unknown_id
        return Prediction(
            label=self.labels[label_id],
            scores=dict(zip(self.labels, values, strict=True)),
            tokens=tokens.read,
            truncated=tokens.truncated,
            model_version=self.id,
            abstain=values[label_id] < self._threshold if self._threshold is not None else None,
            observation=Observation(
                label_id,
                values[label_id],
                len(ids),
                ids.count(unknown_id) if unknown_id is not None else 0,
                tokens.truncated or len(tokens.windows) > 1,
            ),
        )


def _softmax(logits: Array) -> list[float]:
    values = logits.tolist()
    highest = max(values)
    odds = [math.exp(value - highest) for value in values]
    total = sum(odds)
    return [one / total for one in odds]


def load_classifier(version: Version, settings: Settings, *, threads: int) -> Classifier:
    """See `load_encoder`."""

    def make(version: Version, engine: Engine, settings: Settings) -> Classifier:
        long_text, room = settings.long_text, settings.max_queue_tokens
        return Classifier(version, engine, long_text=long_text, max_queue_tokens=room)

    return load_encoder(make, version, settings, threads=threads)
