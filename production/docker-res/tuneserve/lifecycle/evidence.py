"""What a version can be judged by: the texts of its test, and hashes of those it was trained on.

    MODEL_PATH/evidence/<id>/test.parquet   columns `text`, `label`, and `origin`: `data` or `feedback`; of each at
                                            most MAX_TEXTS; and `data:<name>` for other columns of the data
    MODEL_PATH/evidence/<id>/learned.npy    uint64 [training and validation texts], sorted: hashes, no texts
    MODEL_PATH/evidence/<id>/label-issues.csv   texts whose labels are probably wrong; see `label_issues`
    MODEL_PATH/evidence/<id>/examples.json  a few short test texts, for people to try the version with

It is stored beside the version and not in it, so that a model can be handed on without any texts.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from tuneserve.errors import StoreError
from tuneserve.files import as_record, new_folder, parse_json, read_bytes, write_json
from tuneserve.text import plain

logger = logging.getLogger(__name__)

COLUMN = "data:"
EXAMPLES = "examples.json"
MOST_EXAMPLES = 8
MAX_BYTES = 64 << 10
EXAMPLE_CHARACTERS = range(12, 241)
"""Of a text that is read at a glance, and says something."""

Array = np.ndarray[Any, np.dtype[Any]]

MAX_TEXTS = 2000
"""Test texts that are kept: enough to detect a point of accuracy, few enough to be answered in seconds."""


@dataclass(frozen=True)
class Evidence:
    """Test texts with their labels: first those of the owner's test, `own` of them (None: all), then of feedback."""

    texts: list[str]
    labels: list[str]
    own: int | None = None
    columns: dict[str, list[str]] = field(default_factory=dict)
    """Of the owner's texts, what other columns of the data say; an empty text where they say nothing."""

    @property
    def is_own(self) -> Array:
        """Which texts are of the owner's test, bool [texts]."""
        return np.arange(len(self.texts)) < (len(self.texts) if self.own is None else self.own)


def key_of(text: str) -> int:
    """A hash that is equal for texts that differ only in case or white space."""
    import xxhash  # which a place that only serves does not have

    return xxhash.xxh3_64_intdigest(" ".join(plain(text).casefold().split()).encode())


def write_evidence(folder: Path, evidence: Evidence, learned: Iterable[str]) -> None:
    """Write it atomically.

    Raises:
        StoreError: the disk refuses.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with new_folder(folder, overwrite=True) as temporary:
            origins = ["data" if own else "feedback" for own in evidence.is_own]
            rest = [""] * (len(evidence.texts) - int(evidence.is_own.sum()))
            others = {f"{COLUMN}{name}": values + rest for name, values in evidence.columns.items()}
            table = pa.table({"text": evidence.texts, "label": evidence.labels, "origin": origins, **others})
            pq.write_table(table, temporary / "test.parquet")
            np.save(temporary / "learned.npy", np.unique(np.fromiter(map(key_of, learned), dtype=np.uint64)))
            write_json(temporary / EXAMPLES, choose_examples(evidence))
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {error}") from error


def choose_examples(evidence: Evidence) -> list[str]:
    """Short texts of the owner's test, of each label in turn."""
    by_label: dict[str, list[str]] = {}
    for text, label, own in zip(evidence.texts, evidence.labels, evidence.is_own, strict=True):
        if own and len(text) in EXAMPLE_CHARACTERS:
            by_label.setdefault(label, []).append(text)
    turns = zip_longest(*(by_label[label] for label in sorted(by_label)))
    return list(islice((text for turn in turns for text in turn if text is not None), MOST_EXAMPLES))


STRINGS = TypeAdapter(list[str])


def read_examples(folder: Path) -> list[str]:
    """The texts to try a version with; none of one that an older release trained."""
    try:
        return as_record(parse_json(read_bytes(folder / EXAMPLES, max_bytes=MAX_BYTES)), STRINGS)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read: %s", folder / EXAMPLES, error)
        return []


def read_evidence(folder: Path) -> Evidence:
    """The test texts.

    Raises:
        StoreError: there are none, or they cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if (folder / "test.parquet").exists() and not (folder / "test.parquet").is_file():
            raise ValueError("it is no regular file")
        columns = pq.read_table(folder / "test.parquet").to_pydict()
        texts, labels = columns["text"], columns["label"]
        if not texts or not all(isinstance(one, str) for one in chain(texts, labels)):
            raise ValueError("it should hold texts and labels")
        origins = columns.get(
            "origin", ["data"] * len(texts)
        )  # an older file does not say, and all count as the data's
        if sorted(origins, key=str) != origins or origins.count("data") == 0:
            raise ValueError("it should begin with texts of the data")
        own = origins.count("data")
        others = {
            name.removeprefix(COLUMN): [str(one) for one in values[:own]]
            for name, values in columns.items()
            if name.startswith(COLUMN)
        }
        return Evidence(texts, labels, own=own if own < len(texts) else None, columns=others)
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise StoreError(f"{folder / 'test.parquet'} cannot be read: {error}") from error


def unseen(folder: Path, texts: Sequence[str]) -> Array:
    """Which texts the version of this folder was not trained on, bool [texts]; all, if its hashes cannot be read."""
    try:
        if not (folder / "learned.npy").is_file():  # a pipe of this name would be waited for
            raise ValueError("it is no regular file")
        learned = np.load(folder / "learned.npy", allow_pickle=False)
        if not isinstance(learned, np.ndarray) or learned.dtype != np.uint64:
            raise ValueError("it holds no hashes")
    except Exception:  # what a damaged file meets in NumPy and its readers of archives is of many kinds
        logger.warning("the training texts of version %s are not known", folder.name)
        return np.ones(len(texts), dtype=bool)
    return ~np.isin(np.array([key_of(text) for text in texts], dtype=np.uint64), learned)
