"""What the data are worth: every run counts what is wrong with them, mends what can be mended, refuses what cannot.

Mended, and counted in the findings: empty texts, repeated training texts, training texts with two labels, training
texts that are also in the validation or test texts. Texts are compared without case and runs of spaces.
Refused: a row without a label, a single class, a class with too few texts, a test label that training never shows.
A test file that is given stays as it is, empties aside, so that its figures compare with others'.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from tuneserve.errors import DataError
from tuneserve.lifecycle.evidence import key_of
from tuneserve.tables.rows import BATCH_ROWS
from tuneserve.text import is_blank
from tuneserve.training.data import Source

MIN_CLASS_TEXTS = 5
"""Fewest training texts of a class: enough for one in each split and a few to learn from."""

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Split:
    """Which rows of a source to use, int64 [texts], ascending; and their label ids, int32 [texts]."""

    source: Dataset
    rows: Array
    label_ids: Array

    def __len__(self) -> int:
        return len(self.label_ids)

    def __iter__(self) -> Iterator[str]:
        """The texts in order, straight from the mapped file: what is in memory is one chunk of it."""
        begin = 0
        for chunk in self.source.data.to_batches(max_chunksize=BATCH_ROWS):
            first, last = np.searchsorted(self.rows, [begin, begin + len(chunk)])
            yield from chunk.column("text").take(pa.array(self.rows[first:last] - begin)).to_pylist()
            begin += len(chunk)

    @property
    def texts(self) -> Dataset:
        """The rows as a data set, to look at some of them."""
        return self.source.select(self.rows)


@dataclass(frozen=True)
class Splits:
    """Data ready to be tokenized, the label names by id, and what was found on the way."""

    train: Split
    valid: Split
    test: Split
    labels: list[str]
    fingerprints: dict[str, str]
    findings: dict[str, Any]
    feedback: Split | None = None
    """What is held out of the feedback: a second test, apart from the data's own."""


@dataclass
class _Rows:
    """One source while it is being checked: a hash and a label id a row, and which rows are still in."""

    source: Source
    keys: Array
    labels: Array
    kept: Array
    fingerprint: str

    def indices(self) -> Array:
        return np.flatnonzero(self.kept)


def check(
    sources: Mapping[str, Source],
    *,
    num_train: int,
    num_test: int,
    valid_fraction: float,
    test_fraction: float,
    seed: int,
) -> Splits:
    """Check what was read, mend it, and split it where the data bring no split of their own.

    Args:
        sources: `train` and perhaps `valid` and `test`.
        num_train: training texts to draw; 0 for all.
        num_test: test texts to draw; 0 for all.
        valid_fraction: share of the training texts to hold out where there are no validation texts.
        test_fraction: share of all texts to hold out where there are no test texts.
        seed: of the draws and splits.

    Raises:
        DataError: the data would teach nothing, or the result would be a lie.
    """
    vocabulary: dict[str, int] = {}
    rows = {split: _scan(source, vocabulary) for split, source in sources.items()}
    labels, order = _sort_labels(vocabulary)
    for one in rows.values():
        one.labels = order[one.labels]
    train = rows["train"]
    if len(labels) < 2:
        raise DataError(f"{train.source.where} has one class only, {', '.join(map(repr, labels))}; two are the least.")
    held_out = {split: one for split, one in rows.items() if split != "train"}
    findings: dict[str, Any] = {"empty_texts": {split: int((~one.kept).sum()) for split, one in rows.items()}}
    findings |= _mend_train(train, held_out)
    repeats = {split: [int(marks.sum()) for marks in _find_repeats(one)] for split, one in held_out.items()}
    findings |= {f"repeated_{split}_texts": count for split, (count, _) in repeats.items()}
    findings |= {f"contradicted_{split}_texts": count for split, (_, count) in repeats.items()}
    if {"valid", "test"} <= set(rows):
        shared = np.isin(rows["valid"].keys[rows["valid"].kept], rows["test"].keys[rows["test"].kept])
        findings["valid_texts_also_in_test"] = int(shared.sum())
    _require_known_labels(train, held_out, labels)
    _require_class_sizes(train, labels, findings)

    rng = np.random.default_rng(seed)
    pool = train.indices()
    if "test" in rows:
        test_source, test_rows = rows["test"], rows["test"].indices()
    else:
        test_source = train
        test_rows, pool = _stratify(pool, train, test_fraction, salt=[seed, 0])
    pool = _draw(pool, num_train, rng)
    test_rows = _draw(test_rows, num_test, rng)
    if "valid" in rows:
        valid_source, valid_rows = rows["valid"], rows["valid"].indices()
    else:
        valid_source = train
        valid_rows, pool = _stratify(pool, train, valid_fraction, salt=[seed, 1])

    parts = {"train": (train, pool), "valid": (valid_source, valid_rows), "test": (test_source, test_rows)}
    splits = {name: Split(one.source.rows, rows_, one.labels[rows_]) for name, (one, rows_) in parts.items()}
    findings["counts"] = {name: count(split, labels) for name, split in splits.items()}
    _require_use(splits, labels)
    return Splits(
        **splits, labels=labels, fingerprints={name: one.fingerprint for name, one in rows.items()}, findings=findings
    )


