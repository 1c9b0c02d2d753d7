"""The slot follows the pointer: versions come proved, go when nobody waits, and broken ones never answer."""

import asyncio
import gc
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from wire import app_of, batcher_of, wait_until, wait_until_it_computes

from tuneserve.artifact import Version, read_version
from tuneserve.errors import NoModelError, StoreError
from tuneserve.lifecycle.decision import Decision, write_decision
from tuneserve.lifecycle.store import Store
from tuneserve.serving import follower as module
from tuneserve.serving import slot as slots
from tuneserve.serving.follower import Follower
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings
from tuneserve.tasks.classifier import Classifier

Start = Callable[..., Follower]
Looks = Callable[[int], None]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "models")
    store.prepare()
    return store


@pytest.fixture
def add(store: Store, version: Version) -> Callable[[str], Version]:
    def add(name: str) -> Version:
        folder = store.versions_folder / name
        shutil.copytree(version.folder, folder)
        added = read_version(folder)
        write_decision(added, Decision(name, "accepted", "gate", "passed", None))
        return added

    return add


@pytest.fixture
def slot() -> Iterator[Slot]:
    slot = Slot()
    yield slot
    slot.close()


@pytest.fixture
def start(store: Store, slot: Slot, make_engine: Callable[..., Any]) -> Iterator[Start]:
    followers = []

    def start(broken: set[str] | None = None, *, required: bool = True) -> Follower:
        def load(version: Version) -> Classifier:
            if version.id in (broken or set()):
                raise StoreError(f"{version.id} is torn")
            return Classifier(version, make_engine(lambda engine: None))

        followers.append(Follower(store, slot, load, required=lambda: required))
        followers[-1].start()
        return followers[-1]

    yield start
    for one in followers:
        one.close()


@pytest.fixture
def looks(store: Store, monkeypatch: pytest.MonkeyPatch) -> Looks:
    """Wait until the follower has looked at the pointer so many times more."""
    count, champion_id = 0, store.champion_id

    def counting() -> str | None:
        nonlocal count
        count += 1
        return champion_id()

    def wait(times: int) -> None:
        before = count
        wait_until(lambda: count > before + times)  # a look that had begun before is not one of them

    monkeypatch.setattr(store, "champion_id", counting)
    return wait


def wait_for(slot: Slot, version_id: str) -> None:
    wait_until(lambda: slot.version_id == version_id)


def test_a_new_champion_answers_and_going_back_takes_no_loading(
    store: Store, slot: Slot, add: Callable[[str], Version], start: Start
) -> None:
    store.set_champion(add("one"))
    start()
    wait_for(slot, "one")
    first = slot.model()
    store.set_champion(add("two"))
    wait_for(slot, "two")
    store.rollback()
    wait_for(slot, "one")
    assert slot.model() is first


