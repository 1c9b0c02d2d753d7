"""Drift: whether the texts served now still resemble those that a version was tested on, judged by its answers.

`drift.json` in a version's folder holds its answers to texts held out from training; a server keeps its latest answers
in the same form. No text is kept, only five figures of each.
"""

import json
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field, TypeAdapter

from tuneserve.artifact import Version
from tuneserve.errors import StoreError
from tuneserve.files import read_record
from tuneserve.lifecycle.statistics import Array, chi_square, fisher, holm, kolmogorov_smirnov, rank_sum

DRIFT = "drift.json"

MAX_TEXTS = 2000
"""Texts of a reference: more would hardly sharpen the comparison with a window of 500."""

MIN_TEXTS = 50
"""Fewer texts than this are not judged."""

LEVEL = 0.01
"""The family-wise error rate: how often a window like the reference is called drift, at most."""

RARE = 0.05
"""Share of the reference's texts that are called rare by one figure."""

DECIMALS = 3
"""Decimals of a confidence: finer differences come from the precision of the engine."""

THRESHOLDS = {"labels": 0.1, "confidence": 0.1, "length": 0.1, "unknown": 0.01, "truncated": 0.05}
"""The smallest difference that is called drift, however significant: with many texts a test detects the negligible."""


COLUMNS = {"label_ids": np.int64, "confidences": np.float64, "tokens": np.int64, "unknown": np.int64, "truncated": bool}
"""The arrays of Answers with their types; in `drift.json` too."""


@dataclass(frozen=True)
class Answers:
    """The answers to some texts: five arrays [texts], and no text.

    `label_ids` int64; `confidences` float64, the probability of the likeliest label; `tokens` and `unknown` int64,
    how many were read and how many of these the vocabulary does not have; `truncated` bool.
    """

    label_ids: Array
    confidences: Array
    tokens: Array
    unknown: Array
    truncated: Array

    def __len__(self) -> int:
        return len(self.label_ids)

    @property
    def unknown_shares(self) -> Array:
        """Unknown tokens by tokens, float64 [texts]."""
        return self.unknown / np.maximum(1, self.tokens)

    def of(self, rows: Array) -> "Answers":
        """The answers to some texts, chosen by indices or by a mask."""
        return Answers(*(getattr(self, name)[rows] for name in COLUMNS))

    @classmethod
    def from_columns(cls, columns: Iterable[Sequence[float]]) -> "Answers":
        """From lists in the order of COLUMNS."""
        return cls(*(np.array(column, dtype=kind) for column, kind in zip(columns, COLUMNS.values(), strict=True)))


@dataclass(frozen=True)
class Reference:
    """What a version answered, when it was saved, to texts that it was not trained on; labels by id."""

    labels: list[str]
    answers: Answers

    def whole_texts(self) -> "Reference":
        """The reference without truncated texts, for a server that refuses long texts."""
        return Reference(self.labels, self.answers.of(~self.answers.truncated))


def write_reference(folder: Path, answers: Answers, *, seed: int) -> None:
    """Write it into a version's folder; more than MAX_TEXTS are sampled with `seed`."""
    if len(answers) > MAX_TEXTS:
        answers = answers.of(np.sort(np.random.default_rng(seed).choice(len(answers), MAX_TEXTS, replace=False)))
    content = {name: getattr(answers, name).tolist() for name in COLUMNS}
    content["confidences"] = np.round(answers.confidences.astype(np.float64), DECIMALS).tolist()
    content["truncated"] = answers.truncated.astype(int).tolist()
    (folder / DRIFT).write_text(json.dumps(content, allow_nan=False, separators=(",", ":")) + "\n", encoding="utf-8")


COLUMNS_SHAPE: TypeAdapter[dict[str, list[Annotated[float, Field(ge=0, le=1 << 40)]]]] = TypeAdapter(
    dict[str, list[Annotated[float, Field(ge=0, le=1 << 40)]]]
)


