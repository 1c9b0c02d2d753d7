"""Labels that are probably wrong: confident learning (Northcutt et al., 1911.00068) from answers not known by heart.

Where the body is trained, a training text's label is judged by what the model said before each time that it learned
from the text (`dynamics`: the first time it has not learned from it at all, later once or twice), and a validation or
test text's by what the model says in the end. Where the body stays as it is, where texts are few, and before suspects
are dropped, a logistic regression on what the untrained body says answers texts in five folds (`look`).

Texts for which another label than their own is above that label's threshold, the mean probability of the label
among the texts that carry it, say how many labels are wrong: a label that the model is seldom sure of needs less,
and a frequent one does not draw everything. So many texts are suspected, the least probable labels first. What is
suspected is often merely hard: people should look before anything is changed.
"""

import json
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from scipy.special import softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from tuneserve.errors import StoreError
from tuneserve.files import read_record, write_json
from tuneserve.lifecycle.label_issues import LabelIssue
from tuneserve.training.checks import Split, Splits, count
from tuneserve.training.dynamics import MOST_TEXTS, draw_rows
from tuneserve.training.few import draw_folds
from tuneserve.training.tokens import TokenizedSplit
from tuneserve.training.world import World

Array = np.ndarray[Any, np.dtype[Any]]

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
"""Whose labels are judged."""
FOLDS = 5
STRENGTH = 0.5
"""Inverse strength of the regression's regularization (`C` of scikit-learn) for each label, of many of which each has
fewer of the texts; for features of mean square length 1."""
MOST_ITERATIONS = 100
TOLERANCE = 1e-3
"""Of the gradient: probabilities to three digits are enough to rank texts by."""
MAX_BYTES = 64 << 20
FEWEST_LEFT = 2
"""Training texts of a label that stay; and of each label at least half."""


@dataclass(frozen=True)
class Suspects:
    """Texts whose labels are probably wrong, the most suspicious first."""

    rows: Array
    """int [suspects]: which of the texts that were given."""
    likely: Array
    """int [suspects]: the label ids that they should perhaps have."""
    probability: Array
    """float [suspects], of the given label."""
    rates: Array
    """float [labels]: the estimated share of the texts with this label that should have another."""


@dataclass(frozen=True)
class Found:
    """Suspects by split, and what a version's metadata says of them."""

    rows: dict[str, list[int]]
    """Of each split's texts, the most suspicious first."""
    likely: dict[str, list[int]]
    probability: dict[str, list[float]]
    record: dict[str, Any]


def find(features: Array, label_ids: Array, labels: int, seed: int) -> Suspects:
    """The texts whose labels are probably wrong.

    Args:
        features: float [texts, channels].
        label_ids: the given ones, int [texts].
        labels: how many there are.
        seed: of the folds.
    """
    return judge(held_out_probabilities(features, label_ids, labels, seed), label_ids)


