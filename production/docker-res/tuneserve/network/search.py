"""Which token comes next: the likeliest, a drawn one, or that of the best beams; for one text at a time.

Follows `generate` of transformers step by step (generation/utils.py of 5.23), so that the same weights write the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.logits_process import ForcedBOSTokenLogitsProcessor, ForcedEOSTokenLogitsProcessor

from tuneserve.network.wishes import Wishes


@dataclass(frozen=True, slots=True)
class Limits:
    """What ends a text: token ids, and a length; both lengths are of the decoder's whole row, its prompt included.

    `forced_first` and `forced_last` are ids that a model must write first and, where the length ends it, last.
    """

    ends: Sequence[int]
    min_length: int
    max_length: int
    forced_first: int | None = None
    forced_last: int | None = None


def rules(wishes: Wishes, limits: Limits, device: torch.device) -> LogitsProcessorList:
    """The processors of transformers for these wishes, in its order."""
    found = LogitsProcessorList()
    if wishes.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(penalty=wishes.repetition_penalty))
    if wishes.no_repeat_ngram_size:
        found.append(NoRepeatNGramLogitsProcessor(wishes.no_repeat_ngram_size))
    if limits.min_length > 0 and limits.ends:
        found.append(GoesOn(limits))
    if limits.forced_first is not None:
        found.append(ForcedBOSTokenLogitsProcessor(limits.forced_first))
    if limits.forced_last is not None:
        found.append(ForcedEOSTokenLogitsProcessor(limits.max_length, limits.forced_last, device=str(device)))
    if wishes.do_sample:
        keep = 2 if wishes.num_beams > 1 else 1
        if wishes.temperature != 1.0:
            found.append(TemperatureLogitsWarper(wishes.temperature))
        if wishes.top_k:
            found.append(TopKLogitsWarper(wishes.top_k, min_tokens_to_keep=keep))
        if wishes.top_p < 1.0:
            found.append(TopPLogitsWarper(wishes.top_p, min_tokens_to_keep=keep))
    return found


class GoesOn(LogitsProcessor):
    """No text ends before its least length. transformers' own looks at every word for that, at every step."""

    def __init__(self, limits: Limits) -> None:
        self._ends, self._min_length = list(limits.ends), limits.min_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """See transformers."""
        if input_ids.shape[1] < self._min_length:
            scores = cast("torch.FloatTensor", scores.clone())
            scores[:, self._ends] = -math.inf
        return scores


class Search:
    """One text that is being written.

    Args:
        prompt: token ids that the decoder has read already.
        wishes: how it is to be written.
        limits: what ends it.
        device: of the logits.
    """

    streams = True
    """Whether what is written stays as it is."""

    def __init__(self, prompt: Sequence[int], wishes: Wishes, limits: Limits, device: torch.device) -> None:
        self.wishes, self.limits, self.start = wishes, limits, len(prompt)
        self.done = False
        self._rules = rules(wishes, limits, device)
        self._ids = torch.tensor([list(prompt)], device=device)
        self._random = torch.Generator(device).manual_seed(wishes.seed) if wishes.seed is not None else None

    @property
    def rows(self) -> int:
        """Rows of the decoder that it has now."""
        return len(self._ids)

    @property
    def ids(self) -> list[int]:
        """What was written so far, without the prompt."""
        found: list[int] = self._ids[0, self.start :].tolist()
        return found

    @property
    def _row_ids(self) -> torch.LongTensor:
        return cast("torch.LongTensor", self._ids)

    def advance(self, logits: torch.Tensor) -> tuple[list[int], list[int]]:
        """Choose what follows: logits float32 [rows, words] → of the next rows, their tokens and which rows they go on.

        None of either when the text is done.
        """
        scores = self._rules(self._row_ids, logits)
        token = self._draw(scores) if self.wishes.do_sample else scores.argmax(dim=-1)
        self._ids = torch.cat([self._ids, token[:, None]], dim=1)
        [chosen] = token.tolist()
        self.done = chosen in self.limits.ends or self._ids.shape[1] >= self.limits.max_length
        return ([], []) if self.done else ([chosen], [0])

    def _draw(self, scores: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=self._random)[:, 0]


class BeamSearch(Search):
    """The same with several beams, of which the best finished one is the text."""

    streams = False

    def __init__(self, prompt: Sequence[int], wishes: Wishes, limits: Limits, device: torch.device) -> None:
        super().__init__(prompt, wishes, limits, device)
        self._scores = torch.zeros(1, device=device)
        self._finished: list[tuple[float, list[int]]] = []
        self._improvable = True

    @property
    def ids(self) -> list[int]:
        """The best finished beam."""
        return max(self._finished, key=lambda one: one[0])[1][self.start :] if self._finished else super().ids

    def advance(self, logits: torch.Tensor) -> tuple[list[int], list[int]]:
        """See `Search`."""
        wishes, beams = self.wishes, self.wishes.num_beams
        words, length = logits.shape[1], self._ids.shape[1]
        scores = self._rules(self._row_ids, logits.log_softmax(dim=-1)) + self._scores[:, None]
        kept = min(max(2, 1 + len(self.limits.ends)) * beams, scores.numel())
        if wishes.do_sample:
            drawn = torch.multinomial(scores.flatten().softmax(dim=-1), kept, generator=self._random)
            best, index = scores.flatten()[drawn], drawn
        else:
            best, index = scores.flatten().topk(kept)
        parents, tokens = (index // words).tolist(), (index % words).tolist()
        is_last = length + 1 >= self.limits.max_length
        ends = [is_last or token in self.limits.ends for token in tokens]
        best_scores = best.tolist()
        full = len(self._finished) == beams and wishes.early_stopping
        if self._improvable and not full:
            for score, parent, token, end in list(zip(best_scores, parents, tokens, ends, strict=True))[:beams]:
                if end:
                    text = [*self._ids[parent].tolist(), token]
                    self._finished.append((score / (length + 1 - self.start) ** wishes.length_penalty, text))
            self._finished = sorted(self._finished, key=lambda one: -one[0])[:beams]
        goes_on = [place for place, end in enumerate(ends) if not end][:beams]
        if goes_on:
            best_running = best_scores[goes_on[0]] / (length + 1 - self.start) ** wishes.length_penalty
            worst = self._finished[-1][0] if len(self._finished) == beams else -math.inf
            self._improvable = self._improvable and (best_running > worst or len(self._finished) < beams)
        full = len(self._finished) == beams and wishes.early_stopping
        if not goes_on or full or not self._improvable:
            self.done = True
            return [], []
        chosen = torch.tensor(goes_on, device=logits.device)
        self._scores = best[chosen]
        token_ids = (index % words)[chosen]
        self._ids = torch.cat([self._ids[(index // words)[chosen]], token_ids[:, None]], dim=1)
        return [tokens[place] for place in goes_on], [parents[place] for place in goes_on]


def search(prompt: Sequence[int], wishes: Wishes, limits: Limits, device: torch.device) -> Search:
    """The search that these wishes want."""
    return (BeamSearch if wishes.num_beams > 1 else Search)(prompt, wishes, limits, device)