def read_reference(version: Version) -> Reference | None:
    """The version's reference; None if it was saved without one.

    Raises:
        StoreError: the file is damaged.
    """
    path = version.folder / DRIFT
    try:
        content = read_record(path, COLUMNS_SHAPE)
        columns = [content[name] for name in COLUMNS]
        if len({len(column) for column in columns}) != 1:
            raise ValueError("its columns differ in length")
        if not all(label < len(version.labels) for label in content["label_ids"]):
            raise ValueError("it has more labels than the version")
        return Reference(version.labels, Answers.from_columns(columns))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error


class Observation(NamedTuple):
    """What is noted of one answer: nothing of the text itself."""

    label_id: int
    confidence: float
    tokens: int
    """Tokens that were read; of a text read in several windows, those of the first, as in the test."""
    unknown: int
    """How many of these the vocabulary does not have."""
    truncated: bool


class Window:
    """The latest answers of one version. One thread adds while others read.

    Args:
        max_texts: that it holds; the oldest are dropped.
        hours: after which an answer no longer counts.
    """

    def __init__(self, *, max_texts: int = 500, hours: float = 24) -> None:
        self.max_texts, self.hours = max_texts, hours
        self._rows: deque[tuple[float, int, float, int, int, bool]] = deque(maxlen=max_texts)

    def add(self, observation: Observation) -> None:
        """Add the answer to one text."""
        self._rows.append((time.time(), *observation))

    def read(self) -> tuple[Array, Answers]:
        """When each text was answered, in seconds of the epoch, and the answers, oldest first."""
        since = time.time() - self.hours * 3600
        rows = [row for row in self._rows.copy() if row[0] >= since]  # only a copy is safe beside a thread that adds
        at, *columns = zip(*rows, strict=True) if rows else ((),) * 6
        return np.array(at, dtype=np.float64), Answers.from_columns(columns)


@dataclass(frozen=True)
class Figure:
    """One comparison: the difference, the threshold of drift, and the p-value, corrected for the number of figures."""

    name: str
    value: float
    threshold: float
    p_value: float
    drifted: bool
    sentence: str


@dataclass(frozen=True)
class Report:
    """The result of judging a window. `begins` and `ends` are when its first and last text were answered, in UTC."""

    drifted: bool
    texts: int
    reference_texts: int
    max_texts: int
    hours: float
    begins: str | None
    ends: str | None
    figures: tuple[Figure, ...]
    sentence: str


def compare(reference: Reference | None, window: Window) -> Report:
    """Judge a window by a version's reference."""
    at, now = window.read()
    before = reference.answers if reference is not None else None
    figures: tuple[Figure, ...] = ()
    if reference is None or before is None:
        sentence = "This version was saved without a reference, so nothing can be judged; the next training saves one."
    elif len(before) < MIN_TEXTS:
        sentence = f"The reference has {len(before)} texts; nothing is judged by fewer than {MIN_TEXTS}."
    elif len(now) < MIN_TEXTS:
        sentence = f"{len(now)} texts were answered lately; nothing is judged before there are {MIN_TEXTS}."
    else:
        figures = judge(reference, now)
        sentence = _summary(figures, texts=len(now))
    return Report(
        drifted=any(one.drifted for one in figures),
        texts=len(now),
        reference_texts=len(before) if before is not None else 0,
        max_texts=window.max_texts,
        hours=window.hours,
        begins=utc(at[0]) if len(at) else None,
        ends=utc(at[-1]) if len(at) else None,
        figures=figures,
        sentence=sentence,
    )


def rare_in(reference: Reference | None, observations: Sequence[Observation | None]) -> list[list[str]]:
    """For each answer the figures by which few texts of the reference are like it: its length, its unknown words."""
    before = reference.answers if reference is not None else ()
    if not isinstance(before, Answers) or not len(before):
        return [[] for _ in observations]
    low, high = np.quantile(before.tokens, [RARE / 2, 1 - RARE / 2]).tolist()
    most = float(np.quantile(before.unknown_shares, 1 - RARE))

    def rare(one: Observation) -> list[str]:
        is_rare = {"length": not low <= one.tokens <= high, "unknown": one.unknown / max(1, one.tokens) > most}
        return [name for name, found in is_rare.items() if found]

    return [rare(one) if one is not None else [] for one in observations]


