"""The embedder as a Model: an encoder whose outputs are vectors, and these its answers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tuneserve.artifact import GOLDEN, Version, read_golden_vectors
from tuneserve.errors import StoreError, TextError
from tuneserve.serving.engines.engine import Engine
from tuneserve.serving.model import Answer, Answers, wait_for
from tuneserve.settings import Settings
from tuneserve.tasks.body import Array, Body
from tuneserve.tasks.encoder import Encoder, load_encoder
from tuneserve.text import Tokens

GOLDEN_COSINE = 0.995
"""Smallest cosine between a golden vector and this engine's; bf16 shows 0.9995."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding(Answer):
    """The answer to one text: its vector, float32 [channels], and how many tokens of it were read."""

    vector: Array
    tokens: int

    def agrees_with(self, other: Answer) -> bool:
        """Whether another model's vector points nearly the same way."""
        if not isinstance(other, Embedding) or self.vector.shape != other.vector.shape:
            return False
        return cosine(self.vector, other.vector) >= GOLDEN_COSINE


@dataclass(frozen=True, slots=True)
class Wanted:
    """A text, and how its vector is wanted: of length 1, and of its beginning if the model cannot read it whole."""

    text: str
    normalize: bool = True
    truncate: bool = True


class Embedder(Encoder):
    """An encoder that answers with vectors of length 1; see `Encoder`."""

    task = "feature-extraction"

    def __init__(self, version: Version, engine: Engine, *, max_queue_tokens: int = 32768) -> None:
        options: dict[str, Any] = {"max_queue_tokens": max_queue_tokens, "clean": str.strip}
        super().__init__(version, Body(version.folder, engine, max_tokens=version.max_tokens, **options))

    async def answer(self, inputs: Sequence[str | Wanted], *, deadline: float = float("inf")) -> Answers:
        """The vector of each text, as it is wanted; see `Model`."""
        wanted = [one if isinstance(one, Wanted) else Wanted(one) for one in inputs]
        found = await self.read_and_compute([one.text for one in wanted], deadline)
        return [_as_wanted(answer, one) for answer, one in zip(found, wanted, strict=True)]

    def describe(self, tokens: Tokens, outputs: Sequence[Array]) -> Embedding:
        """See `Encoder`; the vector is as the model gives it."""
        return Embedding(model_version=self.id, truncated=tokens.truncated, vector=outputs[0], tokens=tokens.read)

    def prove(self, golden: str = GOLDEN) -> None:
        """Ask what was stored with the model when it was saved, and compare the directions of the vectors.

        Raises:
            StoreError: one differs: the files are damaged, or the engine computes something else.
        """
        texts, vectors = read_golden_vectors(self.version)
        for wanted, found in zip(vectors, wait_for(self.read_and_compute(texts)), strict=True):
            if not isinstance(found, Embedding) or len(wanted) != len(found.vector):
                raise StoreError(f"version {self.id} cannot embed a golden text: {found}")
            if not cosine(found.vector, np.array(wanted)) >= GOLDEN_COSINE:
                raise StoreError(f"version {self.id} does not answer as it did when it was saved.")


def cosine(one: Array, other: Array) -> float:
    """The cosine between two vectors; not a number if one of them has no direction."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def _as_wanted(answer: Any, wanted: Wanted) -> Any:
    if not isinstance(answer, Embedding):
        return answer
    if answer.truncated and not wanted.truncate:
        return TextError(f"the text is longer than the {answer.tokens} tokens that this model reads")
    if not wanted.normalize:
        return answer
    return replace(answer, vector=answer.vector / max(float(np.linalg.norm(answer.vector)), 1e-12))


def load_embedder(version: Version, settings: Settings, *, threads: int) -> Embedder:
    """See `load_encoder`."""

    def make(version: Version, engine: Engine, settings: Settings) -> Embedder:
        return Embedder(version, engine, max_queue_tokens=settings.max_queue_tokens)

    return load_encoder(make, version, settings, threads=threads)
