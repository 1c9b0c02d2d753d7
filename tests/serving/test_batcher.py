"""The queue before the engine: what goes together, who is told what, and what happens when things break."""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tuneserve.errors import EngineError, NoModelError, TimeoutExceededError
from tuneserve.serving import batcher as module
from tuneserve.serving.batcher import Batcher, Stages
from tuneserve.serving.metrics import Metrics

FAR = time.monotonic() + 3600


class Held:
    """Lets batches through one by one."""

    def __init__(self) -> None:
        self.turns = threading.Semaphore(0)
        self.began = threading.Event()

    def __call__(self, engine: Any) -> None:
        self.began.set()
        assert self.turns.acquire(timeout=240)

    def free(self) -> None:
        for _ in range(1000):
            self.turns.release()


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
def make(make_engine: Callable[..., Any]) -> Iterator[Callable[..., tuple[Batcher, Any]]]:
    batchers: list[Batcher] = []

    def make_batcher(instead: Callable[[Any], Any], **options: Any) -> tuple[Batcher, Any]:
        engine = make_engine(instead)
        batchers.append(Batcher(engine, Metrics(), **{"max_queue_tokens": 10_000} | options))
        return batchers[-1], engine

    yield make_batcher
    for one in batchers:
        one.close()


def text(tokens: int) -> list[int]:
    return [1] * tokens


def test_a_single_text_leaves_at_once_and_what_comes_meanwhile_goes_together(
    make: Callable[..., Any], held: Held
) -> None:
    batcher, engine = make(held)

    async def ask() -> None:
        first = batcher.submit([text(3)], deadline=FAR)
        assert await asyncio.to_thread(held.began.wait, 5)
        rest = [batcher.submit([text(4)], deadline=FAR) for _ in range(9)]
        held.free()
        await asyncio.gather(first, *rest)

    asyncio.run(ask())
    assert engine.batches == [[3], [4] * 9]


class Clock:
    """Stands for `time`: it goes on when it is told to, by halves so that sums are exact."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


class Waiting:
    """What an engine's `wait` may do: note how long, until it is told to go on, or raise."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.seconds: list[float] = []
        self.began, self.go_on = threading.Event(), threading.Event()

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.began.set()
        assert self.go_on.wait(10)
        if self.error:
            raise self.error