def utc(seconds: float) -> str:
    """A time as ISO 8601, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def judge(reference: Reference, now: Answers) -> tuple[Figure, ...]:
    """All figures of some answers, however few these are."""
    before = reference.answers
    found = [
        ("labels", *_labels(reference.labels, before, now)),
        ("confidence", *_confidence(before, now)),
        ("length", *_length(before, now)),
        ("unknown", *_unknown(before, now)),
        ("truncated", *_truncated(before, now)),
    ]
    p_values = holm([p_value for _, _, p_value, _ in found])
    return tuple(
        _figure(name, value, p_value, words) for (name, value, _, words), p_value in zip(found, p_values, strict=True)
    )


Finding = tuple[float, float, str]
"""A difference, the p-value of it alone, and the difference in words."""


def _labels(labels: list[str], before: Answers, now: Answers) -> Finding:
    counts = [np.bincount(one.label_ids, minlength=len(labels)) for one in (before, now)]
    old, new = (count / count.sum() for count in counts)
    value = float(np.abs(new - old).sum() / 2)  # total variation
    gained = int((new - old).argmax())
    words = (
        f"Predicted labels: {labels[gained]!r}, which gained most, went from {old[gained]:.1%} to {new[gained]:.1%} of "
        f"the texts; with another label for {value:.1%} of the texts all shares would be as before"
    )
    return value, chi_square(counts[0], counts[1]), words


def _confidence(before: Answers, now: Answers) -> Finding:
    old, new = (np.round(one.confidences, DECIMALS) for one in (before, now))
    value, p_value = kolmogorov_smirnov(old, new)
    words = f"the mean probability of the predicted label went from {old.mean():.3f} to {new.mean():.3f}"
    return value, p_value, f"Confidence: {words}; {value:.1%} is the widest gap between the cumulative shares"


def _length(before: Answers, now: Answers) -> Finding:
    value, p_value = kolmogorov_smirnov(before.tokens, now.tokens)
    words = f"the median text went from {np.median(before.tokens):g} to {np.median(now.tokens):g} tokens"
    return value, p_value, f"Length: {words}; {value:.1%} is the widest gap between the cumulative shares"


def _unknown(before: Answers, now: Answers) -> Finding:
    old, new = before.unknown_shares, now.unknown_shares
    value = float(abs(new.mean() - old.mean()))
    words = f"Unknown tokens: their mean share of a text went from {old.mean():.2%} to {new.mean():.2%}"
    return value, rank_sum(old, new), f"{words}, a difference of {value:.2%}"


def _truncated(before: Answers, now: Answers) -> Finding:
    old, new = int(before.truncated.sum()), int(now.truncated.sum())
    value = abs(new / len(now) - old / len(before))
    words = f"Truncated texts: their share went from {old / len(before):.1%} to {new / len(now):.1%}"
    return value, fisher(old, len(before), new, len(now)), f"{words}, a difference of {value:.1%}"


def _figure(name: str, value: float, p_value: float, words: str) -> Figure:
    threshold = THRESHOLDS[name]
    large, sure = value >= threshold, p_value <= LEVEL
    if large and sure:
        verdict = f"That is drift: it reaches {threshold:.0%}, and chance does not explain it (p = {p_value:.2g})."
    elif sure:
        verdict = f"That is not called drift: it is below {threshold:.0%}, though more than chance (p = {p_value:.2g})."
    else:
        verdict = f"That is not called drift: chance may explain it (p = {p_value:.2g})."
    return Figure(name, round(value, 4), threshold, float(f"{p_value:.3g}"), large and sure, f"{words}. {verdict}")


def _summary(figures: tuple[Figure, ...], *, texts: int) -> str:
    drifted = [one.name for one in figures if one.drifted]
    if not drifted:
        return f"The last {texts} texts are like those the version was tested on."
    return f"The last {texts} texts are not like those the version was tested on: {', '.join(drifted)}."
