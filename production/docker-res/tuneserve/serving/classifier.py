"""A version that can be asked: texts to token ids, logits to predictions."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tuneserve.artifact import GOLDEN_INT8, Golden, Version, read_golden, torn_file
from tuneserve.errors import EngineError, StoreError, TextError
from tuneserve.serving.engine import Engine, infer, load_engine, load_int8_engine
from tuneserve.settings import Settings
from tuneserve.text import TextEncoder, Tokens, has_surrogates, split_by_tokens

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]


GOLDEN_TOLERANCE = 0.05
"""Largest difference of a probability between a golden answer and this engine's; bf16 shows up to 0.02."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to one text: the likeliest label, the probability of each, and how much of the text was read."""

    label: str
    scores: dict[str, float]
    tokens: int
    truncated: bool
    model_version: str


class Classifier:
    """Tokenizer, engine and label names of one version.

    Args:
        version: in the store.
        engine: for one thread at a time; `read` and `describe` are for any.
        long_text: what becomes of a text that is longer than the model reads.
    """

    def __init__(
        self, version: Version, engine: Engine, *, long_text: Literal["truncate", "error", "window"] = "truncate"
    ) -> None:
        self.version = version
        self.engine = engine
        self._labels = version.labels
        self._id = version.id
        self._long_text = long_text
        self._encoder = TextEncoder.from_folder(
            version.folder,
            max_tokens=version.metadata["settings"]["num_max_positions"],
            windows=long_text == "window",
        )

    @property
    def refuses_long_texts(self) -> bool:
        """Whether a text longer than the model reads is an error."""
        return self._long_text == "error"

    @property
    def unknown_id(self) -> int | None:
        """The token of what the vocabulary does not have, if there is one."""
        return self._encoder.unknown_id

    def read(self, texts: Sequence[str]) -> list[Tokens | TextError]:
        """The tokens of each text, or why it cannot be read."""
        problems = [_problem(text) for text in texts]
        found = iter(self._encoder.encode([text for text, problem in zip(texts, problems, strict=True) if not problem]))
        return [TextError(problem) if problem else self._fit(next(found)) for problem in problems]

    def describe(self, tokens: Tokens, logits: Sequence[Array]) -> Prediction:
        """The prediction that follows from the logits float [labels] of each of a text's windows."""
        # In lists: what NumPy wants for a handful of figures would be most of the work here.
        values = _softmax(logits[0])
        if len(logits) > 1:
            values = [sum(column) / len(logits) for column in zip(*map(_softmax, logits), strict=True)]
        return Prediction(
            label=self._labels[values.index(max(values))],
            scores=dict(zip(self._labels, values, strict=True)),
            tokens=tokens.read,
            truncated=tokens.truncated,
            model_version=self._id,
        )

    def predict(self, texts: Sequence[str], *, max_windows: int | None = None) -> list[Prediction | TextError]:
        """Classify texts on this thread, in batches of like length; the answers come in their order.

        `max_windows`, if given, is how many windows of a text count.

        Raises:
            EngineError: the engine gave a figure that is not a number.
        """
        readings = self.read(texts)
        windows = [
            (place, ids)
            for place, one in enumerate(readings)
            if isinstance(one, Tokens)
            for ids in one.windows[:max_windows]
        ]
        logits: dict[int, list[Array]] = {}
        windows.sort(key=lambda window: len(window[1]))
        for part in split_by_tokens([len(ids) for _, ids in windows], self.engine.max_batch_tokens):
            batch = windows[part]
            rows = infer(self.engine, [ids for _, ids in batch])
            if not np.isfinite(rows).all():
                raise EngineError("The model gave a figure that is not a number.")
            for (place, _), row in zip(batch, rows, strict=True):
                logits.setdefault(place, []).append(row)
        return [
            self.describe(one, logits[place]) if isinstance(one, Tokens) else one for place, one in enumerate(readings)
        ]

    def _fit(self, tokens: Tokens) -> Tokens | TextError:
        if tokens.truncated and self.refuses_long_texts:
            return TextError(f"the text has more than {self._encoder.max_tokens} tokens, the most this model reads")
        return tokens


def _problem(text: str) -> str:
    if not text.strip():
        return "the text is empty"
    if has_surrogates(text):
        return "the text holds half a surrogate pair, which is not Unicode text"
    return ""


def _softmax(logits: Array) -> list[float]:
    values = logits.tolist()
    highest = max(values)
    odds = [math.exp(value - highest) for value in values]
    total = sum(odds)
    return [one / total for one in odds]


def load_classifier(version: Version, settings: Settings, *, threads: int) -> Classifier:
    """The version with the fastest engine that it can have here, after it has proved itself.

    Raises:
        StoreError: the version's files are damaged, or it does not answer as it did when it was saved.
        DeviceError: the device asked for cannot be had.
    """
    if torn := torn_file(version):
        raise StoreError(f"version {version.id} is damaged: {torn} is missing or not as large as when it was saved.")
    try:
        if (engine := load_int8_engine(version, settings, threads=threads)) is not None:
            classifier = Classifier(version, engine, long_text=settings.long_text)
            prove(classifier, read_golden(version, GOLDEN_INT8))
            return classifier
    except StoreError as error:
        logger.warning("the int8 graph does not serve, PRECISION=auto does: %s", error)
    classifier = Classifier(version, load_engine(version, settings, threads=threads), long_text=settings.long_text)
    prove(classifier, read_golden(version))
    return classifier


def prove(classifier: Classifier, golden: Golden) -> None:
    """Ask what was stored with the model when it was saved, and compare the answers.

    Raises:
        StoreError: an answer differs: the files are damaged, or the engine computes something else.
    """
    found = classifier.predict(golden.texts, max_windows=1)  # the stored answers are of texts that were cut
    for wanted, prediction in zip(golden.scores, found, strict=True):
        if isinstance(prediction, TextError) and classifier.refuses_long_texts:
            continue
        if isinstance(prediction, TextError):
            raise StoreError(f"version {classifier.version.id} cannot read a golden text: {prediction}")
        difference = max((abs(prediction.scores[label] - score) for label, score in wanted.items()), default=0.0)
        if not difference <= GOLDEN_TOLERANCE:
            raise StoreError(
                f"version {classifier.version.id} does not answer as it did when it was saved: a probability differs "
                f"by {difference:.3f}."
            )
