"""Which texts to label next: those the model is unsure of, that are like many others, and not like each other.

Uncertainty is the margin between the two likeliest labels (Scheffer et al. 2001, best-versus-second-best); how many
texts are like one is told by its nearest neighbours (information density, Settles and Craven 2008); and of texts that
are like each other one is taken. Texts are compared by their words alone, hashed into a short vector (feature hashing,
Weinberger et al. 2009), so that nothing but NumPy is wanted.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from tuneserve.text import plain

Array = np.ndarray[Any, np.dtype[Any]]

WORD = re.compile(r"\w+")
WIDTH = 512
"""Of a text's vector."""

MOST_CHARACTERS = 500
"""Of a text that are looked at."""

NEIGHBOURS = 10
"""By whose likeness it is judged how common a text is."""

UNLIKE_FACTOR = 1.5
"""By how much more a text is worth that is unlike what the model was tested on."""


def sketch(texts: Sequence[str]) -> Array:
    """Vectors float32 [texts, WIDTH] of unit length, in which texts with the same rare words are close."""
    counts = [Counter(WORD.findall(plain(text[:MOST_CHARACTERS]).casefold())) for text in texts]
    spread = Counter(word for one in counts for word in one)
    hashed = {word: _hash(word) for word in spread}
    vectors = np.zeros((len(texts), WIDTH), dtype=np.float32)
    for row, one in zip(vectors, counts, strict=True):
        for word, count in one.items():
            sign = 1 if hashed[word] >> 63 else -1
            row[hashed[word] % WIDTH] += sign * np.log1p(count) * np.log1p(len(texts) / spread[word])
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Array = vectors / np.maximum(lengths, 1e-9)
    return unit


def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(errors="replace"), digest_size=8).digest(), "little")


def density(vectors: Array) -> Array:
    """How like its NEIGHBOURS nearest others each text is: float [texts] from 0 to 1."""
    count = min(NEIGHBOURS, len(vectors) - 1)
    if count < 1:
        return np.zeros(len(vectors))
    alike = vectors @ vectors.T
    np.fill_diagonal(alike, -1)
    nearest = np.partition(alike, -count, axis=1)[:, -count:]
    common: Array = np.clip(nearest.mean(axis=1), 0, 1)
    return common


def margin_uncertainty(probabilities: Array) -> Array:
    """How unsure a model is, float [texts] from 0 to 1, by its probabilities float [texts, labels]."""
    if probabilities.shape[1] < 2:
        return np.zeros(len(probabilities))
    two = np.partition(probabilities, -2, axis=1)[:, -2:]
    margin: Array = two[:, 1] - two[:, 0]
    return 1 - margin


def worth(uncertainty: Array, common: Array, unlike: Array | None = None) -> Array:
    """How much a label of each text would teach: float [texts].

    Args:
        uncertainty: float [texts] from 0 to 1.
        common: of each text, how like others it is; see `density`.
        unlike: bool [texts], which are unlike what the model was tested on; None for none.
    """
    value = uncertainty * (0.5 + common)
    return value if unlike is None else np.where(unlike, UNLIKE_FACTOR * value, value)


def choose(value: Array, vectors: Array, count: int) -> list[int]:
    """Indices of at most so many texts, best first, each worth less the more it is like one before it."""
    chosen: list[int] = []
    alike = np.zeros(len(value))
    left = value.astype(np.float64)
    while len(chosen) < min(count, len(value)):
        best = int(np.argmax(left * (1 - alike)))
        chosen.append(best)
        left[best] = -1
        alike = np.maximum(alike, np.clip(vectors @ vectors[best], 0, 0.999))
    return chosen
