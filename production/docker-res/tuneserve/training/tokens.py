"""Texts as token ids on disk: tokenized once, memory-mapped, found again by content.

A folder holds `ids.i32` (all texts end to end), `starts.npy` (where each begins, and the end) and `cut.npy` (whether it
was longer than what was read).
"""

import hashlib
import logging
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from tuneserve.code import code_hash
from tuneserve.errors import StoreError
from tuneserve.files import new_folder
from tuneserve.tables.rows import in_batches
from tuneserve.text import TextEncoder
from tuneserve.training.checks import Split

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]


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
