"""Which words speak for a label: the text is asked again without each of them (occlusion), all in one batch.

A weight is by how much the label's probability falls without the word: it says what this model does with this text, and
nothing of words that only matter together, such as a praise that is said three times.
"""

import asyncio
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tuneserve.errors import InvalidInputError, NotFoundError, TextError
from tuneserve.serving.model import Answer, Answers, Model
from tuneserve.tasks.classifier import Classifier, Prediction
from tuneserve.text import TextEncoder

SIGNS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{SIGNS}]|[^\s{SIGNS}]+")
"""What a weight is of: what stands between spaces, and each sign of a writing that has none."""

MAX_TOKENS = 2048
"""Tokens that the batch has at most, unless LEAST_SPANS need more."""

MAX_CHARACTERS = 64 << 10
"""Characters that it has at most, unless LEAST_SPANS need more: many may be few tokens, and are read all the same."""

LEAST_SPANS = 8
"""Of a long text, whose words are taken together in so many spans."""

Span = tuple[int, int]
"""Where something stands in a text, in characters: its start and its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation(Answer):
    """What spoke for a label.

    `read` is where in the text, in characters, the reading ended; `spans` are words, or of a long text several
    together, and `weights` float [spans] by how much the label's probability falls without each.
    """

    label: str
    score: float
    read: int
    spans: Sequence[Span]
    weights: Sequence[float]


async def explain(model: Model, text: str, label: str | None, deadline: float) -> Answers:
    """The explanation of one label of one text, or why the text cannot be read.

    Args:
        model: that classifies.
        text: as it came.
        label: that is explained; None for the likeliest.
        deadline: of the monotonic clock.

    Raises:
        NotFoundError: the model does not classify.
        InvalidInputError: it has no such label.
        TuneserveError: see `Model.answer`.
    """
    if not isinstance(model, Classifier):
        raise NotFoundError("Only a model that classifies texts can be explained.")
    if label is not None and label not in model.labels:
        problem = f"should be one of the model's labels: {', '.join(model.labels[:50])}"
        raise InvalidInputError((("body", "label"), problem, "value_error"))
    [whole] = await model.answer([text], deadline=deadline)
    if not isinstance(whole, Prediction):
        return [whole]
    label = whole.label if label is None else label
    score = whole.scores[label]
    if whole.truncated:  # nor should what stands behind be read where a word is left out
        text = await asyncio.to_thread(find_read, model.body.encoder, text)
    most = max(LEAST_SPANS, min(MAX_TOKENS // whole.tokens, MAX_CHARACTERS // len(text)))
    spans = join_words([found.span() for found in WORD.finditer(text)], most)
    without = await model.answer([text[:start] + text[end:] for start, end in spans], deadline=deadline)
    weights = []
    for one in without:
        if isinstance(one, TextError):  # nothing is left, and where nothing is known all labels are as likely
            weights.append(score - 1 / len(model.labels))
        elif isinstance(one, Prediction):
            weights.append(score - one.scores[label])
        else:
            return [one]
    found = Explanation(
        label=label,
        score=score,
        read=len(text),
        spans=spans,
        weights=weights,
        truncated=whole.truncated,
        model_version=whole.model_version,
    )
    return [found]


def find_read(encoder: TextEncoder, text: str) -> str:
    """What is read of a text that is too long: its whole words, or the beginning of the only one."""

    def is_too_long(end: int) -> bool:
        [tokens] = encoder.encode([text[:end]])
        return tokens.truncated

    ends = [found.end() for found in WORD.finditer(text[: encoder.max_characters])]
    if whole := bisect_left(ends, True, key=is_too_long):
        return text[: ends[whole - 1]]
    return text[: bisect_left(range(1, encoder.max_characters + 1), True, key=is_too_long)]


def join_words(words: Sequence[Span], most: int) -> list[Span]:
    """At most so many spans of one word each, or of several that follow each other, each about as many."""
    places = [len(words) * place // most for place in range(most + 1)] if len(words) > most else range(len(words) + 1)
    return [(words[begin][0], words[end - 1][1]) for begin, end in pairwise(places)]