def held_out_probabilities(features: Array, label_ids: Array, labels: int, seed: int) -> Array:
    """What a regression says of texts that it has not learned from, float [texts, labels].

    A label that a fold's regression does not know has probability 0 there, and the only text of its label is not
    judged: its own has 1.
    """
    centered = np.asarray(features, dtype=np.float32) - features.mean(0, dtype=np.float32)
    centered /= float(np.sqrt((centered**2).sum(1).mean())) or 1.0
    folds = draw_folds(label_ids, seed, folds=FOLDS)
    probabilities = np.zeros((len(label_ids), labels))
    alone = folds < 0
    probabilities[alone, label_ids[alone]] = 1.0
    for number in range(FOLDS):
        rows, rest = np.flatnonzero(folds == number), np.flatnonzero(folds != number)
        known = np.unique(label_ids[rest])
        if not len(rows):
            continue
        if len(known) < 2:
            probabilities[rows, label_ids[rows]] = 1.0
            continue
        regression = LogisticRegression(C=STRENGTH * labels, max_iter=MOST_ITERATIONS, tol=TOLERANCE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # what is found by then is good enough
            regression.fit(centered[rest], label_ids[rest])
        probabilities[np.ix_(rows, known)] = regression.predict_proba(centered[rows])
    return probabilities


def judge(probabilities: Array, label_ids: Array) -> Suspects:
    """Confident learning, from held-out probabilities float [texts, labels] and the given labels, int [texts].

    The confident joint counts texts by given label and the label above its threshold. What stands beside its diagonal,
    as shares of each given label, says how many labels are wrong; so many are suspected, those whose given label is the
    least probable, if another one is more so.
    """
    texts, labels = probabilities.shape
    everyone = np.arange(texts)
    own = probabilities[everyone, label_ids]
    sizes = np.bincount(label_ids, minlength=labels)
    thresholds = np.bincount(label_ids, weights=own, minlength=labels) / np.maximum(sizes, 1)
    thresholds[sizes == 0] = np.inf
    reached = np.where(probabilities >= thresholds, probabilities, -1.0)
    confident = reached.max(1) >= 0
    joint = np.zeros((labels, labels))
    np.add.at(joint, (label_ids[confident], reached[confident].argmax(1)), 1)
    counted = joint.sum(1)
    rates = np.where(counted > 0, 1 - np.diag(joint) / np.maximum(counted, 1), 0.0)
    others = probabilities.copy()
    others[everyone, label_ids] = -1.0
    rows = np.argsort(own, kind="stable")[: round(float(rates @ sizes))]
    rows = rows[own[rows] < others[rows].max(1)]
    return Suspects(rows, others.argmax(1)[rows], own[rows], rates)


def look(
    read: Callable[[TokenizedSplit, Array], Array | None],
    tokens: Mapping[str, TokenizedSplit],
    labels: int,
    *,
    seed: int,
    most: int = MOST_TEXTS,
) -> Found | None:
    """Judge the labels of all splits; None if there are no features to judge them by.

    Args:
        read: given a split and rows of it, what an untrained body says of them, float [rows, channels]; or None.
        tokens: the splits by name.
        labels: how many there are.
        seed: of the folds and, beyond `most` texts, of the sample.
        most: texts that are looked at.
    """
    began = time.perf_counter()
    names = [name for name in SPLITS if name in tokens]
    ends = np.cumsum([len(tokens[name]) for name in names])
    rows = draw_rows(int(ends[-1]), seed, most=most)
    split_of = np.searchsorted(ends, rows, side="right")
    places = rows - np.r_[0, ends[:-1]][split_of]
    features = []
    for number, name in enumerate(names):
        chosen = places[split_of == number]
        if not len(chosen):
            continue
        if (rows_read := read(tokens[name], chosen)) is None:
            logger.info("labels are not judged: the last layer does not read a row of numbers of each text")
            return None
        features.append(rows_read)
    label_ids = np.concatenate(
        [tokens[name].label_ids[places[split_of == number]] for number, name in enumerate(names)]
    )
    suspects = find(np.concatenate(features), label_ids, labels, seed)
    return describe([Judged(names, split_of, places, label_ids, suspects)], began)


def judge_learned(
    learned: tuple[Array, Array], logits: Mapping[str, Array], tokens: Mapping[str, TokenizedSplit]
) -> Found:
    """Judge the labels of all splits by what the training itself has shown.

    Training texts are judged by themselves, and the texts that were not learned from by themselves: their answers are
    surer.

    Args:
        learned: training texts, int [texts], and the mean of what was said of them, as `Dynamics.mean`.
        logits: of the trained model on the other splits, float [texts, labels], calibrated.
        tokens: the splits by name.
    """
    began = time.perf_counter()
    rows, probabilities = learned
    label_ids = tokens["train"].label_ids[rows]
    train = Judged(["train"], np.zeros(len(rows), dtype=int), rows, label_ids, judge(probabilities, label_ids))
    names = [name for name in SPLITS[1:] if name in logits]
    sizes = [len(logits[name]) for name in names]
    label_ids = np.concatenate([tokens[name].label_ids for name in names])
    others = Judged(
        names,
        np.repeat(np.arange(len(names)), sizes),
        np.concatenate([np.arange(size) for size in sizes]),
        label_ids,
        judge(softmax(np.concatenate([logits[name] for name in names]).astype(np.float64), axis=1), label_ids),
    )
    return describe([train, others], began)


@dataclass(frozen=True)
class Judged:
    """Texts of some splits that were judged together: for each, which split, row and given label are its own."""

    names: Sequence[str]
    split_of: Array
    """int [texts]: a place in `names`."""
    places: Array
    """int [texts], rows of the splits."""
    label_ids: Array
    suspects: Suspects
    """By places among these texts."""


def describe(judged: Sequence[Judged], began: float) -> Found:
    """The suspects by split; `began` is when the judging did, by `time.perf_counter()`."""
    found = Found({}, {}, {}, {"texts": {}, "suspected": {}, "test_label_error": None})
    for one in judged:
        for number, name in enumerate(one.names):
            chosen = one.split_of[one.suspects.rows] == number
            found.rows[name] = one.places[one.suspects.rows[chosen]].tolist()
            found.likely[name] = one.suspects.likely[chosen].tolist()
            found.probability[name] = one.suspects.probability[chosen].tolist()
            own = one.label_ids[one.split_of == number]
            found.record["texts"][name] = len(own)
            found.record["suspected"][name] = int(chosen.sum())
            if name == "test" and len(own):
                found.record["test_label_error"] = float(one.suspects.rates[own].mean())
    found.record["seconds"] = round(time.perf_counter() - began, 3)
    said = ", ".join(
        f"{number} of {found.record['texts'][name]} in {name}" for name, number in found.record["suspected"].items()
    )
    logger.info("labels that are probably wrong: %s (%.1f s)", said, found.record["seconds"])
    return found


def remember(path: Path, found: Found | None) -> None:
    """Keep it for a run that is interrupted, which must go on with the same texts.

    Raises:
        StoreError: the disk refuses.
    """
    if found is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(found))
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error}") from error


