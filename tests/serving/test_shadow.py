"""A challenger in the champion's shadow: unseen by users, and judged by what it did."""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from wire import app_of

from tuneserve.artifact import Version, read_version
from tuneserve.errors import StoreError
from tuneserve.lifecycle.decision import Decision, read_decision, write_decision
from tuneserve.lifecycle.store import Store
from tuneserve.serving.shadow import Shadowing
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings
from tuneserve.tasks.classifier import Classifier

Place = tuple[Store, Slot, TestClient, Callable[[Any], Shadowing]]


@pytest.fixture
def place(tmp_path: Path, version: Version, settings: Settings, make_engine: Callable[..., Any]) -> Iterator[Place]:
    """A store with champion `one` that answers, and challenger `two`; and what makes a shadowing of an engine."""
    store, slot = Store(tmp_path / "models"), Slot()
    store.prepare()
    for name in ("one", "two"):
        shutil.copytree(version.folder, store.versions_folder / name)
        write_decision(store.version(name), Decision(name, "accepted", "gate", "passed", None))
    store.set_champion(store.version("one"))
    store.set_challenger(store.version("two"))
    slot.take(Classifier(read_version(store.versions_folder / "one"), make_engine(lambda engine: None)))

    def shadowing(instead: Any) -> Shadowing:
        def load(version: Version) -> Classifier:
            return Classifier(version, make_engine(instead))

        return Shadowing(store, slot, load, wanted=5)

    with TestClient(app_of(settings, slot)) as client:
        yield store, slot, client, shadowing
    slot.close()


def ask(place: Place, shadowing: Shadowing) -> Counter[str]:
    """How often which version answered, while the shadow is looked after until it has decided, and then once more."""
    seen: Counter[str] = Counter()
    deadline, decided = time.monotonic() + 30, False
    while not decided or seen.total() < 20:
        assert time.monotonic() < deadline
        decided = place[1].shadow is None
        answer = place[2].post("/inference", json={"text": "a great film"})
        assert answer.status_code == 200
        seen[answer.json()["model_version"]] += 1
        time.sleep(0.02)
        shadowing.look()
    return seen


def test_a_challenger_that_does_well_takes_over_and_its_decision_says_how_it_did(place: Place) -> None:
    store, slot, client, make = place
    shadowing = make(lambda engine: None)
    shadowing.look()
    assert client.post("/inference", json={"text": "a film"}).json()["model_version"] == "one"
    answers = ask(place, shadowing)
    assert set(answers) == {"one", "two"}
    assert (store.champion_id(), store.challenger_id(), slot.version_id) == ("two", None, "two")
    decision = read_decision(store.version("two"))
    assert decision is not None
    assert decision.figures["shadow"]["texts"] >= 5
    assert decision.figures["shadow"]["agreement"] == 1.0
    assert "in the champion's shadow it answered" in decision.sentence
    asked = answers.total() + 1
    assert f"tuneserve_texts_total {asked}.0" in slot.metrics.render().decode()  # the shadow's are not counted


def test_disagreement_is_recorded(place: Place) -> None:
    shadowing = place[3](lambda engine: np.array([[1.0, -1.0]] * len(engine.running), dtype=np.float32))
    shadowing.look()
    ask(place, shadowing)
    decision = read_decision(place[0].version("two"))
    assert decision is not None
    assert decision.figures["shadow"]["agreement"] == 0.0


@pytest.mark.parametrize("failure", [RuntimeError("broken"), SystemExit("gone")])
def test_a_challenger_that_fails_is_refused_and_nobody_notices(place: Place, failure: BaseException) -> None:
    def fail(engine: Any) -> None:
        raise failure

    store, slot, _, make = place
    shadowing = make(fail)
    shadowing.look()
    assert set(ask(place, shadowing)) == {"one"}
    assert (store.champion_id(), store.challenger_id(), slot.version_id) == ("one", None, "one")
    decision = read_decision(store.version("two"))
    assert decision is not None
    assert decision.verdict == "refused"


def test_a_challenger_that_cannot_be_loaded_is_let_go(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    store, slot, _, _ = place

    def load(version: Version) -> Classifier:
        raise StoreError("torn")

    Shadowing(store, slot, load, wanted=5).look()
    assert "torn" in caplog.text
    assert store.challenger_id() is None
    assert slot.version_id == "one"


def test_people_may_end_it(place: Place) -> None:
    store, slot, _, make = place
    shadowing = make(lambda engine: None)
    shadowing.look()
    store.set_challenger(None)
    assert set(ask(place, shadowing)) == {"one"}
    assert slot.shadow is None


def test_a_server_that_shadows_none_leaves_the_challenger_to_others(place: Place) -> None:
    store, slot, _, _ = place
    Shadowing(store, slot, lambda version: pytest.fail("loaded"), wanted=0).look()
    assert store.challenger_id() == "two"
