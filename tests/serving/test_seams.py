"""The seams hold: a task and an adapter from outside the package, each short, get all that the house does for its own.

Real sockets, the application that `run.py serve` runs, and a store whose champion changes.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from outside import echo_adapter, echo_task
from outside.echo_task import ECHO, GO, ROOM, EchoModel
from wire import Client, app_of, wait_until, write

from tuneserve.artifact import Version
from tuneserve.lifecycle.decision import Decision, write_decision
from tuneserve.lifecycle.feedback import Feedback
from tuneserve.lifecycle.feedback_database import FILE
from tuneserve.lifecycle.store import Store
from tuneserve.serving.application import Application
from tuneserve.serving.http.server import listen, open_server
from tuneserve.serving.service import Service
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings
from tuneserve.tasks.classifier import Classifier

ASKED = b'{"texts": ["one", "two"]}'
TEXTS = ["a great film", "film"]
INSTANCES = b'{"instances": ["one", "two"]}'


@pytest.fixture
def store(settings: Settings) -> Store:
    """A store with the versions `first`, the champion, and `second`."""
    store = Store(settings.model_path)
    store.prepare()
    for name in ("first", "second"):
        (store.versions_folder / name).mkdir()
        (store.versions_folder / name / "metadata.json").write_text('{"labels": ["a", "b"], "settings": {}}')
        write_decision(store.version(name), Decision(name, "accepted", "gate", "passed", None))
    store.set_champion(store.version("first"))
    return store


@pytest.fixture
def connect(application: Application, settings: Settings) -> Iterator[Callable[[], Client]]:
    """Connections to a server of echoes, which may answer at once."""
    GO.set()
    with served(application, settings) as port:
        clients: list[Client] = []

        def connect() -> Client:
            clients.append(Client(port))
            return clients[-1]

        wait_until(lambda: connect().ask(b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n")[0] == 200)
        yield connect
        GO.set()
        for client in clients:
            client.close()


@pytest.fixture
def application(store: Store, settings: Settings) -> Application:
    return Application(settings, threads=1, task=ECHO, adapters=[echo_adapter.routes])


@pytest.fixture
def slot(application: Application) -> Slot:
    return application.slot


@contextmanager
def served(application: Application, settings: Settings) -> Iterator[int]:
    with listen("127.0.0.1", 0) as listener:
        server = open_server(application, settings)
        thread = threading.Thread(target=server.run, args=[[listener]])
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()
            application.close()


def ask(client: Client, path: str, body: bytes) -> Any:
    status, _, answer = client.ask(write(body, "Content-Type: application/json", path=path))
    assert status == 200, answer
    return json.loads(answer)


@pytest.mark.parametrize("module", [echo_task, echo_adapter])
def test_it_is_written_in_less_than_forty_lines(module: Any) -> None:
    assert len(Path(module.__file__).read_text().splitlines()) < 40


def test_echoes_are_asked_for_over_http_one_by_one_in_batches_and_by_the_platform(
    connect: Callable[[], Client],
) -> None:
    client = connect()
    answer = ask(client, "/echo", ASKED)
    assert (answer["text"], answer["model_version"]) == ("one", "first")
    assert [one["text"] for one in ask(client, "/echo/batch/", ASKED)] == ["one", "two"]
    assert ask(client, "/invocations", INSTANCES) == {"predictions": ["one", "two"]}
    status, _, body = client.ask(write(b'{"texts": 5}', path="/echo"))
    assert (status, json.loads(body)["detail"][0]["loc"]) == (422, ["body", "texts"])
    assert client.ask(write(path="/inference"))[0] == 404
    metrics = client.ask(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")[2].decode()
    assert 'tuneserve_requests_total{route="/echo/batch",status="200"} 1.0' in metrics
    assert 'tuneserve_requests_total{route="/invocations",status="200"} 1.0' in metrics
    assert "tuneserve_texts_total 5.0" in metrics


@pytest.mark.parametrize("path", ["/echo", "/echo/batch", "/invocations"])
def test_a_model_without_room_refuses_before_the_body_is_sent(
    connect: Callable[[], Client], slot: Any, path: str
) -> None:
    waiting, late = [connect() for _ in range(ROOM)], connect()
    GO.clear()
    for client in waiting:
        client.send(write(ASKED, path="/echo"))
    wait_until(lambda: slot.model().waiting == ROOM)
    late.send(f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 9999\r\n\r\n".encode())
    status, headers, _ = late.read()
    assert (status, headers["retry-after"]) == (429, "7")
    late = connect()
    assert late.ask(b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n")[0] == 200
    GO.set()
    assert [client.read()[0] for client in waiting] == [200] * ROOM
    assert ask(connect(), "/echo", ASKED)["text"] == "one"


def test_a_swap_loses_no_request_and_the_old_model_answers_what_it_was_asked(
    connect: Callable[[], Client], store: Store
) -> None:
    asked, follows = connect(), connect()
    GO.clear()
    asked.send(write(ASKED, path="/echo/batch"))
    store.set_champion(store.version("second"))
    wait_until(lambda: b"second" in follows.ask(b"GET /model HTTP/1.1\r\nHost: a\r\n\r\n")[2])
    assert not asked.is_answered()
    GO.set()
    assert {one["model_version"] for one in json.loads(asked.read()[2])} == {"first"}
    assert ask(asked, "/echo/batch", ASKED)[0]["model_version"] == "second"


def test_whole_files_are_answered_by_the_service_too(store: Store) -> None:
    GO.set()
    slot = Slot()
    slot.take(EchoModel(store.version("first")))
    assert [one.text for one in Service.of(slot).predict(["a", "b"])] == ["a", "b"]  # type: ignore[union-attr]


def test_an_adapters_answers_are_remembered_shadowed_and_watched_for_drift(
    settings: Settings, classifier: Classifier, version: Version, tmp_path: Path
) -> None:
    slot, shadowed = Slot(), []
    slot.take(classifier)
    slot.shadow = lambda inputs, answers, seconds: shadowed.append(list(inputs))
    feedback = Feedback(tmp_path / FILE, max_rows=10, keep_texts=False)
    feedback.start()
    app = app_of(settings, slot, feedback=feedback, adapters=[echo_adapter.routes])
    with TestClient(app) as client:
        answer = client.post("/invocations", json={"instances": TEXTS}, headers={"X-Request-Id": "x"})
        assert answer.json() == {"predictions": ["good", "good"]}
        assert client.post("/feedback", json={"request_id": "x", "index": 1, "label": "bad"}).json() == {"stored": True}
        assert client.get("/drift").json()["texts"] == 2
    assert shadowed == [TEXTS]
    feedback.close()
