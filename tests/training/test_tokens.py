"""Texts tokenized once, and found again only when nothing about them changed; and which of them share a batch."""

import math
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from tuneserve.errors import StoreError
from tuneserve.text import TextEncoder, Tokens
from tuneserve.training.checks import Split
from tuneserve.training.tokens import (
    WINDOW_BATCHES,
    TokenizedSplit,
    collate,
    shuffled_batches,
    sorted_batches,
    split_rows,
    tokenize,
)

Python = Callable[..., "subprocess.CompletedProcess[str]"]
TEXTS = [" ".join(["good film"] * (number % 5) + ["the"]) for number in range(2500)]


def split(texts: Sequence[str], label_ids: Sequence[int] | None = None) -> Split:
    ids = np.arange(len(texts)) % 2 if label_ids is None else np.array(label_ids)
    return Split(Dataset.from_dict({"text": texts}), np.arange(len(texts)), ids.astype(np.int32))


class WatchedEncoder(TextEncoder):
    """Counts the texts it is given, and may die of one."""

    def __init__(self, folder: Path, *, max_tokens: int = 8, dies_at: int | None = None) -> None:
        encoder = TextEncoder.from_folder(folder, max_tokens=max_tokens)
        super().__init__(encoder._tokenizer, max_tokens=max_tokens)
        self.seen = 0
        self.dies_at = dies_at

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        self.seen += len(texts)
        if self.dies_at is not None and self.seen > self.dies_at:
            raise MemoryError
        return super().encode(texts)


def as_lists(tokens: TokenizedSplit) -> list[list[int]]:
    return [tokens.text_ids(row).tolist() for row in range(len(tokens))]


def test_each_text_has_the_ids_that_the_encoder_gives_it(tiny_bert: Path, tmp_path: Path) -> None:
    encoder = TextEncoder.from_folder(tiny_bert, max_tokens=8)
    tokens = tokenize(split(TEXTS), encoder, cache=tmp_path)
    expected = encoder.encode(TEXTS)
    assert as_lists(tokens) == [one.ids for one in expected]
    assert tokens.lengths.tolist() == [len(one.ids) for one in expected]
    assert tokens.truncated.tolist() == [one.truncated for one in expected]
    assert tokens.truncated.sum() == 1000  # those of 7 and 9 words
    assert tokens.label_ids.tolist() == [0, 1] * 1250
    assert (tokens.ids.dtype, tokens.starts.dtype, tokens.label_ids.dtype) == (np.int32, np.int64, np.int64)
    assert isinstance(tokens.ids, np.memmap)


def test_the_second_time_nothing_is_tokenized(tiny_bert: Path, tmp_path: Path) -> None:
    first = tokenize(split(TEXTS), WatchedEncoder(tiny_bert), cache=tmp_path)
    watched = WatchedEncoder(tiny_bert)
    [folder] = (tmp_path / "tokens").iterdir()
    os.utime(folder, (0, 0))
    again = tokenize(split(TEXTS), watched, cache=tmp_path)
    assert folder.stat().st_mtime > 0  # it is what was used last
    assert watched.seen == 0
    assert as_lists(again) == as_lists(first)
    assert again.truncated.tolist() == first.truncated.tolist()


def test_labels_do_not_come_from_the_cache(tiny_bert: Path, tmp_path: Path) -> None:
    tokenize(split(["good", "bad"], [0, 1]), WatchedEncoder(tiny_bert), cache=tmp_path)
    watched = WatchedEncoder(tiny_bert)
    assert tokenize(split(["good", "bad"], [1, 0]), watched, cache=tmp_path).label_ids.tolist() == [1, 0]
    assert watched.seen == 0


@pytest.mark.parametrize(
    ("texts", "max_tokens"),
    [
        ([*TEXTS[:-1], "bad"], 8),
        (TEXTS[:-1], 8),
        ([*TEXTS, "good"], 8),
        (TEXTS[::-1], 8),
        (TEXTS, 9),
    ],
    ids=["a text", "one text less", "one text more", "the order", "the limit"],
)
def test_what_changed_is_tokenized_anew(texts: list[str], max_tokens: int, tiny_bert: Path, tmp_path: Path) -> None:
    tokenize(split(TEXTS), WatchedEncoder(tiny_bert), cache=tmp_path)
    watched = WatchedEncoder(tiny_bert, max_tokens=max_tokens)
    tokens = tokenize(split(texts), watched, cache=tmp_path)
    assert watched.seen == len(texts)
    assert as_lists(tokens) == [one.ids for one in watched.encode(texts)]