def _scan(source: Source, vocabulary: dict[str, int]) -> _Rows:
    """One pass over the texts, in constant memory but for a few bytes a row."""
    count = len(source.rows)
    keys = np.empty(count, dtype=np.uint64)
    labels = np.empty(count, dtype=np.int32)
    kept = np.empty(count, dtype=bool)
    content = hashlib.sha256()
    row = 0
    for chunk in source.rows.data.to_batches(max_chunksize=BATCH_ROWS):
        for text, label in zip(chunk["text"].to_pylist(), chunk["label"].to_pylist(), strict=True):
            if not label:
                raise DataError(f"{source.locate(row)}: the label is missing.")
            content.update(f"{len(text)}:{text}{len(label)}:{label}".encode())
            keys[row] = key_of(text)
            labels[row] = vocabulary.setdefault(label, len(vocabulary))
            kept[row] = not is_blank(text)
            row += 1
    return _Rows(source, keys, labels, kept, content.hexdigest())


def _sort_labels(vocabulary: Mapping[str, int]) -> tuple[list[str], Array]:
    """Label names sorted (numbers by value), so that ids do not change between runs; and old id -> new id."""
    try:
        names = sorted(vocabulary, key=lambda name: (_number(name), name))
    except ValueError:
        names = sorted(vocabulary)
    order = np.empty(len(names), dtype=np.int32)
    for new, name in enumerate(names):
        order[vocabulary[name]] = new
    return names, order


def _number(name: str) -> float:
    number = float(name)
    if not math.isfinite(number):  # "nan" and "inf" are words
        raise ValueError(name)
    return number


def _mend_train(train: _Rows, held_out: Mapping[str, _Rows]) -> dict[str, Any]:
    repeated, contradicted = _find_repeats(train)
    train.kept &= ~(repeated | contradicted)
    found = {
        "repeated_train_texts": int((repeated & ~contradicted).sum()),
        "contradicted_train_texts": int(contradicted.sum()),
    }
    for split, one in held_out.items():
        overlap = train.kept & np.isin(train.keys, one.keys[one.kept])
        train.kept &= ~overlap
        found[f"train_texts_also_in_{split}"] = int(overlap.sum())
    return found


def _find_repeats(rows: _Rows) -> tuple[Array, Array]:
    """Rows that repeat an earlier kept one; and all rows of a text that carries two labels."""
    repeated, contradicted = np.zeros(len(rows.keys), dtype=bool), np.zeros(len(rows.keys), dtype=bool)
    order = rows.indices()
    if not len(order):
        return repeated, contradicted
    order = order[np.argsort(rows.keys[order], kind="stable")]
    keys = rows.keys[order]
    first = np.r_[True, keys[1:] != keys[:-1]]
    repeated[order] = ~first
    starts = np.flatnonzero(first)
    lowest = np.minimum.reduceat(rows.labels[order], starts)
    highest = np.maximum.reduceat(rows.labels[order], starts)
    contradicted[order] = (lowest != highest)[np.cumsum(first) - 1]
    return repeated, contradicted


def _require_known_labels(train: _Rows, held_out: Mapping[str, _Rows], labels: list[str]) -> None:
    known = np.unique(train.labels[train.kept])
    for one in held_out.values():
        strange = np.flatnonzero(~np.isin(one.labels, known))
        if len(strange):
            name = labels[one.labels[strange[0]]]
            raise DataError(f"{one.source.locate(int(strange[0]))}: no training text has the label {name!r}.")


