"""Which texts share a batch, and the batch as tensors."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from tuneserve.training.batches import WINDOW_BATCHES, collate, shuffled_batches, sorted_batches, split_rows
from tuneserve.training.tokens import TokenizedSplit

SIZES = [(1, 1), (1, 32), (31, 32), (32, 32), (33, 32), (1000, 1), (5000, 32), (5000, 7)]


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


@pytest.mark.parametrize(("count", "batch_size"), SIZES)
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
