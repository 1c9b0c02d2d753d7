"""What a server is put together for: the task of the version that it finds in the store."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from outside.echo_task import ECHO, GO
from wire import wait_until

from tuneserve.errors import SettingsError
from tuneserve.files import write_json
from tuneserve.lifecycle.store import Store
from tuneserve.scoring.job import score
from tuneserve.serving.application import Application
from tuneserve.settings import Settings
from tuneserve.tasks import catalog


@pytest.fixture
def store(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """An empty store, in a package whose catalog has the task `echo`."""
    monkeypatch.setitem(catalog.TASKS, ECHO.name, ECHO)
    store = Store(settings.model_path)
    store.prepare()
    GO.set()
    yield store
    GO.clear()


def put(store: Store, name: str, **metadata: Any) -> None:
    (store.versions_folder / name).mkdir()
    write_json(store.versions_folder / name / "metadata.json", {"labels": [], **metadata})
    store.promote(name)


def paths(application: Application) -> set[str]:
    return set(application.asgi.openapi()["paths"])


def test_a_server_has_the_routes_of_the_task_that_its_champion_names(store: Store, settings: Settings) -> None:
    put(store, "first", task="echo")
    application = Application(settings, threads=1)
    assert "/echo" in paths(application)
    assert "/inference" not in paths(application)
    with TestClient(application.asgi) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        assert client.post("/echo", json={"texts": ["one"]}).json()["text"] == "one"


@pytest.mark.parametrize(("task", "found"), [("text-classification", "was started with"), ("other", "knows")])
def test_a_champion_of_another_task_is_refused_and_the_model_goes_on(
    store: Store, settings: Settings, caplog: pytest.LogCaptureFixture, task: str, found: str
) -> None:
    put(store, "first", task="echo")
    with TestClient(Application(settings, threads=1).asgi) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        put(store, "second", task=task)
        wait_until(lambda: found in caplog.text)
        assert f"version second is for the task '{task}'" in caplog.text
        assert client.post("/echo", json={"texts": ["one"]}).json()["model_version"] == "first"


def test_what_may_answer_instead_of_a_champion_of_an_unknown_task_has_its_routes(
    store: Store, settings: Settings
) -> None:
    put(store, "first", task="echo")
    put(store, "second", task="other")
    application = Application(settings, threads=1)
    with TestClient(application.asgi) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        assert client.post("/echo", json={"texts": ["one"]}).json()["model_version"] == "first"


def test_a_store_without_a_model_is_one_of_a_classifier(store: Store, settings: Settings) -> None:
    application = Application(settings, threads=1)
    assert "/inference" in paths(application)
    assert "/echo" not in paths(application)
    application.close()


def test_whole_files_are_scored_by_classifiers_alone(store: Store, settings: Settings, tmp_path: Path) -> None:
    put(store, "first", task="echo")
    (tmp_path / "in.csv").write_text("text\nfilm\n")
    about = {"input": str(tmp_path / "in.csv"), "output": str(tmp_path / "out.csv")}
    with pytest.raises(SettingsError, match="first is for the task 'echo'"):
        score(settings.model_copy(update=about), threads=1, environ={})