def _require_class_sizes(train: _Rows, labels: list[str], findings: Mapping[str, Any]) -> None:
    sizes = np.bincount(train.labels[train.kept], minlength=len(labels))
    small = [f"{name!r} ({size})" for name, size in zip(labels, sizes, strict=True) if size < MIN_CLASS_TEXTS]
    if small:
        dropped = ", ".join(f"{name}: {count}" for name, count in findings.items() if isinstance(count, int) and count)
        raise DataError(
            f"{train.source.where}: too few usable training texts of {', '.join(small)}; "
            f"{MIN_CLASS_TEXTS} of each class are the least." + (f" Left out: {dropped}." if dropped else "")
        )


def _require_use(splits: Mapping[str, Split], labels: list[str]) -> None:
    for name, split in splits.items():
        if len(split) == 0:
            raise DataError(
                f"No {name} texts are left: NUM_TRAIN is too small, or the {name} file holds only empty texts."
            )
    missing = np.setdiff1d(np.arange(len(labels)), splits["train"].label_ids)
    if len(missing):
        names = ", ".join(repr(labels[label]) for label in missing)
        raise DataError(f"The texts drawn for training hold none of {names}; raise NUM_TRAIN.")


def _stratify(rows: Array, source: _Rows, fraction: float, *, salt: list[int]) -> tuple[Array, Array]:
    """Hold out a share of each class, one text at least where the class has two: (held out, rest).

    Which texts those are follows from their content: when the data grow, what was held out mostly stays so, and a
    model can be compared with one that was trained before.
    """
    multiplier, offset = np.random.SeedSequence(salt).generate_state(2, dtype=np.uint64)
    lots = (source.keys[rows] ^ offset) * (multiplier | np.uint64(1))  # the keys are hashes: this shuffles them anew
    lots ^= lots >> np.uint64(29)
    held_out: list[Array] = []
    for label in np.unique(source.labels[rows]):
        members = np.flatnonzero(source.labels[rows] == label)
        wanted = max(1, round(len(members) * fraction)) if len(members) > 1 else 0
        held_out.append(rows[members[np.argsort(lots[members], kind="stable")[:wanted]]])
    taken = np.sort(np.concatenate(held_out))
    return taken, np.setdiff1d(rows, taken)


def _draw(rows: Array, count: int, rng: np.random.Generator) -> Array:
    return np.sort(rng.choice(rows, count, replace=False)) if 0 < count < len(rows) else rows


def count(split: Split, labels: list[str]) -> dict[str, int]:
    """Texts by label."""
    sizes = np.bincount(split.label_ids, minlength=len(labels))
    return {name: int(size) for name, size in zip(labels, sizes, strict=True)}


def describe(findings: Mapping[str, Any]) -> list[str]:
    """The findings in sentences, for the log."""
    counts = findings["counts"]
    lines = [f"{split}: {sum(sizes.values())} texts ({_balance(sizes)})" for split, sizes in counts.items()]
    words = {
        "repeated_train_texts": "training texts left out because they repeat another",
        "contradicted_train_texts": "training texts left out because the same text carries two labels",
        "train_texts_also_in_valid": "training texts left out because they are also in the validation texts",
        "train_texts_also_in_test": "training texts left out because they are also in the test texts",
    }
    for split in ("valid", "test"):
        words[f"repeated_{split}_texts"] = f"{split} texts repeat another; they stay"
        words[f"contradicted_{split}_texts"] = f"{split} texts carry two labels; they stay, and cannot all be right"
    words["valid_texts_also_in_test"] = "validation texts are also in the test texts; they stay"
    lines += [f"{findings[key]} {sentence}" for key, sentence in words.items() if findings.get(key)]
    lines += [f"{count} empty texts left out of {split}" for split, count in findings["empty_texts"].items() if count]
    return lines


def _balance(sizes: Mapping[str, int]) -> str:
    if len(sizes) <= 6:
        return ", ".join(f"{name if name.isprintable() else repr(name)} {size}" for name, size in sizes.items())
    return f"{len(sizes)} classes of {min(sizes.values())} to {max(sizes.values())}"
