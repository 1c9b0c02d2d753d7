"""One thread that feeds the engine: what waits goes together, up to a number of tokens, without a timer.

A text that waits alone leaves at once. While a batch runs the next is laid out. Of a window of the longest waiting
texts those that go well together are taken, always with the oldest among them, so that none is passed over for ever.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from tuneserve.errors import EngineError, NoModelError, OverloadedError, TimeoutExceededError, TuneserveError
from tuneserve.serving.engines.engine import Engine, infer
from tuneserve.serving.metrics import Metrics

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]
Outcome = Array | TuneserveError
"""Logits float32 [labels] of a text, or why there are none."""

WINDOW_BATCHES = 4
"""Batches' worth of waiting texts among which those of like length are sought."""

LAYOUT_S = 0.0015
"""Seconds before the expected end of a batch in which the next is laid out, for which the interpreter must be had."""
LAYOUT_SHARE = 0.2
"""The share of a batch's time that this is at least, for nobody knows it exactly."""

FIRST_RATE = 5000.0
"""Tokens a second that are believed before anything was measured."""
SMOOTHING = 0.1
"""Weight of the newest batch in the measured rate."""
MEASURED = 20
"""Batches after which hardly anything of the first rate is left in it."""


@dataclass(slots=True)
class Stages:
    """When a request was queued, taken by the engine and answered, in seconds of the monotonic clock; for traces."""

    queued_at: float = 0.0
    taken_at: float = 0.0
    answered_at: float = 0.0


