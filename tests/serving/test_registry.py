"""Models by name, loaded, asked and unloaded from many threads at once; memory is measured by the test."""

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from wire import wait_until

from tuneserve.errors import ConflictError, NoModelError, NotFoundError, OutOfMemoryError, StoreError
from tuneserve.serving.model import Answer, Model
from tuneserve.serving.registry import AGAIN_S, Registry
from tuneserve.serving.service import Service

SIZE = 1000
"""Bytes of a model's files, and of memory that it takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Said(Answer):
    name: str


class Named(Model):
    """Answers with its name, and knows whether it is asked after its end."""

    def __init__(self, folder: Path, house: "House") -> None:
        self.id, self._house, self.closed = folder.name, house, False
        self.on_death: Callable[[BaseException], None] = lambda error: None

    def attach(self, metrics: Any, on_death: Callable[[BaseException], None]) -> None:
        self.on_death = on_death

    def room(self, wait_s: float = 0) -> None:
        return None

    async def answer(self, inputs: Any, *, deadline: float = 0) -> Any:
        while not self._house.answers.is_set():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        assert not self.closed
        return [Said(model_version=self.id, name=self.id) for _ in inputs]

    def close(self) -> None:
        self.closed = True
        self._house.open.remove(self.id)


class House:
    """Folders of models, and which of them are open."""

    def __init__(self, root: Path) -> None:
        self.root, self.open, self.opened = root, list[str](), list[str]()
        self.loads, self.answers = threading.Event(), threading.Event()
        self.loads.set()
        self.answers.set()
        self.most = self.most_used = 0
        self.takes: dict[str, int] = {}

    def find(self, name: str) -> Path:
        folder = self.root / name
        if not folder.is_dir():
            raise NotFoundError(f"no {name}")
        return folder

    def make(self, *names: str) -> None:
        for name in names:
            (self.root / name).mkdir()
            (self.root / name / "weights").write_bytes(bytes(SIZE))

    def open_model(self, folder: Path, name: str) -> Model:
        assert self.loads.wait(60)
        if folder.name.startswith("bad"):
            raise ValueError("no such layer")
        self.open.append(folder.name)
        self.opened.append(folder.name)
        self.most, self.most_used = max(self.most, len(self.open)), max(self.most_used, self.used())
        return Named(folder, self)

    def used(self) -> int:
        return sum(self.takes.get(name, SIZE) for name in self.open)


@pytest.fixture
def house(tmp_path: Path) -> House:
    house = House(tmp_path)
    house.make("a", "b", "c", "d", "e")
    return house


@pytest.fixture
def make(house: House) -> Iterator[Callable[..., Service]]:
    made: list[Registry] = []

    def make(**options: Any) -> Service:
        made.append(Registry(house.open_model, **{"used": house.used, "find": house.find} | options))
        return Service({}, metrics=made[-1].metrics, models=made[-1])

    yield make
    house.loads.set()
    house.answers.set()
    for registry in made:
        assert registry.close(wait_s=30)
    assert house.open == []


def models(service: Service) -> Registry:
    assert service.models is not None
    return service.models


def ask(service: Service, name: str) -> str:
    [answer] = service.predict(["text"], name=name)
    assert isinstance(answer, Said)
    return answer.name


def figures(service: Service) -> dict[str, float]:
    return {
        line.split()[0].removeprefix("tuneserve_model"): float(line.split()[1])
        for line in service.metrics.render().decode().splitlines()
        if line.startswith("tuneserve_model") and "_created" not in line
    }


def test_a_model_is_loaded_asked_and_unloaded(make: Callable[..., Service], house: House) -> None:
    service = make(find=None)
    with pytest.raises(NotFoundError):
        ask(service, "a")
    models(service).load("one", house.root / "a").result(10)
    assert ask(service, "one") == "a"
    with pytest.raises(ConflictError, match="loaded already"):
        models(service).load("one", house.root / "b")
    models(service).unload("one").result(10)
    assert house.open == []
    for act in (ask, lambda service, name: models(service).unload(name)):
        with pytest.raises(NotFoundError):
            act(service, "one")


def test_a_name_that_many_load_at_once_is_loaded_once(make: Callable[..., Service], house: House) -> None:
    service = make()
    house.loads.clear()
    with ThreadPoolExecutor(16) as threads:
        asked = [threads.submit(ask, service, "a") for _ in range(15)]
        while not models(service).entries():
            pass
        with pytest.raises(ConflictError, match="loading already"):
            models(service).load("a", house.root / "a")
        house.loads.set()
        assert {one.result() for one in asked} == {"a"}
    assert house.opened == ["a"]


def test_what_is_in_flight_is_answered_before_a_model_goes_and_the_next_waits_for_its_end(
    make: Callable[..., Service], house: House
) -> None:
    service = make(find=None)
    models(service).load("one", house.root / "a").result(10)
    house.answers.clear()
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(ask, service, "one")
        while not models(service).entries()[0].users:
            pass
        gone = models(service).unload("one")
        with pytest.raises(NotFoundError):
            ask(service, "one")
        again = models(service).load("one", house.root / "b")
        assert not gone.done()
        assert not again.done()
        house.answers.set()
        assert asked.result() == "a"
    gone.result(10)
    again.result(10)
    assert (ask(service, "one"), house.most) == ("b", 1)


def test_a_model_that_is_unloaded_while_it_loads_never_answers(make: Callable[..., Service], house: House) -> None:
    service = make(find=None)
    house.loads.clear()
    loaded = models(service).load("one", house.root / "a")
    gone = models(service).unload("one")
    house.loads.set()
    assert isinstance(loaded.exception(10), NotFoundError)
    gone.result(10)
    assert (house.open, house.opened) == ([], ["a"])


def test_sixteen_threads_that_load_ask_and_unload_get_no_wrong_models_answer(
    make: Callable[..., Service], house: House
) -> None:
    service, seen = make(find=None), []

    def live(seed: int) -> list[str]:
        dice, done = random.Random(seed), []
        for _ in range(60):
            name = dice.choice("abcde")
            try:
                match dice.choice(["load", "ask", "ask", "ask", "unload"]):
                    case "load":
                        models(service).load(name, house.root / name).result(30)
                        done.append("loaded")
                    case "ask":
                        assert ask(service, name) == name
                        done.append("answered")
                    case "unload":
                        models(service).unload(name).result(30)
                        done.append("unloaded")
            except (ConflictError, NotFoundError) as error:
                done.append(type(error).__name__)
        return done

    with ThreadPoolExecutor(16) as threads:
        for done in threads.map(live, range(16)):
            seen += done
    assert {"loaded", "answered", "unloaded", "ConflictError", "NotFoundError"} == set(seen)
    assert len(house.open) == len(models(service).entries()) == figures(service)["s_loaded"]


def test_the_least_recently_used_goes_when_memory_is_short(make: Callable[..., Service], house: House) -> None:
    service = make(limit=3 * SIZE)
    for name in "abcadbe":
        assert ask(service, name) == name
    # `d` took the place of `b`, which was the longest unused; then `b` that of `c`, and `e` that of `a`.
    assert house.opened == ["a", "b", "c", "d", "b", "e"]
    assert [one.name for one in models(service).entries()] == ["b", "d", "e"]
    assert house.most == 3
    found = figures(service)
    assert (found["_evictions_total"], found["_hits_total"], found['_loads_total{outcome="loaded"}']) == (3, 1, 6)


def test_pinned_models_stay(make: Callable[..., Service], house: House) -> None:
    service = make(limit=3 * SIZE, pinned=["a", "b"])
    for name in "abcde":
        assert ask(service, name) == name
    assert [one.name for one in models(service).entries()] == ["a", "b", "e"]


def test_without_evictions_a_lack_of_memory_is_said(make: Callable[..., Service], house: House) -> None:
    service = make(limit=SIZE, evicts=False, find=None)
    models(service).load("a", house.root / "a").result(10)
    error = models(service).load("b", house.root / "b").exception(10)
    assert isinstance(error, OutOfMemoryError)
    assert "MEMORY_LIMIT" in str(error)
    models(service).unload("a").result(10)
    models(service).load("b", house.root / "b").result(10)


def test_a_model_larger_than_all_memory_drives_out_no_other(make: Callable[..., Service], house: House) -> None:
    service = make(limit=2 * SIZE)
    house.make("large")
    (house.root / "large" / "more").write_bytes(bytes(2 * SIZE))
    assert ask(service, "a") == "a"
    with pytest.raises(OutOfMemoryError):
        ask(service, "large")
    assert house.open == ["a"]


def test_a_load_waits_until_a_model_is_no_longer_in_use(make: Callable[..., Service], house: House) -> None:
    service = make(limit=SIZE)
    assert ask(service, "a") == "a"
    house.answers.clear()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(ask, service, "a")
        while not models(service).entries()[0].users:
            pass
        second = threads.submit(ask, service, "b")
        while len(models(service).entries()) < 2:
            pass
        assert house.opened == ["a"]
        house.answers.set()
        assert (first.result(), second.result()) == ("a", "b")
    assert house.most == 1


def test_without_patience_it_does_not(make: Callable[..., Service], house: House) -> None:
    service = make(limit=SIZE, patience_s=0)
    house.answers.clear()
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(ask, service, "a")
        while not models(service).entries() or not models(service).entries()[0].users:
            pass
        with pytest.raises(OutOfMemoryError, match="in use"):
            ask(service, "b")
        house.answers.set()
        assert first.result() == "a"


def test_a_model_that_cannot_be_loaded_says_why_and_is_not_tried_at_every_request(
    make: Callable[..., Service], house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, tried = make(), []
    house.make("bad")
    opens = house.open_model
    models(service)._open = lambda folder, name: tried.append(name) or opens(folder, name)  # type: ignore[func-returns-value]
    for _ in range(3):
        with pytest.raises(StoreError, match="'bad' cannot be loaded: no such layer"):
            ask(service, "bad")
    assert tried == ["bad"]
    monkeypatch.setattr("tuneserve.serving.registry.AGAIN_S", -AGAIN_S)
    models(service)._failures.clear()
    for _ in range(2):
        with pytest.raises(StoreError):
            ask(service, "bad")
    assert tried == ["bad"] * 3
    assert ask(service, "a") == "a"


def test_a_request_waits_for_a_load_no_longer_than_it_may(make: Callable[..., Service], house: House) -> None:
    service = make()
    house.loads.clear()
    with pytest.raises(NoModelError, match="still being loaded"):
        asyncio.run(service.answer(["text"], name="a", timeout_s=0.01))
    house.loads.set()
    assert ask(service, "a") == "a"
    assert house.opened == ["a"]


def test_a_model_that_dies_goes_alone_and_is_loaded_again(make: Callable[..., Service], house: House) -> None:
    service = make()
    assert [ask(service, name) for name in "ab"] == ["a", "b"]
    [entry, _] = models(service).entries()
    assert entry.slot is not None
    model = entry.slot.model()
    assert isinstance(model, Named)
    model.on_death(RuntimeError("killed"))
    gone = entry.gone
    assert isinstance(gone, Future)
    gone.result(10)
    assert [ask(service, name) for name in "ab"] == ["a", "b"]
    assert house.opened == ["a", "b", "a"]


def test_a_server_that_ends_unloads_all_and_begins_no_load(make: Callable[..., Service], house: House) -> None:
    service = make()
    assert ask(service, "a") == "a"
    house.loads.clear()
    waiting = [models(service).load(name, house.root / name) for name in "bcde"]
    assert not models(service).close(wait_s=0)
    house.loads.set()
    assert all(one.exception(10) is not None for one in waiting)
    assert len(house.opened) <= 3  # two were being loaded


def test_what_loads_take_beyond_their_files_is_learned(make: Callable[..., Service], house: House) -> None:
    house.takes = dict.fromkeys("abcde", 4 * SIZE)
    service = make(limit=10 * SIZE)
    for name in "abcdeab":
        assert ask(service, name) == name
    assert (house.most, house.most_used) == (2, 8 * SIZE)
    assert models(service).evicted == 5


@pytest.mark.parametrize("evicts", [True, False])
def test_a_model_that_takes_more_than_there_is_drives_out_others_or_is_refused(
    make: Callable[..., Service], house: House, evicts: bool
) -> None:
    house.takes = {"d": 8 * SIZE, "e": 20 * SIZE}
    service = make(limit=10 * SIZE, evicts=evicts)
    for name in "abc":
        assert ask(service, name) == name
    if evicts:
        assert ask(service, "d") == "d"
        assert house.open == ["b", "c", "d"]
    else:
        with pytest.raises(OutOfMemoryError, match="'d' has files of 0 MiB"):
            ask(service, "d")
        assert house.open == ["a", "b", "c"]
    with pytest.raises(OutOfMemoryError, match="'e'"):
        ask(service, "e")
    assert house.used() <= 10 * SIZE
    assert ask(service, "a") == "a"  # where others took more, a model that is alone is judged by its files


def test_headroom_is_left_where_there_is_a_choice(make: Callable[..., Service], house: House) -> None:
    service = make(limit=4 * SIZE, headroom=SIZE)
    for name in "abcd":
        assert ask(service, name) == name
    assert house.most == 3
    house.takes["e"] = 4 * SIZE
    assert ask(service, "e") == "e"
    assert house.open == ["e"]


@pytest.mark.parametrize("finds", [True, False])
def test_a_request_for_a_model_that_is_unloaded_while_it_is_loaded_loads_it_again_if_it_may(
    make: Callable[..., Service], house: House, finds: bool
) -> None:
    service = make() if finds else make(find=None)
    house.loads.clear()
    if not finds:
        models(service).load("a", house.root / "a")
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(ask, service, "a")
        wait_until(lambda: models(service).entries())
        gone = models(service).unload("a")
        house.loads.set()
        if finds:
            assert asked.result(30) == "a"
            assert house.opened == ["a", "a"]
        else:
            with pytest.raises(NotFoundError):
                asked.result(30)
        gone.result(30)