@pytest.mark.parametrize("error", [None, RuntimeError("what was begun has failed")])
def test_texts_that_come_while_a_batch_runs_go_with_those_that_were_there(
    make: Callable[..., Any], held: Held, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    monkeypatch.setattr(module, "time", Clock())
    batcher, engine = make(held)
    engine.wait = waiting = Waiting(error)
    batcher.tokens_per_s = 0.3  # so that 3 tokens take 10 s

    async def ask() -> None:
        first = batcher.submit([text(3)], deadline=FAR)
        assert await asyncio.to_thread(waiting.began.wait, 5)
        early, late = [batcher.submit([text(4)], deadline=FAR) for _ in range(2)]
        waiting.go_on.set()
        held.free()
        await asyncio.gather(first, early, late)

    asyncio.run(ask())
    assert engine.batches == [[3], [4, 4]]
    assert waiting.seconds[0] == pytest.approx(8)  # all but a fifth of the time


def test_a_batch_that_is_full_is_laid_out_at_once(make: Callable[..., Any], held: Held) -> None:
    batcher, engine = make(held)
    engine.wait = waiting = Waiting()
    waiting.go_on.set()
    batcher.tokens_per_s = 1

    async def ask() -> None:
        full = batcher.submit([text(16) for _ in range(12)], deadline=FAR)
        assert await asyncio.to_thread(held.began.wait, 5)
        assert not waiting.seconds
        held.free()
        await full

    asyncio.run(ask())
    assert engine.batches == [[16] * 4] * 3


def test_a_batch_has_no_more_tokens_than_it_may_and_texts_of_like_length(make: Callable[..., Any], held: Held) -> None:
    batcher, engine = make(held)

    async def ask() -> None:
        first = batcher.submit([text(3)], deadline=FAR)
        assert await asyncio.to_thread(held.began.wait, 5)
        mixed = batcher.submit([text(30 if place % 2 else 5) for place in range(8)], deadline=FAR)
        held.free()
        await asyncio.gather(first, mixed)

    asyncio.run(ask())
    assert all(sum(batch) <= engine.max_batch_tokens for batch in engine.batches)
    assert engine.batches[1] == [5, 5, 5, 5, 30]  # the oldest, those like it, and what else there is room for


def test_texts_that_need_the_same_row_go_together_in_the_order_they_came(make: Callable[..., Any], held: Held) -> None:
    batcher, engine = make(held)
    batcher._alike = lambda length: 16 if length <= 16 else 64

    async def ask() -> None:
        first = batcher.submit([text(3)], deadline=FAR)
        assert await asyncio.to_thread(held.began.wait, 5)
        mixed = batcher.submit([text(tokens) for tokens in (4, 40, 16, 9, 5, 16, 4, 9)], deadline=FAR)
        held.free()
        await asyncio.gather(first, mixed)

    asyncio.run(ask())
    assert engine.batches[1:] == [[4, 16, 9, 5, 16, 4, 9], [40]]


def test_the_oldest_text_is_never_passed_over(make: Callable[..., Any], held: Held) -> None:
    batcher, engine = make(held)

    async def ask() -> None:
        first = batcher.submit([text(3)], deadline=FAR)
        assert await asyncio.to_thread(held.began.wait, 5)
        long = batcher.submit([text(60)], deadline=FAR)
        short = [batcher.submit([text(5)], deadline=FAR) for _ in range(100)]
        held.free()
        await asyncio.gather(first, long, *short)

    asyncio.run(ask())
    assert 60 in engine.batches[1]


def test_work_whose_client_hung_up_costs_nothing(make: Callable[..., Any], held: Held) -> None:
    batcher, engine = make(held)

    async def ask() -> None:
        first = batcher.submit([text(3)], deadline=FAR)
        assert await asyncio.to_thread(held.began.wait, 5)
        gone = batcher.submit([text(40)], deadline=FAR)
        late = batcher.submit([text(41)], deadline=time.monotonic())
        stays = batcher.submit([text(4)], deadline=FAR)
        gone.cancel()
        with pytest.raises(TimeoutExceededError):
            await late
        held.free()
        await asyncio.gather(first, stays)

    asyncio.run(ask())
    assert engine.batches == [[3], [4]]
    assert batcher.tokens_waiting == 0


def test_what_nobody_waits_for_takes_no_room(make: Callable[..., Any], held: Held) -> None:
    batcher, engine = make(held)

    async def ask() -> None:
        first = batcher.submit([text(3)], deadline=FAR)
        assert await asyncio.to_thread(held.began.wait, 5)
        stays, gone, last = [batcher.submit([text(tokens), text(1)], deadline=FAR) for tokens in (4, 40, 5)]
        assert batcher.tokens_waiting == 52
        gone.cancel()
        await asyncio.sleep(0)
        assert batcher.tokens_waiting == 11  # though it stands behind one that is waited for
        held.free()
        await asyncio.gather(first, stays, last)

    asyncio.run(ask())
    assert sorted(tokens for batch in engine.batches for tokens in batch) == [1, 1, 3, 4, 5]
    assert batcher.tokens_waiting == 0


def test_a_full_queue_says_when_there_is_room(make: Callable[..., Any], held: Held) -> None:
    batcher, _ = make(held, max_queue_tokens=50)

    async def ask() -> None:
        first = batcher.submit([text(3)], deadline=FAR)
        assert await asyncio.to_thread(held.began.wait, 5)
        assert batcher.refusal() is None
        second = batcher.submit([text(60)], deadline=FAR)
        batcher.tokens_per_s = 2
        refusal = batcher.refusal()
        assert refusal is not None
        assert refusal.retry_after_s == 15
        held.free()
        await asyncio.gather(first, second)
        assert batcher.refusal() is None

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("wait_s", "coming", "refused"), [(15.5, 0, False), (14.5, 0, True), (15.5, 2, True), (16.5, 2, False)]
)
def test_who_cannot_be_answered_in_time_is_refused_at_once(
    make: Callable[..., Any], held: Held, wait_s: float, coming: int, refused: bool
) -> None:
    batcher, _ = make(held)

    async def ask() -> None:
        first = batcher.submit([text(3)], deadline=FAR)
        assert await asyncio.to_thread(held.began.wait, 5)
        second = batcher.submit([text(30)], deadline=FAR)
        batcher.tokens_per_s = 2
        assert batcher.tokens_waiting == 30
        assert (batcher.refusal(wait_s, coming=coming) is not None) == refused
        held.free()
        await asyncio.gather(first, second)

    asyncio.run(ask())


