"""Feedback joins the data: labelled texts that came through the API, as further rows of what DATASET brought."""

import logging
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

from tuneserve.lifecycle.evidence import key_of
from tuneserve.tables.rows import BATCH_ROWS
from tuneserve.training.data import Source, memory_map

logger = logging.getLogger(__name__)


def join(
    sources: Mapping[str, Source], labelled: Sequence[tuple[str, str]], *, test_fraction: float, cache: Path
) -> tuple[dict[str, Source], dict[str, int]]:
    """The sources with feedback behind their rows, and what became of it.

    If the data bring test texts, a share of the feedback joins them, the same texts each time: a model that is trained
    after its world has changed must be tested on the new one too. Texts that the data hold out already stay where they
    are, those that they train with are never moved to the test, and labels that they do not know are left out.

    Args:
        sources: as read; `train` is among them.
        labelled: texts and labels, the newest last: of texts that differ in case or spaces alone it counts.
        test_fraction: share of the feedback that joins the test texts.
        cache: where rows are kept.
    """
    known = {label for source in sources.values() for label in source.rows.unique("label")}
    newest = {key_of(text): (text, label) for text, label in labelled if text.strip()}
    usable = {key: row for key, row in newest.items() if row[1] in known}
    places = {split: _find(source, usable.keys()) for split, source in sources.items()}
    held_out = {key for split, keys in places.items() if split != "train" for key in keys}
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for key, row in usable.items():
        if key not in held_out:
            tests = "test" in sources and key not in places["train"] and key % 2**32 < test_fraction * 2**32
            parts["test" if tests else "train"].append(row)
    joined = dict(sources)
    for split, rows in parts.items():
        if rows:
            more = memory_map(((row, text, label) for row, (text, label) in enumerate(rows, 1)), "feedback", cache)
            joined[split] = sources[split].followed_by(Source(more, "feedback"))
    found = {
        **{split: len(rows) for split, rows in parts.items()},
        "unknown_label": len(newest) - len(usable),
        "already_held_out": len(held_out),
    }
    logger.info(
        "feedback: %d texts join the training texts and %d the test texts; %d left out for labels that the data do not "
        "know, %d because the data hold them out already",
        *found.values(),
    )
    return joined, found


def _find(source: Source, keys: Set[int]) -> set[int]:
    """Which of these keys are among a source's texts."""
    chunks = source.rows.data.to_batches(max_chunksize=BATCH_ROWS)
    return {key for chunk in chunks for text in chunk["text"].to_pylist() if (key := key_of(text)) in keys}
