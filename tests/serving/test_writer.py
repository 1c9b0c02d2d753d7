"""The queue before a model that writes: who joins when, who leaves, and what a failing engine costs."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from wire import wait_until

from tuneserve.errors import EngineError, NoModelError, TuneserveError
from tuneserve.network.wishes import Wishes, Writing
from tuneserve.serving import writer as writer_module
from tuneserve.serving.metrics import Metrics
from tuneserve.serving.writer import MEASURED, Order, Writer

BAD, WORSE = 13, 14
"""Prompts that begin so fail alone, or with all that is under way."""


class Counting:
    """An engine that writes 1, 2, 3, ... on any prompt, and a step only when the test lets it."""

    device, sound = "cpu", True

    def __init__(self, max_tokens: int = 1000) -> None:
        self.max_tokens = max_tokens
        self.steps = threading.Semaphore(0)
        self.failing = 0
        self.cleared = 0
        self.log: list[tuple[Any, ...]] = []
        self._texts: list[tuple[Writing, Wishes]] = []

    def join(self, prompts: Sequence[tuple[Sequence[int], Wishes]]) -> list[Writing]:
        self.log.append(("join", *(len(ids) for ids, _ in prompts)))
        self.sound = all(ids[0] != WORSE for ids, _ in prompts)
        if any(ids[0] in (BAD, WORSE) for ids, _ in prompts):
            raise RuntimeError("no")
        texts = [(Writing(), wishes) for _, wishes in prompts]
        self._texts += texts
        self._write(texts)
        return [writing for writing, _ in texts]

    def step(self) -> None:
        self.steps.acquire()
        if self.failing:
            self.failing -= 1
            self.sound = False
            raise RuntimeError("no step")
        self.log.append(("step", len(self._texts)))
        self._write(self._texts)

    def drop(self, writings: Sequence[Writing]) -> None:
        self.log.append(("drop", len(writings)))
        self._texts = [one for one in self._texts if one[0] not in writings]

    def clear(self) -> None:
        self.cleared += 1
        self.sound, self._texts = True, []

    def _write(self, texts: Sequence[tuple[Writing, Wishes]]) -> None:
        for writing, wishes in texts:
            writing.ids = [*writing.ids, len(writing.ids) + 1]
            writing.done = len(writing.ids) >= wishes.max_new_tokens
        self._texts = [one for one in self._texts if not one[0].done]


class Heard:
    """Orders texts, and keeps what is told of each."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.told: dict[int, list[Any]] = {}
        self._loop: Any = self
        self.orders: list[Order] = []

    def is_closed(self) -> bool:
        return False

    def call_soon_threadsafe(self, tell: Any, *arguments: Any) -> None:
        tell(*arguments)

    def order(self, *texts: tuple[int, int], first: int = 1, beams: int = 1) -> list[Order]:
        """Texts of so many tokens, on which so many are to be written, as one request."""
        made = []
        for length, new in texts:
            name = len(self.told)
            self.told[name] = []
            tell = lambda found, done, name=name: self.told[name].append(found)  # noqa: E731
            made.append(Order([first] * length, Wishes(new, num_beams=beams), tell, self._loop))
        self.orders += made
        self.writer.submit(made)
        return made


@contextmanager
def started(engine: Counting, **options: Any) -> Iterator[Heard]:
    writer = Writer(engine, Metrics(), **{"max_queue_tokens": 500} | options)
    try:
        yield Heard(writer)
    finally:
        engine.steps.release(10_000)
        writer.close()


def test_a_text_joins_those_under_way_and_leaves_before_them() -> None:
    with started(engine := Counting()) as heard:
        heard.order((3, 9))
        wait_until(lambda: ("join", 3) in engine.log)
        heard.order((4, 2))
        engine.steps.release(2)
        wait_until(lambda: len(engine.log) == 4)
        assert engine.log == [("join", 3), ("step", 1), ("join", 4), ("step", 2)]
        wait_until(lambda: heard.told[1] == [[1], [1, 2]])
        assert heard.told[0][-1] == [1, 2, 3]
        engine.steps.release()
        wait_until(lambda: engine.log[4:] == [("step", 1)])


