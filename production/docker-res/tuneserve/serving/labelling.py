"""Which of the texts that were answered people should label next; see `lifecycle.selection`."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tuneserve.errors import ConflictError, NotFoundError
from tuneserve.lifecycle.drift import rare_in
from tuneserve.lifecycle.feedback import Unlabelled
from tuneserve.lifecycle.selection import Array, choose, density, margin_uncertainty, sketch, worth
from tuneserve.serving.model import Answer, Answers, Model
from tuneserve.serving.service import Service

MOST_CANDIDATES = 2000
"""Texts, the newest without a label, that are looked through."""

ASKED_FOR_EACH = 4
"""Texts that the model is asked again for each that is wanted: what is stored of an answer is one probability, and may
be another version's."""

MOST_LIKELY = 9
"""Labels that are proposed for a text: as many as there are digits for them on a keyboard."""

UNSURE = 0.5
"""A margin below this is called so."""


@dataclass(frozen=True)
class Suggestion:
    """A text to label: the likeliest labels with their probabilities, and why it was chosen."""

    text: str
    scores: dict[str, float]
    why: list[str]


@dataclass(frozen=True)
class Suggestions:
    """The texts to label next, best first, of so many that have no label."""

    texts: list[Suggestion]
    unlabelled: int


async def suggest(service: Service, count: int, skip: int = 0) -> Suggestions:
    """The texts whose labels would teach the most, without the first `skip` of them.

    Raises:
        ConflictError: the server keeps no texts.
        UnavailableError: they cannot be read.
        TuneserveError: see `Service.consult`, of which this is one: as many wait, and one is worked on.
    """
    feedback = service.feedback
    if feedback is None:
        raise NotFoundError("This server keeps no labels.")
    if not feedback.keeps_texts:
        raise ConflictError("This server keeps no texts to choose from; start it with KEEP_TEXTS=1.")

    async def work(model: Model, deadline: float) -> Suggestions:
        found = await asyncio.to_thread(feedback.unlabelled, MOST_CANDIDATES)
        if not found:
            return Suggestions([], 0)
        some = await asyncio.to_thread(Candidates.of, found, ASKED_FOR_EACH * (count + skip))
        answers = await model.answer(some.texts, deadline=deadline)
        chosen = await asyncio.to_thread(some.choose, model, answers, count + skip)
        return Suggestions(chosen[skip:], len(found))

    return await service.consult(work)


@dataclass(frozen=True)
class Candidates:
    """Texts that may be chosen: `vectors` float32 [texts, width], `common` float [texts], and whether that is much."""

    texts: list[str]
    vectors: Array
    common: Array
    is_common: Array

    @classmethod
    def of(cls, found: Sequence[Unlabelled], most: int) -> "Candidates":
        """The best of these, by what is stored of their answers."""
        vectors = sketch([one.text for one in found])
        common = density(vectors)
        uncertainty = 1 - np.array([one.score for one in found])
        best = np.argsort(-worth(uncertainty, common), kind="stable")[:most]
        is_common = common > np.median(common)
        return cls([found[index].text for index in best], vectors[best], common[best], is_common[best])

    def choose(self, model: Model, answers: Answers, count: int) -> list[Suggestion]:
        """The best of these, by the model's own answers to them; those that it cannot read are left out."""
        read = [(index, one) for index, one in enumerate(answers) if isinstance(one, Answer)]
        if not read:
            return []
        rows = [index for index, _ in read]
        uncertainty = margin_uncertainty(np.array([[*one.probabilities.values()] for _, one in read]))
        rare = rare_in(model.reference, [one.observation for _, one in read])
        value = worth(uncertainty, self.common[rows], np.array([bool(names) for names in rare]))
        suggestions = []
        for place in choose(value, self.vectors[rows], count):
            index, one = read[place]
            likely = sorted(one.probabilities.items(), key=lambda pair: -pair[1])[:MOST_LIKELY]
            why = ["unsure"] * bool(uncertainty[place] > UNSURE) + ["common"] * bool(self.is_common[index])
            suggestions.append(Suggestion(self.texts[index], dict(likely), [*why, *rare[place]]))
        return suggestions
