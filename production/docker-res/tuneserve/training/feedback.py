"""Feedback among the data: some is learned from, a share is held out, and the owner's own splits stay as they are.

Validation and test are the owner's alone, whatever people send; what is held out is a second test, `feedback`, which
the gate judges by too. Who sends texts cannot tell which will be held out: a secret of the store decides.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from datasets import concatenate_datasets

from tuneserve.lifecycle.evidence import key_of
from tuneserve.lifecycle.secret import lot
from tuneserve.tables.rows import format_label
from tuneserve.text import is_blank
from tuneserve.training.checks import Split, Splits, count
from tuneserve.training.data import memory_map
from tuneserve.training.labels import fold

logger = logging.getLogger(__name__)

Labelled = tuple[str, str, bool]
"""A text, its label, and whether it is held out."""


def draw_held_out(labelled: Iterable[tuple[str, str]], *, fraction: float, secret: bytes) -> list[Labelled]:
    """Which texts are held out: the same ones each time, also in another spelling."""
    return [(text, label, lot(secret, key_of(text)) < fraction) for text, label in labelled]


def join(splits: Splits, labelled: Sequence[Labelled], *, cache: Path, merge_labels: bool = False) -> Splits:
    """The splits with feedback among the training texts, and a split of what is held out of it.

    Texts that the data have already stay as they are there, and labels that they do not know are left out.

    Args:
        splits: of the data.
        labelled: the newest last: of texts that differ in case or spaces alone it counts.
        cache: where rows are kept.
        merge_labels: whether a label may differ from that of the data in case, spaces, Unicode form or number format.
    """
    alike = fold if merge_labels else format_label
    known = {alike(label): label for label in splits.labels}
    newest = {
        key_of(text): (text, known.get(alike(format_label(label)), ""), held)
        for text, label, held in labelled
        if not is_blank(text)
    }
    usable = {key: row for key, row in newest.items() if row[1]}
    learned = {key for text in splits.train if (key := key_of(text)) in usable}
    tested = {key for split in (splits.valid, splits.test) for text in split if (key := key_of(text)) in usable}
    added = [row for key, row in usable.items() if key not in learned | tested]
    parts = {name: [row for row in added if row[2] == held] for name, held in (("train", False), ("test", True))}
    found = {
        **{name: len(rows) for name, rows in parts.items()},
        "unknown_label": len(newest) - len(usable),
        "already_trained_on": len(learned),
        "already_held_out": len(tested),
    }
    logger.info(
        "feedback: %d texts join the training texts and %d are held out as a second test; left out: %d for labels that "
        "the data do not know, %d that the data train with already, %d that they hold out already",
        *found.values(),
    )
    more = {name: _split(rows, splits.labels, cache) for name, rows in parts.items() if rows}
    findings = {**splits.findings, "feedback": found}
    if "train" in more:
        train = _followed(splits.train, more["train"])
        counts = {**splits.findings["counts"], "train": count(train, splits.labels)}
        splits, findings = replace(splits, train=train), {**findings, "counts": counts}
    content = hashlib.sha256(json.dumps(added).encode()).hexdigest()
    fingerprints = {**splits.fingerprints, "feedback": content} if added else splits.fingerprints
    return replace(splits, feedback=more.get("test"), findings=findings, fingerprints=fingerprints)


def _split(rows: Sequence[Labelled], labels: Sequence[str], cache: Path) -> Split:
    source = memory_map(((number, text, label) for number, (text, label, _) in enumerate(rows, 1)), "feedback", cache)
    label_ids = np.array([labels.index(label) for _, label, _ in rows], dtype=np.int32)
    return Split(source, np.arange(len(rows)), label_ids)


def _followed(first: Split, more: Split) -> Split:
    """The texts of both."""
    return Split(
        concatenate_datasets([first.source, more.source]),
        np.concatenate([first.rows, len(first.source) + more.rows]),
        np.concatenate([first.label_ids, more.label_ids]),
    )