def test_another_tokenizer_tokenizes_anew(tiny_bert: Path, tmp_path: Path) -> None:
    tokenize(split(TEXTS), WatchedEncoder(tiny_bert), cache=tmp_path)
    watched = WatchedEncoder(tiny_bert)
    watched._tokenizer.add_tokens(["film"])
    tokenize(split(TEXTS), watched, cache=tmp_path)
    assert watched.seen == len(TEXTS)


def test_texts_that_run_together_are_told_apart(tiny_bert: Path, tmp_path: Path) -> None:
    tokenize(split(["goodfilm", "bad"]), WatchedEncoder(tiny_bert), cache=tmp_path)
    watched = WatchedEncoder(tiny_bert)
    tokens = tokenize(split(["good", "filmbad"]), watched, cache=tmp_path)
    assert as_lists(tokens) == [one.ids for one in watched.encode(["good", "filmbad"])]


def test_a_tokenization_that_failed_leaves_nothing_that_is_taken_for_whole(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(MemoryError):
        tokenize(split(TEXTS), WatchedEncoder(tiny_bert, dies_at=1500), cache=tmp_path)
    assert list((tmp_path / "tokens").iterdir()) == []
    watched = WatchedEncoder(tiny_bert)
    assert len(as_lists(tokenize(split(TEXTS), watched, cache=tmp_path))) == watched.seen == len(TEXTS)


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from datasets import Dataset
from tuneserve.text import TextEncoder
from tuneserve.training.checks import Split
from tuneserve.training.tokens import tokenize

class Encoder(TextEncoder):
    seen = 0
    def encode(self, texts):
        self.seen += len(texts)
        if self.seen > 1500:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(texts)

texts = Path(sys.argv[1]).read_text().splitlines()
encoder = Encoder.from_folder(Path(sys.argv[2]), max_tokens=8)
rows = np.arange(len(texts))
tokenize(Split(Dataset.from_dict({"text": texts}), rows, rows), encoder, cache=Path(sys.argv[3]))
"""


def test_a_process_killed_while_it_tokenizes_leaves_nothing_that_is_taken_for_whole(
    tiny_bert: Path, tmp_path: Path, python: Python
) -> None:
    (tmp_path / "texts").write_text("\n".join(TEXTS))
    done = python("-c", KILLED, tmp_path / "texts", tiny_bert, tmp_path / "cache")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1  # what it left is there, under another name
    watched = WatchedEncoder(tiny_bert)
    tokens = tokenize(split(TEXTS), watched, cache=tmp_path / "cache")
    assert watched.seen == len(TEXTS)
    assert as_lists(tokens) == [one.ids for one in watched.encode(TEXTS)]


def test_a_file_that_lost_its_end_is_not_taken_for_whole(tiny_bert: Path, tmp_path: Path) -> None:
    """As after a power cut: the folder has its name, and not all of its content."""
    whole = as_lists(tokenize(split(TEXTS), WatchedEncoder(tiny_bert), cache=tmp_path))
    (ids,) = tmp_path.glob("tokens/*/ids.i32")
    content = ids.read_bytes()
    ids.write_bytes(content[: len(content) // 8 * 4])
    assert as_lists(tokenize(split(TEXTS), WatchedEncoder(tiny_bert), cache=tmp_path)) == whole


def test_a_cache_that_cannot_be_written_is_a_clear_error(tiny_bert: Path, tmp_path: Path, disk: Any) -> None:
    encoder = TextEncoder.from_folder(tiny_bert, max_tokens=8)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"DATA_PATH=.*file cannot be written to"):
        tokenize(split(["good"]), encoder, cache=tmp_path / "file")
    disk.fill()
    with pytest.raises(StoreError, match=r"DATA_PATH=.*No space left"):
        tokenize(split(TEXTS), encoder, cache=disk.path)
    (disk.path / "ballast").unlink()
    assert len(tokenize(split(TEXTS), encoder, cache=disk.path)) == len(TEXTS)
    disk.make_read_only()
    assert len(tokenize(split(TEXTS), encoder, cache=disk.path)) == len(TEXTS)
    with pytest.raises(StoreError, match="Read-only file system"):
        tokenize(split(["good"]), encoder, cache=disk.path)


COUNTS_AND_BATCH_SIZES = [(1, 1), (1, 32), (31, 32), (32, 32), (33, 32), (1000, 1), (5000, 32), (5000, 7)]


def lengths(count: int) -> Any:
    """As reviews have them: most short, a few long."""
    return np.random.default_rng(0).lognormal(3, 0.8, count).astype(np.int64).clip(3, 256)


def padding_share(batches: list[Any], of: Any) -> float:
    read = sum(of[rows].max() * len(rows) for rows in batches)
    return float(1 - of.sum() / read)


def tokenized(*texts: list[int], label_ids: list[int]) -> TokenizedSplit:
    return TokenizedSplit(
        ids=np.array([one for ids in texts for one in ids], dtype=np.int32),
        starts=np.r_[0, np.cumsum([len(ids) for ids in texts])],
        label_ids=np.array(label_ids, dtype=np.int64),
        truncated=np.zeros(len(texts), dtype=bool),
    )


@pytest.mark.parametrize(("count", "batch_size"), COUNTS_AND_BATCH_SIZES)
def test_an_epoch_has_every_row_once_in_as_few_batches_as_can_be(count: int, batch_size: int) -> None:
    batches = shuffled_batches(lengths(count), batch_size, np.random.default_rng(1))
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))
    assert len(batches) == math.ceil(count / batch_size)
    assert max(len(rows) for rows in batches) <= batch_size
    assert sorted(np.concatenate(sorted_batches(lengths(count), 4096)).tolist()) == list(range(count))


def test_texts_of_like_length_share_a_batch() -> None:
    of = lengths(5000)
    plain = np.array_split(np.random.default_rng(1).permutation(5000), 5000 // 32)
    unsorted = padding_share(plain, of)
    assert unsorted > 0.5
    assert padding_share(shuffled_batches(of, 32, np.random.default_rng(1)), of) < 0.5 * unsorted
    assert padding_share(sorted_batches(of, 1024), of) < 0.05 * unsorted


def test_the_order_of_an_epoch_follows_from_its_seed() -> None:
    first, again, other = (
        shuffled_batches(lengths(500), 16, np.random.default_rng(seed)) for seed in ([1, 0], [1, 0], [1, 1])
    )
    assert [rows.tolist() for rows in first] == [rows.tolist() for rows in again]
    assert [rows.tolist() for rows in first] != [rows.tolist() for rows in other]


def test_texts_meet_others_in_each_epoch() -> None:
    epochs = [shuffled_batches(lengths(5000), 8, np.random.default_rng([1, epoch])) for epoch in range(2)]
    before, after = ({frozenset(rows.tolist()) for rows in batches} for batches in epochs)
    assert len(before & after) < 0.01 * len(before)


def test_short_texts_do_not_come_first() -> None:
    of = lengths(WINDOW_BATCHES * 32)  # beyond one window, they would come first again and again
    found = []
    for seed in range(20):
        means = [of[rows].mean() for rows in shuffled_batches(of, 32, np.random.default_rng(seed))]
        found.append(np.corrcoef(means, range(len(means)))[0, 1])
    assert abs(np.mean(found)) < 0.3


def test_evaluation_reads_the_shortest_first() -> None:
    of = lengths(100)
    assert of[np.concatenate(sorted_batches(of, 300))].tolist() == sorted(of.tolist())


CPU = torch.device("cpu")


@pytest.mark.parametrize("pad_id", [0, 1, 50283])
def test_a_batch_lies_end_to_end_and_can_be_padded_to_its_longest_text(pad_id: int) -> None:
    split = tokenized([5, 6, 7], [5], [9, 9, 9, 9, 9], [0, 1], label_ids=[1, 0, 1, 2])
    batch = collate(split, np.array([3, 1, 0]), CPU)
    assert batch.input_ids.tolist() == [0, 1, 5, 5, 6, 7]
    assert batch.lengths.tolist() == [2, 1, 3]
    assert batch.label_ids.tolist() == [2, 0, 1]
    input_ids, mask = batch.padded(pad_id)
    assert input_ids.tolist() == [[0, 1, pad_id], [5, pad_id, pad_id], [5, 6, 7]]
    assert mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    for tensor in (batch.input_ids, batch.label_ids, input_ids, mask):
        assert tensor.dtype == torch.int64


def test_a_batch_is_made_on_the_device_asked_for() -> None:
    batch = collate(tokenized([5, 6], [7], label_ids=[0, 1]), [0, 1], torch.device("meta"))
    assert {batch.input_ids.device.type, batch.label_ids.device.type} == {"meta"}


@pytest.mark.parametrize("max_tokens", [1, 10, 100, 10_000])
def test_parts_hold_no_more_tokens_than_allowed_but_at_least_one_text(max_tokens: int) -> None:
    of = lengths(200)
    rows = np.argsort(of)
    parts = split_rows(rows, of, max_tokens)
    assert np.concatenate(parts).tolist() == rows.tolist()
    assert all(len(part) == 1 or len(part) * of[part].max() <= max_tokens for part in parts)
    assert max_tokens < 100 or len(parts) < 200


def test_no_texts_make_no_parts() -> None:
    assert split_rows(np.arange(0), lengths(3), 10) == []
