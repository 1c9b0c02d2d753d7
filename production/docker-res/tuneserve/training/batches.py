"""Which texts share a batch, and the batch as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tuneserve.network.forward import Texts
from tuneserve.text import split_by_tokens
from tuneserve.training.tokens import TokenizedSplit

Array = np.ndarray[Any, np.dtype[Any]]

WINDOW_BATCHES = 16
"""Batches' worth of shuffled texts that are sorted by length together: little padding, still a random order."""


@dataclass(frozen=True)
class Batch(Texts):
    """Texts to learn from or to be tested on: `label_ids` int64 [texts]."""

    label_ids: torch.Tensor


def shuffled_batches(lengths: Array, batch_size: int, rng: np.random.Generator) -> list[Array]:
    """Rows of each batch of one epoch: random, but texts of like length together (fewer padding tokens)."""
    order = rng.permutation(len(lengths))
    window = batch_size * WINDOW_BATCHES
    batches: list[Array] = []
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    return [batches[place] for place in rng.permutation(len(batches))]


def sorted_batches(lengths: Array, max_tokens: int) -> list[Array]:
    """Rows of each batch, shortest texts first: for evaluation, where order does not matter."""
    return split_rows(np.argsort(lengths, kind="stable"), lengths, max_tokens)


def split_rows(rows: Array, lengths: Array, max_tokens: int) -> list[Array]:
    """The rows in their order, in parts of at most `max_tokens` tokens, padding included, and at least one text."""
    return [rows[part] for part in split_by_tokens(lengths[rows].tolist(), max_tokens, padded=True)]


def collate(split: TokenizedSplit, rows: Sequence[int] | Array, device: torch.device) -> Batch:
    """The given rows of a split as one batch on the device."""
    input_ids = np.concatenate([split.text_ids(row) for row in rows]).astype(np.int64)
    label_ids = split.label_ids[np.asarray(rows)]
    return Batch(torch.from_numpy(input_ids).to(device), split.lengths[rows], torch.from_numpy(label_ids).to(device))