def test_as_many_are_under_way_as_there_are_columns_for() -> None:
    with started(engine := Counting(max_tokens=100)) as heard:
        heard.order((10, 20), (10, 20), (10, 20), (10, 20))
        wait_until(lambda: ("join", 10, 10, 10) in engine.log)
        assert heard.writer.tokens_waiting == 30
        engine.steps.release(19)
        wait_until(lambda: ("join", 10) in engine.log)
        assert heard.writer.tokens_waiting == 0
    assert engine.log.index(("join", 10)) == 20


def test_prompts_are_read_with_those_of_like_length() -> None:
    with started(engine := Counting(max_tokens=10**6)) as heard:
        heard.order((1, 5), (100, 5), (2, 5), (60, 5), (5, 5), first=1)
        wait_until(lambda: len(engine.log) == 3)
        assert engine.log == [("join", 1, 2), ("join", 5), ("join", 60, 100)]


@pytest.mark.parametrize("beams", [1, 5])
def test_a_long_text_counts_as_if_all_were_as_long(beams: int) -> None:
    with started(engine := Counting(max_tokens=120)) as heard:
        heard.order((10, 10))
        wait_until(lambda: len(engine.log) == 1)
        heard.order((100 // beams - 9, 10), beams=beams)
        engine.steps.release(9)
        wait_until(lambda: len(heard.told[1]) > 0)
        assert engine.log[:10] == [("join", 10), *[("step", 1)] * 9]


def test_a_text_that_is_larger_than_all_there_is_goes_alone() -> None:
    with started(engine := Counting(max_tokens=100)) as heard:
        heard.order((300, 2), (3, 2))
        engine.steps.release(2)
        wait_until(lambda: heard.told[1][-1:] == [[1, 2]])
        assert engine.log == [("join", 300), ("step", 1), ("join", 3), ("step", 1)]


def test_long_prompts_do_not_hold_up_those_under_way() -> None:
    with started(engine := Counting(max_tokens=10**6), max_queue_tokens=10**6) as heard:
        heard.order((1, 50))
        wait_until(lambda: len(engine.log) == 1)
        heard.order(*[(1000, 50)] * 4)
        engine.steps.release(3)
        wait_until(lambda: len(engine.log) == 6)
        assert [len(one) for one in engine.log if one[0] == "join"] == [2, 3, 3]
        assert [one[0] for one in engine.log[1:]] == ["step", "join", "step", "join", "step"]


def test_nobody_waits_for_a_text_any_more() -> None:
    with started(engine := Counting(max_tokens=60)) as heard:
        [first] = heard.order((10, 20))
        wait_until(lambda: len(engine.log) == 1)
        [second, third] = heard.order((10, 20), (10, 40))
        heard.writer.cancel(second)
        assert heard.writer.tokens_waiting == 50
        heard.writer.cancel(first)
        engine.steps.release(1)
        wait_until(lambda: ("drop", 1) in engine.log and ("join", 10) in engine.log[2:])
        assert [one[0] for one in engine.log] == ["join", "step", "drop", "join"]
        assert heard.told[1] == []
        heard.writer.cancel(third)
        heard.writer.cancel(third)
        assert heard.writer.tokens_waiting == 0


def test_a_prompt_that_fails_fails_alone() -> None:
    with started(engine := Counting()) as heard:
        heard.order((3, 3))
        heard.order((2, 3), first=BAD)
        engine.steps.release(2)
        wait_until(lambda: heard.told[0][-1:] == [[1, 2, 3]])
        assert [str(one) for one in heard.told[1]] == ["The engine failed on this text."]
        assert not engine.cleared


def test_a_prompt_that_fails_among_others_fails_alone() -> None:
    with started(engine := Counting()) as heard:
        heard.order((1, 9))
        wait_until(lambda: len(engine.log) == 1)
        bad, good = heard.order((3, 2), (3, 2))
        bad.ids = [BAD] * 3
        engine.steps.release(2)
        wait_until(lambda: heard.told[2][-1:] == [[1, 2]])
        assert [str(one) for one in heard.told[1]] == ["The engine failed on this text."]
        assert engine.log[2:5] == [("join", 3, 3), ("join", 3), ("join", 3)]
        assert good.told == 2


def test_a_failure_in_the_midst_of_a_change_costs_what_is_under_way() -> None:
    with started(engine := Counting()) as heard:
        heard.order((3, 3))
        wait_until(lambda: len(engine.log) == 1)
        heard.order((2, 3), first=WORSE)
        engine.steps.release(1)
        wait_until(lambda: engine.cleared == 1)
        assert isinstance(heard.told[0][-1], EngineError)
        heard.order((3, 2))
        engine.steps.release(1)
        wait_until(lambda: heard.told[2][-1:] == [[1, 2]])


def test_an_engine_that_fails_once_goes_on_and_one_that_always_fails_is_dead() -> None:
    engine, deaths = Counting(), list[BaseException]()
    with started(engine) as heard:
        heard.writer.on_death = deaths.append
        engine.failing = 1
        heard.order((3, 3))
        engine.steps.release(1)
        wait_until(lambda: engine.cleared == 1)
        heard.order((3, 2))
        engine.steps.release(1)
        wait_until(lambda: heard.told[1][-1:] == [[1, 2]])
        engine.failing = 99
        engine.steps.release(99)
        for name in range(2, 2 + writer_module.FAILURES):
            heard.order((3, 2))
            wait_until(lambda name=name: isinstance(heard.told[name][-1:], list) and len(heard.told[name]) == 2)
        wait_until(lambda: bool(deaths))
        with pytest.raises(NoModelError):
            heard.order((3, 2))


def test_what_waits_is_refused_beyond_the_queue_and_beyond_its_time() -> None:
    with started(engine := Counting(max_tokens=30), max_queue_tokens=100) as heard:
        assert heard.writer.refusal(coming=10**6) is None
        heard.order((10, 20))
        wait_until(lambda: len(engine.log) == 1)
        heard.order((10, 20), (10, 20))
        assert heard.writer.refusal(0.001) is None, "nobody knows yet how long it takes"
        assert heard.writer.refusal(coming=40) is None
        assert heard.writer.refusal(coming=41) is not None
        engine.steps.release(MEASURED)
        wait_until(lambda: heard.writer.drain_s > 0)
        assert heard.writer.refusal(heard.writer.drain_s * 10) is None
        refused = heard.writer.refusal(heard.writer.drain_s / 10)
        assert refused is not None
        assert refused.retry_after_s >= 1
        heard.order((10, 30))
        assert heard.writer.refusal() is not None


def test_whoever_waits_is_told_on_its_own_loop() -> None:
    async def ask(writer: Writer) -> list[Any]:
        news: asyncio.Queue[tuple[Sequence[int] | TuneserveError, bool]] = asyncio.Queue()
        order = Order([1], Wishes(2), lambda *one: news.put_nowait(one), asyncio.get_running_loop())
        writer.submit([order])
        return [await news.get(), await news.get()]

    with started(engine := Counting()) as heard:
        engine.steps.release(1)
        assert asyncio.run(ask(heard.writer)) == [([1], False), ([1, 2], True)]


def test_what_was_ordered_is_written_before_the_end() -> None:
    with started(Counting()) as heard:
        heard.order((3, 5), (3, 7))
    assert [told[-1] for told in heard.told.values()] == [[*range(1, 6)], [*range(1, 8)]]
