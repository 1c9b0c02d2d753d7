"""What stands before and in an engine: texts to token ids, these through the queue, and out come figures of each text.

One model has it to itself, or many that are heads on the same body. How large requests share the queue is here with the
rest of their way, which makes the module a little long.
"""

import asyncio
import logging
import math
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
from opentelemetry import trace

from tuneserve.errors import NoModelError, OverloadedError, TextError, TimeoutExceededError
from tuneserve.serving.batcher import Batcher, Outcome, Stages
from tuneserve.serving.engines.engine import Engine
from tuneserve.serving.metrics import Metrics
from tuneserve.text import TextEncoder, Tokens, has_surrogates, is_blank, plain, split_by_tokens

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]
Reading = tuple[Tokens | TextError, list[Outcome]]
"""A text's tokens and the outcome of each of its windows; or why it cannot be read."""

LongText = Literal["truncate", "error", "window"]

INLINE_CHARACTERS = 4000
"""Texts that together are shorter are tokenized by the event loop itself: a thread would cost more than it spares."""

TOKENIZERS = 2
"""Threads that tokenize large requests: the library takes hundreds of bytes for each character while it does."""

READ_AT_ONCE = 256
"""Texts of a large request that are tokenized together, and answers that the event loop makes by itself."""

CHUNK_BATCHES = 1
"""Batches' worth of one request that are queued at a time: a large request leaves room for small ones."""

CHUNKS = 2
"""Chunks of all large requests together that are queued at a time, so that small requests wait for these alone."""