def test_a_broken_version_is_refused_once_and_the_old_one_stays(
    store: Store,
    slot: Slot,
    add: Callable[[str], Version],
    start: Start,
    looks: Looks,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store.set_champion(add("one"))
    start({"two"})
    wait_for(slot, "one")
    store.set_champion(add("two"))
    wait_until(lambda: "two is torn" in caplog.text)
    looks(4)
    assert (slot.version_id, slot.phase) == ("one", "ready")
    assert caplog.text.count("two is torn") == 1
    assert b'tuneserve_swaps_total{outcome="refused"} 1.0' in slot.metrics.render()
    store.set_champion(add("three"))
    wait_for(slot, "three")


def test_a_version_whose_files_come_late_is_tried_again(
    store: Store,
    slot: Slot,
    add: Callable[[str], Version],
    start: Start,
    looks: Looks,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.1)
    store.set_champion(add("one"))
    start()
    wait_for(slot, "one")
    store.pointer.write_text("two")
    looks(2)
    add("two")
    wait_for(slot, "two")


@pytest.mark.parametrize("damage", ["truncate", "remove", "rubbish"])
def test_a_damaged_pointer_changes_nothing(
    store: Store,
    slot: Slot,
    add: Callable[[str], Version],
    start: Start,
    looks: Looks,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store.set_champion(add("one"))
    start()
    wait_for(slot, "one")
    if damage == "remove":
        store.pointer.unlink()
    else:
        store.pointer.write_bytes(b"" if damage == "truncate" else b"\xff\xfe")

    def errors() -> int:
        return sum(record.levelname == "ERROR" for record in caplog.records)

    wait_until(lambda: errors() or damage == "remove")
    looks(4)
    assert (slot.version_id, slot.phase) == ("one", "ready")
    assert errors() == (damage != "remove")


@pytest.mark.parametrize("damage", ["pointer", "champion"])
def test_at_the_start_the_last_good_version_stands_in_for_a_champion_that_cannot_answer(
    store: Store, slot: Slot, add: Callable[[str], Version], start: Start, damage: str
) -> None:
    store.set_champion(add("one"))
    store.set_champion(add("two"))
    if damage == "pointer":
        store.pointer.write_bytes(b"")
    start({"two"})
    wait_for(slot, "one")


def test_where_a_model_is_required_and_there_is_none_the_slot_fails(
    store: Store, slot: Slot, add: Callable[[str], Version], start: Start
) -> None:
    failed = threading.Event()
    slot.on_failure = failed.set
    start()
    assert failed.wait(30)
    assert isinstance(slot.failure, NoModelError)


def test_where_a_training_runs_the_slot_waits_for_the_first_champion(
    store: Store, slot: Slot, add: Callable[[str], Version], start: Start, looks: Looks
) -> None:
    start(required=False)
    looks(2)
    assert slot.phase == "empty"
    store.set_champion(add("one"))
    wait_for(slot, "one")


def test_requests_of_the_old_model_are_answered_by_it_while_the_new_one_answers_new_ones(
    version: Version, slot: Slot, make_engine: Callable[..., Any]
) -> None:
    go = threading.Event()

    def classifier(name: str, wait: bool) -> Classifier:
        engine = make_engine(lambda engine: (wait and go.wait(60) and None) or None)
        return Classifier(Version(version.folder.with_name(name), version.metadata), engine)

    Path(version.folder.with_name("one")).symlink_to(version.folder)
    Path(version.folder.with_name("two")).symlink_to(version.folder)

    async def both() -> list[str]:
        slot.take(classifier("one", wait=True))
        old = asyncio.ensure_future(slot.model().answer(["film"]))
        await asyncio.to_thread(wait_until_it_computes, slot)
        slot.take(classifier("two", wait=False))
        [new] = await slot.model().answer(["film"])
        go.set()
        return [one.model_version for one in (*await old, new)]  # type: ignore[union-attr]

    assert asyncio.run(both()) == ["one", "two"]


def test_a_model_that_was_replaced_is_dropped_after_a_while(
    version: Version, slot: Slot, make_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "HOLD_S", 0.1)
    slot.take(Classifier(version, make_engine(lambda engine: None)))
    old = batcher_of(slot)
    slot.take(Classifier(version, make_engine(lambda engine: None)))
    wait_until(lambda: not old._thread.is_alive())
    assert not slot.bring_back(version.id)
    assert batcher_of(slot)._thread.is_alive()


@pytest.mark.parametrize("back", [False, True], ids=["another model", "brought back"])
def test_one_model_is_held_however_many_are_replaced(
    version: Version,
    slot: Slot,
    make_engine: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    back: bool,
) -> None:
    monkeypatch.setattr(slots, "SETTLE_S", 0.0)
    models = []
    for _ in range(4):
        slot.take(Classifier(version, make_engine(lambda engine: None)))
        models.append(weakref.ref(slot.model()))
    for _ in range(2 * back):
        assert slot.bring_back(version.id)

    def loaded() -> int:
        gc.collect()
        return sum(model() is not None for model in models)

    wait_until(lambda: loaded() == 2 and sum(thread.is_alive() for thread in slot._leaving) == 1)


def test_a_held_engine_that_dies_takes_nobody_with_it(
    version: Version, slot: Slot, make_engine: Callable[..., Any]
) -> None:
    def die(engine: Any) -> None:
        raise SystemExit("gone")

    slot.take(Classifier(version, make_engine(die)))
    old = slot.model()
    slot.take(Classifier(version, make_engine(lambda engine: None)))

    with pytest.raises(NoModelError):
        old.predict(["film"])
    assert slot.phase == "ready"
    assert not slot.bring_back(version.id)


def test_the_garbage_collector_need_not_look_at_a_model_that_answers(
    add: Callable[[str], Version], store: Store, slot: Slot, start: Start
) -> None:
    gc.unfreeze()
    store.set_champion(add("one"))
    start()
    wait_for(slot, "one")
    assert gc.get_freeze_count() > 10_000
    gc.unfreeze()


@pytest.mark.parametrize("at_start", [True, False])
def test_a_follower_that_meets_what_nobody_foresaw_goes_on_and_health_is_red_until_it_works_again(
    store: Store,
    slot: Slot,
    settings: Settings,
    add: Callable[[str], Version],
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    at_start: bool,
) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.01)
    store.set_champion(add("one"))
    client = TestClient(app_of(settings, slot))
    if not at_start:
        start()
        wait_for(slot, "one")
    with monkeypatch.context() as patch:
        patch.setattr(store, "champion_id", lambda: 1 // 0)
        if at_start:
            start()
        wait_until(lambda: client.get("/livez").status_code == 503)
        assert (client.get("/readyz").status_code == 200) is not at_start
    wait_until(lambda: client.get("/livez").status_code == 200)
    wait_for(slot, "one")
    store.set_champion(add("two"))
    wait_for(slot, "two")


def test_a_store_that_cannot_be_written_is_said_once_and_no_reason_to_be_red(
    store: Store, slot: Slot, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise StoreError("read-only")

    follower = Follower(store, slot, lambda version: pytest.fail("loaded"))
    assert [follower._attempt("the challenger", refuse) for _ in range(3)] == [False] * 3
    assert (slot.trouble, caplog.text.count("the challenger: read-only")) == ("", 1)
