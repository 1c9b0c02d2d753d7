"""Texts as token ids on disk, tokenized once and found again by content; and which of them share a batch.

A folder holds `ids.i32` (all texts end to end), `starts.npy` (where each begins, and the end) and `cut.npy` (whether it
was longer than what was read).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tuneserve.code import code_hash
from tuneserve.errors import StoreError
from tuneserve.files import mark_used, new_folder
from tuneserve.network.forward import Texts
from tuneserve.tables.rows import in_batches
from tuneserve.text import TextEncoder, split_by_tokens
from tuneserve.training.checks import Split

Array = np.ndarray[Any, np.dtype[Any]]

WINDOW_BATCHES = 16
"""Batches' worth of shuffled texts that are sorted by length together: little padding, still a random order."""


@dataclass(frozen=True)
class TokenizedSplit:
    """Token ids and label ids of a split.

    `ids` is int32 [all tokens], memory-mapped; `starts` int64 [texts + 1]; `label_ids` int64 [texts];
    `truncated` bool [texts].
    """

    ids: Array
    starts: Array
    label_ids: Array
    truncated: Array

    def __len__(self) -> int:
        return len(self.label_ids)

    @cached_property
    def lengths(self) -> Array:
        """Tokens of each text, int64 [texts]."""
        return np.diff(self.starts)

    @property
    def truncated_share(self) -> float:
        """Share of the texts that were longer than what was read."""
        return float(self.truncated.mean())

    def text_ids(self, row: int) -> Array:
        """The token ids of one text, int32 [its length]."""
        return self.ids[self.starts[row] : self.starts[row + 1]]

    def select(self, rows: Array) -> "TokenizedSplit":
        """Some of the texts as a split of their own, in memory."""
        return TokenizedSplit(
            ids=np.concatenate([self.text_ids(row) for row in rows]),
            starts=np.r_[0, np.cumsum(self.lengths[rows])],
            label_ids=self.label_ids[rows],
            truncated=self.truncated[rows],
        )


def tokenize(split: Split, encoder: TextEncoder, *, cache: Path) -> TokenizedSplit:
    """Tokenize a split, or find it done before with the same texts, tokenizer, limit and code.

    Raises:
        StoreError: the cache cannot be written.
    """
    key = hashlib.sha256(f"{code_hash('text.py', 'training/tokens.py')} {encoder.to_json()}".encode())
    for text in split:
        key.update(hashlib.sha256(text.encode()).digest())
    folder = cache / "tokens" / key.hexdigest()[:32]
    if not _is_whole(folder):
        try:
            _write(split, encoder, folder)
        except OSError as error:
            raise StoreError(f"DATA_PATH={cache} cannot be written to: {error}") from error
    mark_used(folder)
    return TokenizedSplit(
        ids=np.memmap(folder / "ids.i32", dtype=np.int32, mode="r"),
        starts=np.load(folder / "starts.npy"),
        label_ids=split.label_ids.astype(np.int64),
        truncated=np.load(folder / "cut.npy"),
    )


def _is_whole(folder: Path) -> bool:
    try:
        tokens = int(np.load(folder / "starts.npy")[-1])
        return (folder / "cut.npy").is_file() and (folder / "ids.i32").stat().st_size == tokens * 4
    except (OSError, ValueError, EOFError):
        return False


def _write(split: Split, encoder: TextEncoder, folder: Path) -> None:
    lengths: list[Array] = []
    truncated: list[bool] = []
    try:
        with new_folder(folder, overwrite=True) as temporary:
            with (temporary / "ids.i32").open("wb") as file:
                for batch in in_batches(split, len):
                    tokens = encoder.encode(batch)
                    lengths.append(np.array([len(one.ids) for one in tokens], dtype=np.int64))
                    truncated += [one.truncated for one in tokens]
                    file.write(np.fromiter(chain.from_iterable(one.ids for one in tokens), dtype=np.int32).tobytes())
            np.save(temporary / "starts.npy", np.r_[0, np.cumsum(np.concatenate(lengths))])
            np.save(temporary / "cut.npy", np.array(truncated, dtype=bool))
    except OSError:
        if not _is_whole(folder):  # else another job has just done the same
            raise


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
    return [batches[index] for index in rng.permutation(len(batches))]


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