@dataclass(eq=False)
class Job:
    """The texts of one request that were handed in together."""

    outcomes: list[Outcome | None]
    answer: "asyncio.Future[list[Outcome]]"
    queued_at: float
    tokens_waiting: int
    stages: Stages | None
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = len(self.outcomes)

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits any more: the client disconnected, or the deadline has passed."""
        return self.answer.done()


@dataclass(eq=False, slots=True)
class Item:
    """One text in the queue."""

    ids: Sequence[int]
    job: Job
    index: int


class Batcher:
    """The queue before an engine, and the thread behind it.

    Args:
        engine: used by this thread alone from now on.
        metrics: told of batches, waiting and failures.
        max_queue_tokens: that may wait.
        on_death: called if the thread ends by an error; whoever still waited was told.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        *,
        max_queue_tokens: int,
        on_death: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self.tokens_waiting = 0
        self.tokens_per_s = FIRST_RATE
        self._measured = 0
        self.dead: BaseException | None = None
        self._engine = engine
        self.metrics = metrics
        self._max_queue_tokens = max_queue_tokens
        self._max_batch_tokens = engine.max_batch_tokens
        # What texts have in common that go well together: for an engine that does not say, their length.
        self._alike: Callable[[int], int] = getattr(engine, "alike", int)
        self.on_death = on_death
        self._queue: deque[Item] = deque()
        self._arrived = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def max_batch_tokens(self) -> int:
        """Tokens that go through the engine together."""
        return self._max_batch_tokens

    @property
    def knows_rate(self) -> bool:
        """Whether `tokens_per_s` is that of this engine, here."""
        return self._measured >= MEASURED

    @property
    def drain_s(self) -> float:
        """Seconds that what waits now will take, by the measured rate."""
        return self.tokens_waiting / self.tokens_per_s

    def refusal(self, wait_s: float = math.inf, *, coming: int = 0) -> OverloadedError | None:
        """Why a request comes too late to be answered soon: the queue is full, or takes longer than it may wait.

        Args:
            wait_s: seconds that it may wait.
            coming: tokens that are on their way to the queue.
        """
        tokens = self.tokens_waiting + coming
        expected_s = tokens / self.tokens_per_s
        if tokens < self._max_queue_tokens and expected_s <= wait_s:
            return None
        again_s = max(1, math.ceil(expected_s / 2))
        return OverloadedError(f"{tokens} tokens are waiting; try again in {again_s} s.", retry_after_s=again_s)

    def submit(
        self, texts: Sequence[Sequence[int]], *, deadline: float, stages: Stages | None = None
    ) -> "asyncio.Future[list[Outcome]]":
        """Queue the token ids of some texts; the future, of the running loop, has their outcomes in order.

        At the deadline, on the monotonic clock, it fails with a TimeoutExceededError.
        `stages`, if somebody wants to know, is filled: with the first queueing and taking, and the last answer.

        Raises:
            NoModelError: the engine has ended.
        """
        now = time.monotonic()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[Outcome]] = loop.create_future()
        timer = loop.call_later(deadline - now, _end_late, answer) if deadline < math.inf else None
        tokens = sum(map(len, texts))
        job = Job([None] * len(texts), answer, now, tokens, stages)
        answer.add_done_callback(lambda _: self._settle(job, timer))
        if stages is not None:
            stages.queued_at = stages.queued_at or now
        with self._arrived:
            if self.dead or self._closed:
                raise NoModelError("The engine has stopped.")
            self._queue.extend(Item(ids, job, index) for index, ids in enumerate(texts))
            self.tokens_waiting += tokens
            self._arrived.notify()
        return job.answer

    def close(self) -> None:
        """Answer what waits, then end the thread."""
        with self._arrived:
            self._closed = True
            self._arrived.notify()
        self._thread.join()

    def _work(self) -> None:
        running: list[Item] = []
        batch: list[Item] = []
        try:
            while True:
                if running:
                    self._let_more_come(running)
                batch = self._take(wait=not running)
                if not batch and not running:
                    return
                running = self._turn(running, batch)
        except BaseException as error:  # whatever it is, nobody must wait for a thread that is gone
            self._die(error, [*running, *batch])

    def _let_more_come(self, running: list[Item]) -> None:
        """Choose the next batch as late as it can still be laid out in time: texts that come by then go with it."""
        if self.tokens_waiting >= self._max_batch_tokens:
            return
        expected_s = sum(len(item.ids) for item in running) / self.tokens_per_s
        ready_s = self._begun + expected_s - max(LAYOUT_S, LAYOUT_SHARE * expected_s) - time.perf_counter()
        if ready_s > 0:
            with suppress(Exception):  # of the batch that runs: its result says so too
                self._engine.wait(ready_s)

    def _turn(self, running: list[Item], batch: list[Item]) -> list[Item]:
        """Finish the batch that runs and start the next, which was laid out meanwhile; returns what runs now."""
        prepared, failure = None, None
        if batch:
            try:
                prepared = self._engine.prepare([item.ids for item in batch])
                self.metrics.batch(len(batch), sum(len(item.ids) for item in batch), prepared.padded_tokens)
            except Exception as error:
                failure = error
        outcomes = self._finish(running) if running else []
        started: list[Item] = []
        if prepared is not None:
            try:
                self._engine.begin(prepared)
                started = batch
                self._begun = time.perf_counter()
            except Exception as error:
                failure = error
        if running:
            self._deliver(running, outcomes)
        if failure is not None:
            self._deliver(batch, self._in_halves(batch, failure))
        return started

    def _finish(self, running: list[Item]) -> list[Outcome]:
        try:
            outcomes = self._checked(self._engine.result())
        except Exception as error:
            return self._in_halves(running, error)
        seconds = time.perf_counter() - self._begun
        self.metrics.stages["infer"].observe(seconds)
        rate = sum(len(item.ids) for item in running) / max(seconds, 1e-6)
        self.tokens_per_s += SMOOTHING * (rate - self.tokens_per_s)
        self._measured += 1
        return outcomes

    def _in_halves(self, batch: list[Item], error: Exception) -> list[Outcome]:
        """Try again in smaller batches: memory may suffice for them, and one bad text fails alone."""
        if len(batch) == 1:
            logger.error("the engine failed on a text of %d tokens: %r", len(batch[0].ids), error)
            self.metrics.engine_failures.inc()
            self._prove(error)
            return [EngineError("The engine failed on this text.")]
        if _is_out_of_memory(error):
            self._max_batch_tokens = max(1, sum(len(item.ids) for item in batch) // 2)
            logger.warning("out of memory; batches have %d tokens from now on", self._max_batch_tokens)
        outcomes: list[Outcome] = []
        for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
            try:
                outcomes += self._checked(infer(self._engine, [item.ids for item in half]))
            except Exception as again:
                outcomes += self._in_halves(half, again)
        return outcomes

    def _prove(self, error: Exception) -> None:
        """Let the engine answer something harmless after a failure; if it cannot, it is broken and not the text."""
        try:
            infer(self._engine, [[0] * 4])
        except Exception:
            raise error from None

    def _checked(self, logits: Array) -> list[Outcome]:
        good = np.atleast_1d(np.isfinite(logits).all(axis=1))
        if not good.all():
            self.metrics.not_finite.inc(int((~good).sum()))
            logger.error("the engine gave figures that are not numbers for %d texts", (~good).sum())
        return [
            row if fine else EngineError("The model gave a figure that is not a number.")
            for row, fine in zip(logits, good, strict=True)
        ]

    def _take(self, *, wait: bool) -> list[Item]:
        """The next batch; none if nothing waits and that is not to be waited for, or all is over."""
        with self._arrived:
            while True:
                self._drop_cancelled()
                batch = self._choose()
                if batch or (not self._queue and (not wait or self._closed)):
                    break
                if not self._queue:
                    self._arrived.wait()
            for item in batch:
                self._uncount(item.job, len(item.ids))
        now = time.monotonic()
        for item in batch:
            if item.index == 0:
                self.metrics.stages["queue"].observe(now - item.job.queued_at)
                if item.job.stages is not None:
                    item.job.stages.taken_at = item.job.stages.taken_at or now
        return batch

    def _drop_cancelled(self) -> None:
        while self._queue and self._queue[0].job.cancelled:
            item = self._queue.popleft()
            self._uncount(item.job, len(item.ids))

    def _uncount(self, job: Job, tokens: int) -> None:
        tokens = min(tokens, job.tokens_waiting)  # none, if nobody waits for it any more
        job.tokens_waiting -= tokens
        self.tokens_waiting -= tokens

    def _settle(self, job: Job, timer: asyncio.TimerHandle | None) -> None:
        """A request has its answer, or wants none any more: what of it still waits keeps nobody out."""
        if timer is not None:
            timer.cancel()
        if job.tokens_waiting:
            with self._arrived:
                self._uncount(job, job.tokens_waiting)

    def _choose(self) -> list[Item]:
        window: list[Item] = []
        tokens = 0
        for item in islice(self._queue, WINDOW_BATCHES * self._max_batch_tokens):
            if item.job.cancelled:
                continue  # dropped when it comes to the front
            window.append(item)
            tokens += len(item.ids)
            if tokens >= WINDOW_BATCHES * self._max_batch_tokens:
                break
        if not window:
            return []
        oldest = window[0]
        window.sort(key=lambda item: self._alike(len(item.ids)))
        low = high = window.index(oldest)
        tokens = len(oldest.ids)
        while True:  # grow around the oldest towards the nearer length
            shorter = window[low - 1] if low else None
            longer = window[high + 1] if high + 1 < len(window) else None
            if shorter and (not longer or self._distance(oldest, shorter) < self._distance(oldest, longer)):
                chosen = shorter
            elif longer:
                chosen = longer
            else:
                break
            if tokens + len(chosen.ids) > self._max_batch_tokens:
                break
            tokens += len(chosen.ids)
            low, high = (low - 1, high) if chosen is shorter else (low, high + 1)
        batch = window[low : high + 1]
        taken = set(map(id, batch))
        reach = next(index for index, item in enumerate(reversed(self._queue)) if id(item) in taken)
        head = [self._queue.popleft() for _ in range(len(self._queue) - reach)]
        self._queue.extendleft(item for item in reversed(head) if id(item) not in taken)
        return batch

    def _distance(self, one: Item, other: Item) -> int:
        return abs(self._alike(len(one.ids)) - self._alike(len(other.ids)))

    def _deliver(self, batch: list[Item], outcomes: Sequence[Outcome]) -> None:
        done: dict[asyncio.AbstractEventLoop, list[Job]] = {}
        for item, outcome in zip(batch, outcomes, strict=True):
            job = item.job
            if job.outcomes[item.index] is not None:
                continue  # it was told before the thread died
            job.outcomes[item.index] = outcome
            job.left -= 1
            if job.left == 0:
                if job.stages is not None:
                    job.stages.answered_at = time.monotonic()
                done.setdefault(job.answer.get_loop(), []).append(job)
        for loop, jobs in done.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_answer, jobs)

    def _die(self, error: BaseException, taken: list[Item]) -> None:
        logger.critical("the engine has stopped: %r", error, exc_info=error)
        with self._arrived:
            self.dead = error
            lost = [*taken, *self._queue]
            self._queue.clear()
            for item in lost:
                self._uncount(item.job, len(item.ids))
        self._deliver(lost, [NoModelError("The engine has stopped.")] * len(lost))
        self.on_death(error)


def _answer(jobs: list[Job]) -> None:
    for job in jobs:
        if not job.answer.done():
            job.answer.set_result([outcome for outcome in job.outcomes if outcome is not None])


def _end_late(answer: "asyncio.Future[list[Outcome]]") -> None:
    if not answer.done():
        answer.set_exception(TimeoutExceededError("There was no answer in time."))


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "memory" in str(error).lower() or "alloc" in str(error).lower()