def test_out_of_memory_halves_the_batches_and_goes_on(make: Callable[..., Any]) -> None:
    def scarce(engine: Any) -> None:
        if sum(map(len, engine.running)) > 20:
            raise RuntimeError("could not allocate memory")

    batcher, engine = make(scarce)

    async def ask() -> list[Any]:
        return await batcher.submit([text(6) for _ in range(10)], deadline=FAR)

    outcomes = asyncio.run(ask())
    assert all(isinstance(one, np.ndarray) for one in outcomes)
    assert max(sum(batch) for batch in engine.batches) <= 20
    assert batcher.max_batch_tokens <= 30


@pytest.mark.parametrize(
    ("error", "tokens"),
    [
        (MemoryError(), 15),
        (RuntimeError("out of memory"), 15),
        (RuntimeError("alloc failed"), 15),
        (OSError("odd"), 64),
    ],
)
def test_only_what_is_said_of_memory_makes_batches_smaller(
    make: Callable[..., Any], error: Exception, tokens: int
) -> None:
    def fail_once(engine: Any) -> None:
        if len(engine.running) == 5:
            raise error

    batcher, _ = make(fail_once)

    async def ask() -> list[Any]:
        found = await batcher.submit([text(6) for _ in range(5)], deadline=FAR)
        return found + await batcher.submit([text(6)], deadline=FAR)

    assert all(isinstance(one, np.ndarray) for one in asyncio.run(ask()))
    assert batcher.max_batch_tokens == tokens


def test_the_rate_the_stages_and_the_counters_say_what_happened(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "time", clock := Clock())

    def compute(engine: Any) -> Any:
        if len(engine.running) == 1:
            return None  # in no time, as a coarse clock sees it
        clock.now += 2
        return np.array([[np.nan, 0], [0, 1], [np.inf, 0]])

    batcher, _ = make(compute)
    stages = Stages()

    async def ask() -> list[Any]:
        texts = [text(4), text(5), text(6)]
        found = await batcher.submit(texts, deadline=math.inf, stages=stages)
        for _ in range(2):
            await batcher.submit([text(9)], deadline=math.inf, stages=stages)
        return found

    outcomes = asyncio.run(ask())
    assert [isinstance(one, EngineError) for one in outcomes] == [True, False, True]
    assert (stages.queued_at, stages.taken_at, stages.answered_at) == (100, 100, 102)
    rates = [module.FIRST_RATE]
    for tokens, seconds in ((15, 2), (9, 1e-6), (9, 1e-6)):
        rates.append(0.9 * rates[-1] + 0.1 * tokens / seconds)
    assert batcher.tokens_per_s == pytest.approx(rates[-1])
    figures = dict(line.split() for line in batcher.metrics.render().decode().splitlines() if line[0] != "#")
    for name, value in {
        "not_finite_total": 2,
        "batch_texts_count": 3,
        "batch_texts_sum": 5,
        "tokens_total": 33,
        "places_total": 33,
        'stage_seconds_count{stage="queue"}': 3,
        'stage_seconds_sum{stage="queue"}': 0,
        'stage_seconds_count{stage="infer"}': 3,
        'stage_seconds_sum{stage="infer"}': 2,
    }.items():
        assert float(figures[f"tuneserve_{name}"]) == value, name


