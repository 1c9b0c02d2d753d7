"""The embedded sample is what the README says of it."""

import csv
import re
from collections import Counter

import pytest

from tuneserve.settings import PROJECT
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
def test_reviews_have_1_to_120_words(split: str) -> None:
    lengths = [len(row["text"].split()) for row in rows(split)]
    assert min(lengths) >= 1
    assert max(lengths) <= 120


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def test_no_test_text_is_near_one_that_is_learned_from() -> None:
    """Of texts of four different words and more at most half are shared."""
    learned = [words(row["text"]) for row in rows("train")]
    with (PROJECT / "benchmarks" / "difficult.csv").open(encoding="utf-8", newline="") as file:
        difficult = list(csv.DictReader(file))
    assert len(difficult) == 200
    for row in [*rows("test"), *difficult]:
        own = words(row["text"])
        near = [one for one in learned if len(one) >= 4 <= len(own) and len(own & one) > len(own | one) / 2]
        assert not near, row["text"]


EVERYDAY = {
    "battery",
    "screen",
    "room",
    "delivery",
    "app",
    "staff",
    "refund",
    "dentist",
    "return",
    "recommend",
}


def test_everyday_nouns_stand_in_both_labels() -> None:
    seen = {word: Counter(row["label"] for row in rows("train") if word in words(row["text"])) for word in EVERYDAY}
    for word, counts in seen.items():
        assert min(counts["positive"], counts["negative"]) >= 0.3 * sum(counts.values()), (word, counts)
