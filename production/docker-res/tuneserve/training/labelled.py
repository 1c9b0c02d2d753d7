"""Feedback joins the data: labelled texts that came through the API, as further rows of what DATASET brought."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from datasets import concatenate_datasets

from tuneserve.lifecycle.evidence import key_of
from tuneserve.training.data import Source, memory_map

logger = logging.getLogger(__name__)


def join(
    sources: Mapping[str, Source], labelled: list[tuple[str, str]], *, test_fraction: float, cache: Path
) -> tuple[dict[str, Source], dict[str, int]]:
    """The sources with feedback behind their rows, and what became of it.

    If the data bring test texts, a share of the feedback joins them, the same texts each time: a model that is trained
    after its world has changed must be tested on the new one too. Labels that the data do not know are left out.
    """
    known = {label for source in sources.values() for label in source.rows.unique("label")}
    usable = [(text, label) for text, label in labelled if label in known and text.strip()]
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for text, label in usable:
        held_out = "test" in sources and key_of(text) % 2**32 < test_fraction * 2**32
        parts["test" if held_out else "train"].append((text, label))
    joined = dict(sources)
    for split, rows in parts.items():
        if rows:
            more = memory_map(((row, text, label) for row, (text, label) in enumerate(rows, 1)), "feedback", cache)
            joined[split] = replace(sources[split], rows=concatenate_datasets([sources[split].rows, more]))
    found = {"train": len(parts["train"]), "test": len(parts["test"]), "left_out": len(labelled) - len(usable)}
    logger.info("feedback: %d texts to train with, %d to test with, %d left out", *found.values())
    return joined, found
