"""What the data are worth: every run counts what is wrong with them, mends what can be mended, refuses what cannot.

Mended, and counted in the findings: empty texts, repeated training texts, training texts with two labels, training
texts that are also in the validation or test texts. Texts are compared without case and runs of spaces.
Refused: a row without a label, a single class, labels that look like numbers to predict, a class with too few texts, a
test label that training never shows. Rare labels may be left out or joined instead; labels that look alike, joined.
A test file that is given stays as it is, empties and rare labels aside, so that its figures compare with others'.

The module is long because `check` and all that it counts, mends and refuses read best in one place.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset

from tuneserve.errors import DataError
from tuneserve.lifecycle.evidence import key_of
from tuneserve.tables.rows import BATCH_ROWS, enumerate_some, shorten
from tuneserve.text import is_blank
from tuneserve.training import labels as names_of
from tuneserve.training.data import Source

Array = np.ndarray[Any, np.dtype[Any]]

FEW_LABELS = 20
"""Labels for which MIN_VALID validation texts are enough, five of each by default; more want more in proportion."""
MOST_TIMES = 10
"""But so many times MIN_VALID at most."""


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
    test_source: Source | None = None
    """What the test texts were drawn from."""

    @property
    def cross_validates(self) -> bool:
        """Whether no texts are held out for validation."""
        return len(self.valid) == 0


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
    min_valid: int = 0,
    merge_labels: bool = False,
    min_class_size: int = 2,
    rare_labels: Literal["refuse", "drop", "other"] = "refuse",
) -> Splits:
    """Check what was read, mend it, and split it where the data bring no split of their own.

    Args:
        sources: `train` and perhaps `valid` and `test`.
        num_train: training texts to draw; 0 for all.
        num_test: test texts to draw; 0 for all.
        valid_fraction: share of the training texts to hold out where there are no validation texts.
        test_fraction: share of all texts to hold out where there are no test texts.
        seed: of the draws and splits.
        min_valid: fewest texts of FEW_LABELS that are worth holding out for validation, more labels want more; where
            it would be fewer, `valid` is empty.
        merge_labels: whether labels that differ only in case, spaces, Unicode form or number format are joined.
        min_class_size: fewest training texts of a label; fewer make it rare.
        rare_labels: what is done about rare ones: refuse the data, drop their texts, or join them as `other`.

    Raises:
        DataError: the data would teach nothing, or the result would be a lie.
    """
    vocabulary: dict[str, int] = {}
    rows = {split: _scan(source, vocabulary) for split, source in sources.items()}
    train = rows["train"]
    if not vocabulary:
        raise DataError(f"{train.source.where} has no texts: all its rows are empty.")
    held_out = {split: one for split, one in rows.items() if split != "train"}
    findings: dict[str, Any] = {"empty_texts": {split: int((~one.kept).sum()) for split, one in rows.items()}}
    labels = _name_labels(rows, list(vocabulary), findings, merge=merge_labels)
    if len(labels) < 2:
        raise DataError(f"{train.source.where} has one class only, {names_of.name_labels(labels)}; two are the least.")
    findings |= _mend_train(train, held_out)
    repeats = {split: [int(marks.sum()) for marks in _find_repeats(one)] for split, one in held_out.items()}
    findings |= {f"repeated_{split}_texts": count for split, (count, _) in repeats.items()}
    findings |= {f"contradicted_{split}_texts": count for split, (_, count) in repeats.items()}
    if {"valid", "test"} <= set(rows):
        shared = np.isin(rows["valid"].keys[rows["valid"].kept], rows["test"].keys[rows["test"].kept])
        findings["valid_texts_also_in_test"] = int(shared.sum())
    _refuse_numbers(train, labels, by_hand=rare_labels != "refuse")
    if rare_labels == "refuse":
        _require_known_labels(train, held_out, labels)
    else:
        labels = _mend_rare(rows, labels, findings, least=min_class_size, join=rare_labels == "other")
    _require_class_sizes(train, labels, findings, least=min_class_size)

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
        valid_source, valid_rows = train, pool[:0]
        if round(len(pool) * valid_fraction) >= min_valid * np.clip(len(labels) / FEW_LABELS, 1, MOST_TIMES):
            valid_rows, pool = _stratify(pool, train, valid_fraction, salt=[seed, 1])

    parts = {"train": (train, pool), "valid": (valid_source, valid_rows), "test": (test_source, test_rows)}
    splits = {name: Split(one.source.rows, rows_, one.labels[rows_]) for name, (one, rows_) in parts.items()}
    findings["counts"] = {name: count(split, labels) for name, split in splits.items()}
    findings["cross_validated"] = "valid" not in rows and not len(valid_rows)
    _require_use(splits, labels, cross_validates=findings["cross_validated"])
    fingerprints = {name: one.fingerprint for name, one in rows.items()}
    source = test_source.source
    return Splits(**splits, labels=labels, fingerprints=fingerprints, findings=findings, test_source=source)


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
            blank = is_blank(text)
            if not label and not blank:  # a row without either is one that a spreadsheet has left behind
                raise DataError(f"{source.locate(row)}: the label is missing; write one, or remove the row.")
            content.update(f"{len(text)}:{text}{len(label)}:{label}".encode())
            keys[row] = key_of(text)
            labels[row] = vocabulary.setdefault(label, len(vocabulary)) if label else 0
            kept[row] = not blank
            row += 1
    return _Rows(source, keys, labels, kept, content.hexdigest())


def _name_labels(rows: Mapping[str, _Rows], names: list[str], findings: dict[str, Any], *, merge: bool) -> list[str]:
    """The labels, sorted, so that ids do not change between runs; what is odd about them goes into the findings."""
    sizes = dict(zip(names, _sizes(rows["train"], len(names)), strict=True))
    alike = names_of.find_alike(sizes)
    if count := names_of.count_numbers(names):
        findings["numbers_as_labels"] = count
    odd = {"combined_labels": names_of.find_combined(names), "missing_labels": names_of.find_missing(names)}
    if alike:
        examples = [{name: sizes[name] for name in group} for group in list(alike.values())[: names_of.SHOWN]]
        findings["alike_labels"] = {"groups": len(alike), "examples": examples, "merged": merge}
    findings |= {key: found[: names_of.SHOWN] for key, found in odd.items() if found}
    chosen = {name: most for most, group in alike.items() for name in group} if merge else {}
    return _rename(rows, names, [chosen.get(name, name) for name in names])


def _rename(rows: Mapping[str, _Rows], old: list[str], new: list[str]) -> list[str]:
    """Replace the labels `old` by those at the same index of `new`: the names by their new ids."""
    names = names_of.sort_labels(set(new))
    ids = {name: number for number, name in enumerate(names)}
    order = np.array([ids[name] for name in new], dtype=np.int32)
    for one in rows.values():
        one.labels = order[one.labels]
    return names


def _sizes(rows: _Rows, count: int) -> list[int]:
    """Usable texts of each label."""
    return [int(size) for size in np.bincount(rows.labels[rows.kept], minlength=count)]


def _refuse_numbers(train: _Rows, labels: list[str], *, by_hand: bool) -> None:
    sizes = dict(zip(labels, _sizes(train, len(labels)), strict=True))
    if names_of.look_like_numbers(sizes) and not by_hand:
        raise DataError(
            f"{train.source.where}: the label looks like a number to predict ({names_of.name_labels(labels)}); this "
            "job classifies. Put the numbers into classes, such as low and high; if they are classes, set RARE_LABELS."
        )


def _mend_rare(
    rows: Mapping[str, _Rows], labels: list[str], findings: dict[str, Any], *, least: int, join: bool
) -> list[str]:
    """Leave out labels with too few training texts, or join them as one that has enough: the labels that stay."""
    sizes = dict(zip(labels, _sizes(rows["train"], len(labels)), strict=True))
    rare = {name for name, size in sizes.items() if size < least}
    if not rare:
        return labels
    join = join and sum(sizes[name] for name in rare) >= least
    ids = [number for number, name in enumerate(labels) if name in rare]
    marks = {split: one.kept & np.isin(one.labels, ids) for split, one in rows.items()}
    other = next((name for name in labels if names_of.fold(name) == names_of.OTHER), names_of.OTHER)
    findings["rare_labels"] = {
        "labels": len(rare),
        "examples": [name for name in labels if name in rare][: names_of.SHOWN],
        "joined_as": other if join else None,
        "texts": {split: int(mark.sum()) for split, mark in marks.items()},
    }
    if join:
        return _rename(rows, labels, [other if name in rare else name for name in labels])
    stay = [name for name in labels if name not in rare]
    if len(stay) < 2:
        raise DataError(
            f"{rows['train'].source.where}: only {len(stay)} of {len(labels)} labels have {least} usable training "
            "texts; lower MIN_CLASS_SIZE or set RARE_LABELS=other."
        )
    for split, one in rows.items():
        one.kept &= ~marks[split]
    return _rename(rows, labels, [stay[0] if name in rare else name for name in labels])  # their rows are not kept


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
        strange = np.flatnonzero(one.kept & ~np.isin(one.labels, known))
        if len(strange):
            name = labels[one.labels[strange[0]]]
            alike = next((labels[id] for id in known if names_of.fold(labels[id]) == names_of.fold(name)), None)
            way = f"; LABELS=merge joins it with {names_of.quote(alike)}" if alike else ""
            raise DataError(
                f"{one.source.locate(int(strange[0]))}: no training text has the label {names_of.quote(name)}{way}."
            )


def _require_class_sizes(train: _Rows, labels: list[str], findings: Mapping[str, Any], *, least: int) -> None:
    sizes = dict(zip(labels, _sizes(train, len(labels)), strict=True))
    small = {name: size for name, size in sizes.items() if size < least}
    if small:
        named = enumerate_some((f"{names_of.quote(name)} ({size})" for name, size in small.items()), names_of.SHOWN)
        dropped = ", ".join(
            f"{name}: {count}"
            for name, count in findings.items()
            if isinstance(count, int) and count and name != "numbers_as_labels"
        )
        alone = len(sizes) * 2 > train.kept.sum() and len(small) > names_of.SHOWN
        raise DataError(
            f"{train.source.where}: too few usable training texts of {named}; {least} of each class are the least."
            + (f" Left out: {dropped}." if dropped else "")
            + (" Most texts have a label of their own: is LABEL_COLUMN right?" if alone else "")
            + " RARE_LABELS=drop leaves such labels out, RARE_LABELS=other joins them; MIN_CLASS_SIZE is the bound."
        )


def _require_use(splits: Mapping[str, Split], labels: list[str], *, cross_validates: bool) -> None:
    for name, split in splits.items():
        if len(split) == 0 and not (name == "valid" and cross_validates):
            raise DataError(
                f"No {name} texts are left: NUM_TRAIN is too small, or the {name} file holds only empty texts."
            )
    missing = np.setdiff1d(np.arange(len(labels)), splits["train"].label_ids)
    if len(missing):
        names = names_of.name_labels(labels[label] for label in missing)
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
    if findings.get("cross_validated"):
        lines[list(counts).index("valid")] = "valid: no texts; so few are all learned from, by cross-validation"
    words = {
        "repeated_train_texts": "training texts left out because they repeat another",
        "contradicted_train_texts": "training texts left out because the same text carries two labels",
        "train_texts_also_in_valid": "training texts left out because they are also in the validation texts",
        "train_texts_also_in_test": "training texts left out because they are also in the test texts",
        "suspected_train_texts": "training texts left out because their labels are probably wrong (LABEL_ISSUES=drop)",
    }
    for split in ("valid", "test"):
        words[f"repeated_{split}_texts"] = f"{split} texts repeat another; they stay"
        words[f"contradicted_{split}_texts"] = f"{split} texts carry two labels; they stay, and cannot all be right"
    words["valid_texts_also_in_test"] = "validation texts are also in the test texts; they stay"
    lines += [f"{findings[key]} {sentence}" for key, sentence in words.items() if findings.get(key)]
    lines += names_of.describe(findings)
    lines += [f"{count} empty texts left out of {split}" for split, count in findings["empty_texts"].items() if count]
    return lines


def _balance(sizes: Mapping[str, int]) -> str:
    if len(sizes) <= 6:
        names = [name if name.isprintable() else repr(name) for name in map(shorten, sizes)]
        return ", ".join(f"{name} {size}" for name, size in zip(names, sizes.values(), strict=True))
    return f"{len(sizes)} classes of {min(sizes.values())} to {max(sizes.values())}"
