"""The texts that a model is writing: a search for each, and the decoder whose rows they share."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tuneserve.network.decoder import Decoder
from tuneserve.network.search import Limits, Search, search
from tuneserve.network.wishes import Wishes, Writing


class Page:
    """See `WritingEngine` in serving/engines/writing.py.

    Args:
        model: of transformers, in evaluation mode, on its device.
        max_tokens: that may be under way at a time.
    """

    def __init__(self, model: Any, *, max_tokens: int = 1 << 30) -> None:
        self.max_tokens, self.device, self.sound = max_tokens, str(model.device.type), True
        self._decoder = Decoder(model)
        self._model = model
        config = model.generation_config
        ends = config.eos_token_id if config.eos_token_id is not None else model.config.eos_token_id
        self._ends = tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)
        start = config.decoder_start_token_id
        self._begin = [start if start is not None else config.bos_token_id] if self._decoder.pairs else []
        self._texts: list[tuple[Writing, Search]] = []
        self._tokens: list[int] = []

    def join(self, prompts: Sequence[tuple[Sequence[int], Wishes]]) -> list[Writing]:
        """See `WritingEngine`."""
        begun = []
        for (ids, wishes), read in zip(
            prompts, self._decoder.read([ids for ids, _ in prompts], self._begin), strict=True
        ):
            made = search(self._begin or ids, wishes, self._limits(ids, wishes), read.logits.device)
            begun.append((read, made, made.advance(read.logits)))
        texts = []
        with self._changing():
            for read, made, (tokens, parents) in begun:
                row = self._decoder.rows
                self._decoder.join(read)
                self._decoder.select([*range(row), *(row + parent for parent in parents)])
                self._tokens += tokens
                texts.append((Writing(), made))
        self._texts += texts
        self._tell()
        return [writing for writing, _ in texts]

    def _limits(self, ids: Sequence[int], wishes: Wishes) -> Limits:
        config, start = self._model.generation_config, len(self._begin or ids)
        return Limits(
            self._ends,
            start + wishes.min_new_tokens,
            start + wishes.max_new_tokens,
            forced_first=config.forced_bos_token_id if self._decoder.pairs else None,
            forced_last=config.forced_eos_token_id,
        )

    def step(self) -> None:
        """See `WritingEngine`."""
        with self._changing():
            logits = self._decoder.step(self._tokens)
            self._tokens, index, row = [], [], 0
            for _, made in self._texts:
                rows = made.rows
                tokens, parents = made.advance(logits[row : row + rows])
                self._tokens += tokens
                index += [row + parent for parent in parents]
                row += rows
            self._decoder.select(index)
        self._tell()

    def drop(self, writings: Sequence[Writing]) -> None:
        """See `WritingEngine`."""
        row, texts = 0, []
        kept: list[int] = []
        for text, made in self._texts:
            if text not in writings:
                kept += range(row, row + made.rows)
                texts.append((text, made))
            row += made.rows
        with self._changing():
            self._texts, self._tokens = texts, [self._tokens[one] for one in kept]
            self._decoder.select(kept)

    def clear(self) -> None:
        """See `WritingEngine`."""
        self._texts, self._tokens = [], []
        self._decoder.clear()
        self.sound = True

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """What fails in here leaves rows, searches and tokens that do not fit each other."""
        self.sound = False
        yield
        self.sound = True

    @torch.inference_mode()
    def _tell(self) -> None:
        for text, made in self._texts:
            text.done = made.done
            if made.done or made.streams:
                text.ids = made.ids
        self._texts = [one for one in self._texts if not one[1].done]
