"""The loop in one process, with echoes for models and stubs for trainings: settings, schedule, keys, jobs."""

import asyncio
import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from outside.echo_task import ECHO, GO, EchoModel
from pydantic import SecretStr
from wire import wait_until

from tuneserve.files import write_json
from tuneserve.lifecycle.store import Store
from tuneserve.serving.application import Application
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings
from tuneserve.tasks import catalog

TRAINS = [sys.executable, "-c", ""]


@pytest.fixture
def store(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store with the versions `one`, the champion, and `two`, of a task that echoes."""
    monkeypatch.setitem(catalog.TASKS, ECHO.name, ECHO)
    store = Store(settings.model_path)
    store.prepare()
    for name in ("one", "two"):
        (store.versions_folder / name).mkdir()
        write_json(store.versions_folder / name / "metadata.json", {"labels": [], "task": "echo"})
    store.promote("one")
    GO.set()
    yield store
    GO.clear()


def changed(settings: Settings, **values: Any) -> Settings:
    return settings.model_copy(update=values)


def say(client: TestClient) -> str:
    return str(client.post("/echo", json={"texts": ["one"]}).json()["model_version"])


def ready(client: TestClient) -> None:
    wait_until(lambda: client.get("/readyz").status_code == 200)


def idle(application: Application) -> None:
    """Wait until nothing trains."""
    trainer = application.trainer
    assert trainer is not None
    wait_until(lambda: trainer.running is None)


def reasons(application: Application) -> list[str]:
    """Why each training was started, after the first."""
    assert application.trainer is not None
    return [job.why for job in application.trainer.jobs() if job.why != "the container's start"]


@pytest.mark.parametrize("wanted", [0, 3])
def test_shadow_requests_are_how_many_texts_a_challenger_answers_first(
    store: Store, settings: Settings, wanted: int
) -> None:
    store.set_challenger(store.version("two"))
    application = Application(changed(settings, shadow_requests=wanted), threads=1)
    with TestClient(application.asgi) as client:
        ready(client)
        wait_until(lambda: (application.slot.shadow is not None) == (wanted > 0))
        answers = [say(client)]
        if wanted:
            wait_until(lambda: answers.append(say(client)) or answers[-1] == "two")
    assert answers.count("one") >= wanted
    assert store.challenger_id() == (None if wanted else "two")


@pytest.mark.parametrize("wanted", [True, False])
def test_retrain_on_drift_starts_a_training_for_drift(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    asked = []

    def report() -> Any:
        asked.append(1)
        return SimpleNamespace(drifted=True, sentence="longer texts")

    monkeypatch.setattr(Slot, "monitor", lambda slot: SimpleNamespace(report=report))
    application = Application(changed(settings, retrain_on_drift=wanted), threads=1, training=TRAINS)
    with TestClient(application.asgi) as client:
        ready(client)
        if wanted:
            wait_until(lambda: reasons(application) == ["drift: longer texts"])
    assert bool(asked) == wanted


@pytest.mark.parametrize(("hours", "starts"), [(-9000, 1), (9000, 0)])
def test_what_was_missed_is_caught_up_once_and_a_clock_that_was_ahead_brings_nothing(
    store: Store, settings: Settings, hours: int, starts: int
) -> None:
    schedule, now = "0 0 1 1 *", datetime.now(UTC)
    handled = (now + timedelta(hours=hours)).isoformat()
    write_json(store.root / "schedule.json", {"handled": handled, "expression": schedule})
    for _ in range(2):  # once, also if the container starts again
        application = Application(
            changed(settings, retrain_schedule=schedule, retrain_time_zone="Europe/Berlin"), threads=1, training=TRAINS
        )
        assert application.retraining is not None
        with TestClient(application.asgi) as client:
            ready(client)
            for second in range(5):
                idle(application)
                application.retraining.look(now + timedelta(seconds=second))
            idle(application)
        assert reasons(application) == ["RETRAIN_SCHEDULE"] * starts


def test_a_training_is_asked_for_with_the_key_and_followed_as_a_job(
    store: Store, settings: Settings, tmp_path: Path
) -> None:
    key = {"X-API-Key": "mine"}
    program = tmp_path / "trains.py"
    program.write_text("")
    training = [sys.executable, str(program)]
    application = Application(changed(settings, api_key=SecretStr("mine")), threads=1, training=training)
    with TestClient(application.asgi) as client:
        ready(client)
        idle(application)
        for method, path in (("POST", "/retrain"), ("GET", "/jobs"), ("GET", "/jobs/none")):
            assert client.request(method, path).status_code == 401
        assert client.get("/jobs/none", headers=key).status_code == 404
        program.write_text("import time; time.sleep(600)")
        answer = client.post("/retrain", headers=key)
        job = answer.json()
        assert (answer.status_code, answer.headers["Location"]) == (202, f"/jobs/{job['id']}")
        assert client.post("/retrain", headers=key).status_code == 409
        running = client.get(f"/jobs/{job['id']}", headers=key).json()
        assert (running["state"], running["why"], running["progress"]) == (
            "running",
            "POST /retrain",
            {"phase": "preparing"},
        )
        first, start = client.get("/jobs", headers=key).json()
        assert (first["id"], start["why"], start["state"]) == (job["id"], "the container's start", "finished")
    assert application.trainer is not None
    ended = application.trainer.job(job["id"])
    assert ended is not None
    assert ended.state == "interrupted"


def test_without_a_key_nobody_asks_for_a_training(store: Store, settings: Settings) -> None:
    with TestClient(Application(settings, threads=1, training=TRAINS).asgi) as client:
        assert client.post("/retrain").status_code == 403


@pytest.mark.parametrize(("jitter_s", "starts"), [(0, True), (1e11, False)])
def test_retrain_jitter_delays_what_is_due(store: Store, settings: Settings, jitter_s: float, starts: bool) -> None:
    schedule, handled = "0 0 1 1 *", datetime.now(UTC) - timedelta(days=800)
    memory = store.root / "schedule.json"
    write_json(memory, {"handled": handled.isoformat(), "expression": schedule})
    late = changed(settings, retrain_schedule=schedule, retrain_jitter_s=jitter_s)
    application = Application(late, threads=1, training=TRAINS)
    assert application.retraining is not None
    with TestClient(application.asgi) as client:
        ready(client)
        idle(application)
        application.retraining.look(datetime.now(UTC))
        assert ("RETRAIN_SCHEDULE" in reasons(application)) == starts
    assert (json.loads(memory.read_text())["handled"] != handled.isoformat()) == starts


def test_drift_is_judged_by_as_many_texts_and_hours_as_the_window_has(store: Store, settings: Settings) -> None:
    application = Application(changed(settings, drift_window=77, drift_window_hours=5.0), threads=1)
    with TestClient(application.asgi) as client:
        ready(client)
        window = application.slot.monitor().window
    assert (window.max_texts, window.hours) == (77, 5.0)


def test_a_model_is_warm_before_it_answers(store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    happened = []
    monkeypatch.setattr(EchoModel, "warm_up", lambda model: happened.append(f"{model.id} warms up"))
    monkeypatch.setattr(Slot, "take", lambda slot, model, take=Slot.take: (happened.append("taken"), take(slot, model)))
    application = Application(settings, threads=1)
    with TestClient(application.asgi) as client:
        ready(client)
        store.promote("two")
        wait_until(lambda: say(client) == "two")
    assert happened == ["one warms up", "taken", "two warms up", "taken"]


def test_a_model_that_was_replaced_is_closed_once_nobody_waits_for_it(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneserve.serving.slot.HOLD_S", 0.0)
    closed = []
    monkeypatch.setattr(EchoModel, "close", lambda model: closed.append(model.id))
    slot = Slot()
    models = [ECHO.load(store.version(name), settings, threads=1) for name in ("one", "two")]
    slot.take(models[0])
    with slot.served() as served:
        slot.take(models[1])
        retiring = slot._leaving[-1]
        retiring.join(0.3)  # it looks every 0.1 s, and would have closed the model by now
        assert retiring.is_alive()
        assert not closed
        assert asyncio.run(served.model.answer(["late"]))[0].model_version == "one"  # type: ignore[union-attr]
    retiring.join()
    assert closed == ["one"]
    slot.close()