class Body:
    """Tokenizer, queue and engine, for the models that use them; with the last of these it ends.

    Args:
        folder: of a version, with its tokenizer.
        engine: which belongs to the queue's thread from now on.
        max_tokens: that are read of a text.
        long_text: what becomes of a text that is longer.
        max_queue_tokens: that may wait for the engine.
        clean: what every text goes through before it is tokenized.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        *,
        max_tokens: int,
        long_text: LongText = "truncate",
        max_queue_tokens: int = 32768,
        clean: Callable[[str], str] = plain,
    ) -> None:
        self.engine, self.long_text = engine, long_text
        self.encoder = TextEncoder.from_folder(
            folder, max_tokens=max_tokens, windows=long_text == "window", clean=clean
        )
        self._coming = self._unanswered = 0
        self._turns = WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore]()
        self._tokenizing = ThreadPoolExecutor(TOKENIZERS, "tokenize")
        self._metrics = Metrics()
        self._users: dict[object, Callable[[BaseException], None]] = {}
        self._change = threading.Lock()
        self.closed = False
        self.batcher = Batcher(engine, self._metrics, max_queue_tokens=max_queue_tokens, on_death=self._die)

    @property
    def usable(self) -> bool:
        """Whether another model may still join."""
        return not self.closed and self.batcher.dead is None

    def join(self, user: object) -> None:
        """Let a model use it.

        Raises:
            NoModelError: it has ended.
        """
        with self._change:
            if not self.usable:
                raise NoModelError("The engine has stopped.")
            self._users[user] = _ignore

    def attach(self, user: object, metrics: Metrics, on_death: Callable[[BaseException], None]) -> None:
        """Count in these metrics from now on, and call `on_death` should the engine end by an error; see `Model`."""
        with self._change:
            if user in self._users:
                self._users[user] = on_death
        self._metrics = self.batcher.metrics = metrics

    def leave(self, user: object) -> None:
        """A model needs it no more; after the last one, answer what waits and end the threads."""
        with self._change:
            self._users.pop(user, None)
            if self._users or self.closed:
                return
            self.closed = True
        self.batcher.close()
        self._tokenizing.shutdown()

    async def ask(
        self, texts: Sequence[str], deadline: float = math.inf, *, max_windows: int | None = None, asker: str = ""
    ) -> list[Reading]:
        """What the engine computes of each text, in order.

        Args:
            texts: as they come.
            deadline: of the monotonic clock.
            max_windows: of each text, so many count.
            asker: the version that asks, for traces.

        Raises:
            OverloadedError, TimeoutExceededError, NoModelError: see `Model.answer`.
        """
        span = trace.get_current_span()
        stages = Stages() if span.is_recording() else None
        began = time.perf_counter()
        if sum(map(len, texts)) < INLINE_CHARACTERS:
            readings = self.read(texts)
        else:
            readings = await asyncio.get_running_loop().run_in_executor(self._tokenizing, self._read_many, texts)
            if refusal := self.batcher.refusal(coming=self._coming):  # others have filled the queue meanwhile
                raise refusal
        tokenize_s = time.perf_counter() - began
        self._metrics.stages["tokenize"].observe(tokenize_s)
        windows = [one.windows[:max_windows] if isinstance(one, Tokens) else [] for one in readings]
        ids = [window for of_text in windows for window in of_text]
        outcomes = iter(await self._compute(ids, deadline, stages))
        if stages is not None:
            span.set_attributes(
                {
                    "tuneserve.model_version": asker,
                    "tuneserve.texts": len(texts),
                    "tuneserve.tokens": sum(map(len, ids)),
                    "tuneserve.tokenize_s": tokenize_s,
                    "tuneserve.queue_s": max(0.0, stages.taken_at - stages.queued_at),
                    "tuneserve.infer_s": max(0.0, stages.answered_at - stages.taken_at),
                }
            )
        return [(one, [next(outcomes) for _ in of_text]) for one, of_text in zip(readings, windows, strict=True)]

    def read(self, texts: Sequence[str]) -> list[Tokens | TextError]:
        """The tokens of each text, or why it cannot be read."""
        problems = [self._problem(text) for text in texts]
        found = iter(self.encoder.encode([text for text, problem in zip(texts, problems, strict=True) if not problem]))
        return [TextError(problem) if problem else self._fit(next(found)) for problem in problems]

    def _read_many(self, texts: Sequence[str]) -> list[Tokens | TextError]:
        """As `read`, in less memory: the ids of a large request wait for long."""
        found: list[Tokens | TextError] = []
        for begin in range(0, len(texts), READ_AT_ONCE):
            for one in self.read(texts[begin : begin + READ_AT_ONCE]):
                if isinstance(one, Tokens):
                    one = replace(one, windows=[array("i", ids) for ids in one.windows])
                found.append(one)
        return found

    async def _compute(self, ids: Sequence[Sequence[int]], deadline: float, stages: Stages | None) -> list[Outcome]:
        """Outcomes in order. Texts of like length go together, and few chunks of large requests wait at once."""
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        chunk_tokens = CHUNK_BATCHES * self.batcher.max_batch_tokens
        tokens = sum(map(len, ids))
        turns, coming = None, 0
        if tokens > chunk_tokens:
            turns = self._turns.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(CHUNKS))
            coming = min(tokens, CHUNKS * chunk_tokens)
            self._require_time(tokens, deadline)
        left = tokens if coming else 0
        self._coming += coming
        self._unanswered += left
        found: dict[int, Outcome] = {}
        waiting: deque[tuple[list[int], asyncio.Future[list[Outcome]]]] = deque()

        async def collect() -> None:
            nonlocal left
            indices, future = waiting[0]
            found.update(zip(indices, await future, strict=True))
            waiting.popleft()
            if left:
                done = sum(len(ids[index]) for index in indices)
                self._unanswered, left = self._unanswered - done, left - done

        try:
            for chunk in split_by_tokens([len(ids[index]) for index in order], chunk_tokens):
                texts = [ids[index] for index in order[chunk]]
                if turns is not None:
                    await _acquire(turns, deadline)
                try:
                    future = self.batcher.submit(texts, deadline=deadline, stages=stages)
                except NoModelError:
                    if turns is not None:
                        turns.release()
                    raise
                if turns is not None:
                    future.add_done_callback(partial(_release, turns))
                waiting.append((order[chunk], future))
                if len(waiting) > 1:
                    await collect()
            while waiting:
                await collect()
        finally:
            self._coming -= coming
            self._unanswered -= left
            for _, future in waiting:
                future.cancel()  # nobody waits any more: what has not begun is dropped
        return [found[index] for index in range(len(ids))]

    def _require_time(self, tokens: int, deadline: float) -> None:
        """Refuse a large request to which those before it leave no time: it would only make them late as well.

        Raises:
            OverloadedError: that is so.
        """
        expected_s = (self._unanswered + tokens) / self.batcher.tokens_per_s
        late = self.batcher.knows_rate and 0 < deadline - time.monotonic() < expected_s
        if self._unanswered and late:
            again_s = max(1, math.ceil(self._unanswered / self.batcher.tokens_per_s / 2))
            words = f"Large requests of {self._unanswered} tokens are being answered; try again in {again_s} s."
            raise OverloadedError(words, retry_after_s=again_s)

    def _fit(self, tokens: Tokens) -> Tokens | TextError:
        if tokens.truncated and self.long_text == "error":
            most, unit = self.encoder.max_tokens, "tokens"
            if len(tokens.ids) < most:
                most, unit = self.encoder.max_characters, "characters"
            return TextError(f"the text has more than {most} {unit}, the most this model reads")
        return tokens

    def _problem(self, text: str) -> str:
        """Why a text cannot be read; nothing, if it can."""
        if is_blank(text[: self.encoder.max_characters]):
            return "the text is empty"
        if has_surrogates(text):
            return "the text holds half a surrogate pair, which is not Unicode text"
        return ""

    def _die(self, error: BaseException) -> None:
        with self._change:
            told = list(self._users.values())
        for on_death in told:
            on_death(error)


def _ignore(error: BaseException) -> None:
    """Nobody wants to know yet."""


async def _acquire(turns: asyncio.Semaphore, deadline: float) -> None:
    """Wait for a turn until the deadline of the monotonic clock."""
    try:
        async with asyncio.timeout(deadline - time.monotonic() if deadline < math.inf else None):
            await turns.acquire()
    except TimeoutError:
        raise TimeoutExceededError("There was no answer in time.") from None


def _release(turns: asyncio.Semaphore, _: object) -> None:
    turns.release()
