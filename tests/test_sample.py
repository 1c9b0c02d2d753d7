"""The embedded sample is what the README says of it."""

import csv
from collections import Counter

import pytest

from tuneserve.training.data import SAMPLE_FOLDER

SPLITS = ("train", "test")


def rows(split: str) -> list[dict[str, str]]:
    with (SAMPLE_FOLDER / f"{split}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_there_are_at_least_800_reviews_and_none_stands_twice() -> None:
    texts = [" ".join(row["text"].casefold().split()) for split in SPLITS for row in rows(split)]
    assert len(texts) == len(set(texts)) >= 800


@pytest.mark.parametrize("split", SPLITS)
def test_half_are_positive(split: str) -> None:
    counts = Counter(row["label"] for row in rows(split))
    assert set(counts) == {"negative", "positive"}
    assert abs(counts["positive"] - counts["negative"]) <= 0.02 * sum(counts.values())


@pytest.mark.parametrize("split", SPLITS)
def test_reviews_have_3_to_120_words(split: str) -> None:
    lengths = [len(row["text"].split()) for row in rows(split)]
    assert min(lengths) >= 3
    assert max(lengths) <= 120