def recall(path: Path) -> Found | None:
    """What an interrupted run had found; None if there was none."""
    try:
        return read_record(path, SHAPE, max_bytes=MAX_BYTES)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read, the labels are judged again: %s", path, error)
        return None


SHAPE = TypeAdapter(Found)


def share(found: Found | None, world: World) -> Found | None:
    """What the leading process has found, in all processes."""
    if world.size == 1:
        return found
    content = json.loads(world.broadcast_text(json.dumps(found and asdict(found))))
    return Found(**content) if content else None


def drop(splits: Splits, found: Found) -> Splits:
    """The splits without the training texts that are suspected; of each label at least half stay, and two.

    How many they are goes into the findings.
    """
    train = splits.train
    sizes = np.bincount(train.label_ids, minlength=len(splits.labels))
    spare = sizes - np.maximum((sizes + 1) // 2, FEWEST_LEFT)
    kept = np.ones(len(train), dtype=bool)
    for row in found.rows["train"]:
        if spare[label := train.label_ids[row]] > 0:
            spare[label] -= 1
            kept[row] = False
    left = Split(train.source, train.rows[kept], train.label_ids[kept])
    counts = splits.findings["counts"] | {"train": count(left, splits.labels)}
    findings = splits.findings | {"counts": counts, "suspected_train_texts": int((~kept).sum())}
    return replace(splits, train=left, findings=findings)


def quote(splits: Splits, found: Found) -> list[LabelIssue]:
    """The suspects with their texts, as they are written for people: the test's first, each split by suspicion.

    Args:
        splits: as they were when they were judged.
        found: in them.
    """
    issues = []
    for name in reversed(SPLITS):
        rows = found.rows.get(name, [])
        if not rows:
            continue
        split: Split = getattr(splits, name)
        given = split.label_ids[rows]
        texts = split.texts.select(rows)["text"]
        for row in zip(texts, given, found.likely[name], found.probability[name], strict=True):
            text, own, likely, probability = row
            issues.append(LabelIssue(name, text, splits.labels[own], splits.labels[likely], probability))
    return issues
