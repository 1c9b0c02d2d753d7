"""One thread that feeds a model that writes: texts join and leave between any two tokens, and none waits for another.

Prompts wait in a queue that is counted in tokens, those that will be written included. As many as the engine has room
for are under way; after each step the next in the queue join where others have left. A text whose client has gone, or
whose deadline has passed, leaves at the next step.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tuneserve.errors import EngineError, NoModelError, OverloadedError, TuneserveError
from tuneserve.network.wishes import Wishes, Writing
from tuneserve.serving.engines.writing import WritingEngine
from tuneserve.serving.metrics import Metrics

logger = logging.getLogger(__name__)

SMOOTHING = 0.05
"""Weight of the newest step in the measured rate."""
MEASURED = 8
"""Steps after which the rate is that of this engine, here."""
READ_AT_ONCE = 1024
"""Tokens of prompts that are read between two steps, so that texts under way go on beside many or long prompts."""
FAILURES = 3
"""Steps that fail one after another, after which the engine is held to be broken."""


@dataclass(eq=False)
class Order:
    """A text that somebody wants.

    Args:
        ids: of the prompt.
        wishes: how it is to be written.
        tell: called on `loop` with all ids so far, whenever there are more and at the end, or with why there are none.
        loop: of whoever waits.
    """

    ids: Sequence[int]
    wishes: Wishes
    tell: Callable[[Sequence[int] | TuneserveError, bool], None]
    loop: asyncio.AbstractEventLoop
    cancelled: bool = False
    queued_at: float = field(default_factory=time.monotonic)
    told: int = 0

    @property
    def columns(self) -> int:
        """Tokens of each of its beams, at the most."""
        return len(self.ids) + self.wishes.max_new_tokens

    @property
    def tokens(self) -> int:
        """That it takes of the engine at the most."""
        return self.wishes.num_beams * self.columns

    def say(self, found: Sequence[int] | TuneserveError, *, done: bool) -> None:
        """Tell whoever waits, if anybody does."""
        if not self.cancelled and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.tell, found, done)


class Writer:
    """The queue before an engine that writes, and the thread behind it.

    Args:
        engine: used by this thread alone from now on.
        metrics: told of tokens, waiting and failures.
        max_queue_tokens: that may wait.
    """

    def __init__(self, engine: WritingEngine, metrics: Metrics, *, max_queue_tokens: int) -> None:
        self.tokens_waiting = 0
        self.dead: BaseException | None = None
        self.metrics = metrics
        self.on_death: Callable[[BaseException], None] = lambda error: None
        self._engine, self._max_queue_tokens = engine, max_queue_tokens
        self._queue: deque[Order] = deque()
        self._under_way: list[tuple[Order, Writing]] = []
        self._arrived = threading.Condition()
        self._closed = False
        self._seconds_each, self._measured, self._failures = 0.0, 0, 0
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)
        self._thread.start()

    @property
    def drain_s(self) -> float:
        """Seconds that what waits now will take at the most, by the measured rate; 0 before there is one."""
        if self._measured < MEASURED:
            return 0.0
        with self._arrived:
            ahead = sum(order.wishes.max_new_tokens for order in self._queue)
        return ahead * self._seconds_each

    def refusal(self, wait_s: float = math.inf, *, coming: int = 0) -> OverloadedError | None:
        """Why a request comes too late to be answered soon: the queue is full, or takes longer than it may wait.

        Args:
            wait_s: seconds that it may wait.
            coming: tokens of the request itself, if they are known; one alone may have more than the queue holds.
        """
        waiting, drain_s = self.tokens_waiting, self.drain_s
        full = waiting >= self._max_queue_tokens or (waiting and waiting + coming > self._max_queue_tokens)
        if not full and drain_s <= wait_s:
            return None
        again_s = max(1, math.ceil(drain_s / 2))
        return OverloadedError(f"{waiting} tokens are waiting; try again in {again_s} s.", retry_after_s=again_s)

    def submit(self, orders: Sequence[Order]) -> None:
        """Queue texts; the `tell` of each hears of it.

        Raises:
            NoModelError: the engine has ended.
        """
        with self._arrived:
            if self.dead or self._closed:
                raise NoModelError("The engine has stopped.")
            self._queue.extend(orders)
            self.tokens_waiting += sum(order.tokens for order in orders)
            self._arrived.notify()

    def cancel(self, order: Order) -> None:
        """Nobody waits for it any more; its place is free at the next step."""
        with self._arrived:
            order.cancelled = True
            if order in self._queue:
                self._queue.remove(order)
                self.tokens_waiting -= order.tokens

    def close(self) -> None:
        """Write what was ordered, then end the thread."""
        with self._arrived:
            self._closed = True
            self._arrived.notify()
        self._thread.join()

    def _work(self) -> None:
        try:
            while self._wait():
                began = time.perf_counter()
                self._leave()
                self._let_join()
                if self._under_way:
                    self._step(began)
        except BaseException as error:  # whatever it is, nobody must wait for a thread that is gone
            self._die(error)

    def _wait(self) -> bool:
        """Whether there is something to do; False at the end."""
        with self._arrived:
            while not self._queue and not self._under_way and not self._closed:
                self._arrived.wait()
            return bool(self._queue or self._under_way)

    def _leave(self) -> None:
        """Drop the texts for which nobody waits any more."""
        gone = [writing for order, writing in self._under_way if order.cancelled]
        if gone:
            self._under_way = [one for one in self._under_way if not one[0].cancelled]
            try:
                self._engine.drop(gone)
            except Exception as error:
                self._lose(error)

    def _next(self) -> list[Order]:
        """The next in the queue for which the engine has room; a text that is larger than all its room goes alone."""
        found: list[Order] = []
        with self._arrived:
            under_way = [order for order, _ in self._under_way]
            while self._queue:
                orders = [*under_way, *found, self._queue[0]]
                # All rows have a column for each token of the longest.
                space = sum(one.wishes.num_beams for one in orders) * max(one.columns for one in orders)
                if len(orders) > 1 and space > self._engine.max_tokens:
                    break
                if found and sum(len(one.ids) for one in found) >= READ_AT_ONCE:
                    break
                found.append(self._queue.popleft())
                self.tokens_waiting -= found[-1].tokens
        return found

    def _let_join(self) -> None:
        for orders in _of_like_length(self._next()):
            if not self._join(orders) and len(orders) > 1 and self._engine.sound:
                for order in orders:  # one bad prompt fails alone
                    self._join([order])

    def _join(self, orders: Sequence[Order]) -> bool:
        """Whether the engine has read these prompts; a single one that it fails on is told so."""
        began = time.monotonic()
        try:
            writings = self._engine.join([(order.ids, order.wishes) for order in orders])
        except Exception as error:
            if len(orders) == 1 or not self._engine.sound:
                self._fail(orders, error, f"on prompts of {sum(len(order.ids) for order in orders)} tokens")
            if not self._engine.sound:
                self._lose(error)
            return False
        now = time.monotonic()
        for order, writing in zip(orders, writings, strict=True):
            self.metrics.stages["queue"].observe(began - order.queued_at)
            self.metrics.first_token.observe(now - order.queued_at)
            self.metrics.tokens.inc(len(order.ids))
            self.metrics.written.inc()
            self._under_way.append((order, writing))
        self._tell()
        return True

    def _step(self, began: float) -> None:
        """Write one token of each text; `began` is when this turn did, on the performance counter."""
        texts = len(self._under_way)
        step_began = time.perf_counter()
        try:
            self._engine.step()
        except Exception as error:
            self._lose(error)
            return
        self._failures = 0
        now = time.perf_counter()
        self.metrics.stages["infer"].observe(now - step_began)
        self.metrics.batch_texts.observe(texts)
        self.metrics.tokens.inc(texts)
        self.metrics.written.inc(texts)
        each = (now - began) / texts
        self._seconds_each += (SMOOTHING if self._measured else 1.0) * (each - self._seconds_each)
        self._measured += 1
        self._tell()

    def _tell(self) -> None:
        for order, writing in self._under_way:
            if len(writing.ids) > order.told or writing.done:
                order.told = len(writing.ids)
                order.say(list(writing.ids), done=writing.done)
        self._under_way = [one for one in self._under_way if not one[1].done]

    def _fail(self, orders: Sequence[Order], error: Exception, what: str) -> None:
        logger.error("the engine failed %s: %r", what, error)
        self.metrics.engine_failures.inc(len(orders))
        for order in orders:
            order.say(EngineError("The engine failed on this text."), done=True)

    def _lose(self, error: Exception) -> None:
        """After a failure that leaves what is under way in pieces: it fails, and the engine begins anew.

        Raises:
            Exception: the same again and again.
        """
        lost, self._under_way = [order for order, _ in self._under_way], []
        self._fail(lost, error, f"while it wrote {len(lost)} texts")
        self._failures += 1
        if self._failures >= FAILURES:
            raise error
        self._engine.clear()

    def _die(self, error: BaseException) -> None:
        logger.critical("the engine has stopped: %r", error, exc_info=error)
        with self._arrived:
            self.dead = error
            lost = [*(order for order, _ in self._under_way), *self._queue]
            self._queue.clear()
            self._under_way, self.tokens_waiting = [], 0
        for order in lost:
            order.say(NoModelError("The engine has stopped."), done=True)
        self.on_death(error)


def _of_like_length(orders: Sequence[Order]) -> list[list[Order]]:
    """In groups that are read together: no prompt is padded to more than twice its length."""
    groups: list[list[Order]] = []
    for order in sorted(orders, key=lambda one: len(one.ids)):
        if groups and len(order.ids) <= 2 * len(groups[-1][0].ids):
            groups[-1].append(order)
        else:
            groups.append([order])
    return groups