@pytest.mark.parametrize(
    ("sizes", "batches"),
    [
        ([30, 10, 20, 64], [[10, 20, 30], [64]]),  # the shorter ones are nearer
        ([28, 24, 32], [[28, 32], [24]]),  # of two that are as near the longer one goes first
        ([40, 30, 50], [[40], [30], [50]]),  # what is nearest has no room
        ([30, 4, 34, 4], [[30, 34], [4, 4]]),  # exactly as many tokens as there is room for
        ([16, 60, 60, 60, 60, 16], [[16], [60], [60], [60], [60], [16]]),  # the last lies behind the window
        ([16, 60, 60, 60, 16, 60], [[16, 16], [60], [60], [60], [60]]),
    ],
)
def test_the_texts_nearest_in_length_to_the_oldest_go_with_it(
    make: Callable[..., Any], held: Held, sizes: list[int], batches: list[list[int]]
) -> None:
    batcher, engine = make(held)

    async def ask() -> None:
        first = batcher.submit([text(3)], deadline=FAR)
        assert await asyncio.to_thread(held.began.wait, 5)
        rest = [batcher.submit([text(size)], deadline=FAR) for size in sizes]
        held.free()
        await asyncio.gather(first, *rest)

    asyncio.run(ask())
    assert engine.batches == [[3], *batches]


def test_a_text_that_breaks_the_engine_fails_alone(make: Callable[..., Any]) -> None:
    def picky(engine: Any) -> None:
        if any(len(row) == 7 for row in engine.running):
            raise RuntimeError("no sevens")

    batcher, _ = make(picky)

    async def ask() -> list[Any]:
        return await batcher.submit([text(size) for size in (6, 7, 8, 9)], deadline=FAR)

    assert [isinstance(one, EngineError) for one in asyncio.run(ask())] == [False, True, False, False]
    assert batcher.dead is None


def test_an_engine_that_fails_on_everything_is_dead_and_nobody_waits_for_it(make: Callable[..., Any]) -> None:
    died: list[BaseException] = []

    def broken(engine: Any) -> None:
        raise RuntimeError("broken")

    batcher, _ = make(broken, on_death=died.append)

    async def ask() -> None:
        waiting = [batcher.submit([text(3)], deadline=FAR) for _ in range(5)]
        for [outcome] in await asyncio.wait_for(asyncio.gather(*waiting), 5):
            assert isinstance(outcome, NoModelError)
        with pytest.raises(NoModelError):
            batcher.submit([text(3)], deadline=FAR)

    asyncio.run(ask())
    batcher.close()  # whoever waited is told first, then the owner
    assert [str(error) for error in died] == ["broken"]


def test_what_was_laid_out_when_the_engine_died_is_told_too(make: Callable[..., Any], held: Held) -> None:
    def die(engine: Any) -> None:
        held(engine)
        raise SystemExit("gone")

    batcher, _ = make(die)

    async def ask() -> None:
        first = batcher.submit([text(3)], deadline=FAR)
        assert await asyncio.to_thread(held.began.wait, 5)
        later = batcher.submit([text(4)], deadline=FAR)
        while batcher.tokens_waiting:  # until the thread waits with nothing laid out, or has taken it
            held.free()
            await asyncio.sleep(0.01)
        for [outcome] in await asyncio.wait_for(asyncio.gather(first, later), 5):
            assert isinstance(outcome, NoModelError)

    asyncio.run(ask())


def test_a_batch_that_fails_to_start_on_a_dead_engine_is_told(
    make_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(lambda engine: None)

    def fail(prepared: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(engine, "begin", fail)
    batcher = Batcher(engine, Metrics(), max_queue_tokens=100)

    async def ask() -> None:
        [outcome] = await asyncio.wait_for(batcher.submit([text(3)], deadline=FAR), 5)
        assert isinstance(outcome, NoModelError)

    asyncio.run(ask())
