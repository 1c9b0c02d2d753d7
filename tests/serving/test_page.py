"""The page's files and events, and what it changes, over HTTP; how it looks and behaves is in tests/platforms."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from outside.echo_task import ECHO, GO
from pydantic import SecretStr
from wire import LIVEZ, Client, app_of, counts, served, wait_until, write

from tuneserve.files import write_json
from tuneserve.lifecycle.decision import Decision, read_decision, write_decision
from tuneserve.lifecycle.evidence import Evidence, write_evidence
from tuneserve.lifecycle.feedback import Feedback
from tuneserve.lifecycle.feedback_database import FILE
from tuneserve.lifecycle.store import Store
from tuneserve.lifecycle.trainer import Trainer
from tuneserve.serving import labelling
from tuneserve.serving.application import Application
from tuneserve.serving.http import events, page
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings
from tuneserve.tasks import catalog

HTML = {"Accept": "text/html"}
KEY = {"Authorization": "Bearer k"}
EVENTS = b"GET /events HTTP/1.1\r\nHost: a\r\n%b\r\n"
SHOWN_KEY = b"Authorization: Bearer k\r\n"


class Stream:
    """A connection on which the server's events come."""

    def __init__(self, port: int, headers: bytes = b"") -> None:
        self.client = Client(port)
        self.client.send(EVENTS % headers)
        self._lines = self.client.socket.makefile("rb")
        self.head = b"".join(iter(self._lines.readline, b"\r\n")).decode()

    def read(self) -> dict[str, Any]:
        """The next event; what a chunk begins and ends with is no part of one."""
        while not (line := self._lines.readline()).startswith(b"data:"):
            assert line, "the stream has ended"
        content: dict[str, Any] = json.loads(line.removeprefix(b"data:"))
        return content

    def rest(self) -> bytes:
        """Whatever still comes."""
        return self._lines.read()

    def close(self) -> None:
        self._lines.close()
        self.client.close()


@contextmanager
def opened(port: int, headers: bytes = b"") -> Iterator[Stream]:
    stream = Stream(port, headers)
    yield stream
    stream.close()


def changed(settings: Settings, **values: Any) -> Settings:
    return settings.model_copy(update=values)


def keyed(settings: Settings, **values: Any) -> Settings:
    return changed(settings, api_key=SecretStr("k"), **values)


def test_the_page_names_its_own_files_alone_and_they_are_small(settings: Settings, slot: Slot) -> None:
    with TestClient(app_of(keyed(settings), slot)) as client:  # what shows the page needs no key
        answer = client.get("/", headers=HTML)
        assert answer.headers["Content-Type"].startswith("text/html")
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert not re.search(r"<script(?![^>]* src=)|<style| style=| on[a-z]+=", answer.text)  # the policy forbids them
        named = set(re.findall(r'(?:src|href)="/(page/[^"]+)"', answer.text))
        contents = {name: client.get(f"/{name}") for name in (f"page/{one}" for one in page.FILES)}
        imported = {one for content in contents.values() for one in re.findall(r'from "\./(.+?)"', content.text)}
        assert named | {f"page/{one}" for one in imported} == set(contents), (
            "a file that nothing names, or one that is not there"
        )
        assert {one.status_code for one in contents.values()} == {200}
        assert not any("://" in re.sub("http://www.w3.org/2000/svg", "", one.text) for one in contents.values())
        assert len(answer.content) + sum(len(one.content) for one in contents.values()) < 150_000
        assert client.get("/page/else.js", headers=KEY).status_code == 404
        assert client.get("/page/../page.js", headers=KEY).status_code == 404
    assert {path.name for path in page.FOLDER.iterdir() if path.suffix != ".py"} == {"index.html", *page.FILES}


def test_a_file_is_sent_again_only_if_it_has_changed(settings: Settings, slot: Slot) -> None:
    with TestClient(app_of(settings, slot)) as client:
        first = client.get("/page/page.js")
        assert (first.headers["Cache-Control"], first.headers["Content-Type"]) == (
            "no-cache",
            "text/javascript; charset=utf-8",
        )
        again = client.get("/page/page.js", headers={"If-None-Match": first.headers["ETag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert client.get("/page/page.js", headers={"If-None-Match": '"other"'}).status_code == 200


def test_the_page_finds_its_files_behind_a_path(settings: Settings, slot: Slot) -> None:
    with TestClient(app_of(settings, slot), root_path='/models/"one"') as client:
        text = client.get("/", headers=HTML).text
    assert 'src="/models/&quot;one&quot;/page/page.js"' in text
    assert "{root}" not in text


def test_events_tell_of_what_has_changed_and_of_nothing_else(
    settings: Settings, slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "EVERY_S", 0.05)
    monkeypatch.setattr(events, "SILENCE_S", 0.15)
    with served(settings, slot) as port, opened(port) as stream:
        assert "content-type: text/event-stream" in stream.head
        first = stream.read()
        assert (first["phase"], first["version"], first["shown"]) == ("ready", slot.version_id, True)
        assert (first["task"], first["trains"], first["keyed"]) == ("text-classification", False, False)
        assert first["figures"]["answered"] == 0
        lines = [stream._lines.readline().strip() for _ in range(8)]
        assert b":" in lines  # a comment, and no event, while nothing happens
        assert not any(line.startswith(b"data:") for line in lines)
        client = Client(port)
        assert (client.ask(write())[0], client.ask(write(b"{}"))[0]) == (200, 422)
        client.close()
        while (figures := stream.read()["figures"])["faulty"] == 0:
            pass
        assert (figures["answered"], figures["refused"], figures["failed"]) == (1, 0, 0)
        assert figures["seconds"][-2:] == [[10.0, 2], [None, 2]]


def test_a_stream_ends_with_the_server_and_with_its_client(
    settings: Settings, slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "EVERY_S", 0.05)
    # Long enough that only a stream which ends by itself has a last chunk.
    with served(settings, slot, timeout_graceful_shutdown=60) as port:
        leaving = Stream(port)
        leaving.read()
        leaving.close()
        wait_until(lambda: counts(slot).get(("/events", "200")) == 1)
        times = [one for one in slot.metrics.seconds.collect()[0].samples if one.labels["route"] == "/events"]
        # How long a page is open says nothing of how long answers take.
        assert sum(one.value for one in times if one.name.endswith("_count")) == 0
        staying = Stream(port)
        staying.read()
    assert staying.rest().endswith(b"0\r\n\r\n")
    staying.close()


def test_so_many_pages_and_no_more_may_follow(settings: Settings, slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MOST_STREAMS", 2)
    monkeypatch.setattr(events, "EVERY_S", 0.05)
    with served(settings, slot) as port:
        with opened(port) as one, opened(port) as other:
            one.read(), other.read()
            with opened(port) as third:
                assert third.head.startswith("HTTP/1.1 429")
                assert "retry-after: 10" in third.head

        def has_room() -> bool:
            with opened(port) as later:
                return later.head.startswith("HTTP/1.1 200")

        wait_until(has_room)


def test_a_head_is_answered_at_once_and_takes_nobodys_place(
    settings: Settings, slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MOST_STREAMS", 1)
    with served(settings, slot) as port:
        client = Client(port)
        for _ in range(3):
            client.send(b"HEAD /events HTTP/1.1\r\nHost: a\r\n\r\n")
            first, *lines = iter(client._file.readline, b"\r\n")
            assert first.startswith(b"HTTP/1.1 200")
            assert any(b"event-stream" in line for line in lines)
        assert client.ask(LIVEZ)[0] == 200
        client.close()
        with opened(port) as stream:
            assert stream.head.startswith("HTTP/1.1 200")


def test_whoever_has_the_key_finds_room_beside_all_others(
    settings: Settings, slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MOST_STREAMS", 4)
    with served(keyed(settings), slot) as port:
        clients = [Client(port) for _ in range(20)]  # all at once
        for client in clients:
            client.send(EVENTS % b"")
        heads = [client._file.readline() for client in clients]
        assert sum(head.startswith(b"HTTP/1.1 200") for head in heads) == 4
        with opened(port, SHOWN_KEY) as stream:
            assert stream.read()["shown"] is True
        for client in clients:
            client.close()


def test_all_pages_together_look_at_the_server_once(
    settings: Settings, slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    look = events.Watch._look
    monkeypatch.setattr(events, "EVERY_S", 600)
    monkeypatch.setattr(events.Watch, "_look", lambda watch: looks.append(1) or look(watch))
    with served(settings, slot) as port:
        streams = [Stream(port) for _ in range(10)]
        for stream in streams:
            stream.read()
            stream.close()
    assert looks == [1]


def test_without_the_key_events_say_no_more_than_readyz(settings: Settings, slot: Slot, tmp_path: Path) -> None:
    trainer = Trainer([sys.executable, "-c", ""], Store(tmp_path), serves=lambda: True)
    with served(keyed(settings), slot, trainer=trainer) as port:
        for headers in (b"", b"Authorization: Bearer wrong\r\n"):
            with opened(port, headers) as stream:
                seen = stream.read()
                assert seen["shown"] is False
                assert set(seen) == {"phase", "reason", "version", "task", "trains", "keyed", "training", "shown"}
        with opened(port, SHOWN_KEY) as stream:
            assert {"job", "course", "figures"} < set(stream.read())
    with served(keyed(settings, api_key_guards="everything"), slot) as port, opened(port) as stream:
        assert stream.head.startswith("HTTP/1.1 401")


def test_events_show_a_training_with_its_curves_and_findings(
    settings: Settings, slot: Slot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "EVERY_S", 0.05)
    program = """
import sys, time
from pathlib import Path
from tuneserve.lifecycle import status
status.EVERY_S = 0
root = Path(sys.argv[1])
with status.Status(root / "training.json") as said:
    said.found(["train: 12 texts", "2 empty texts left out"])
    said.training(steps=4, epochs=2)
    said.step(1, {"loss": 0.5})
    said.step(2, {"validation_loss": 0.4})
    said.step(2, {"loss": 0.25})
    while not (root / "go").exists():
        time.sleep(0.01)
    said.phase("testing")
    raise SystemExit(3)
"""
    store = Store(tmp_path)
    store.prepare()
    environ = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    trainer = Trainer([sys.executable, "-c", program, str(tmp_path)], store, serves=lambda: True, environ=environ)
    with served(settings, slot, trainer=trainer) as port, opened(port) as stream:
        assert stream.read()["job"] is None
        trainer.start("the test")
        while not (seen := stream.read())["course"].get("validation_losses"):
            pass
        assert seen["training"] | {"eta_s": 0} == {
            "phase": "training", "epoch": 1, "epochs": 2, "progress": 0.5, "loss": 0.25, "eta_s": 0,
        }  # fmt: skip
        assert seen["course"] == {
            "steps": 4,
            "losses": [[1, 0.5], [2, 0.25]],
            "validation_losses": [[2, 0.4]],
            "findings": ["train: 12 texts", "2 empty texts left out"],
        }
        assert (seen["job"]["state"], seen["job"]["why"]) == ("running", "the test")
        (tmp_path / "go").touch()
        while (seen := stream.read())["job"]["state"] == "running":
            pass
        assert (seen["job"]["state"], seen["training"]) == ("failed", {})
        assert seen["course"]["losses"] == [[1, 0.5], [2, 0.25]]  # the curve of the last training stays
    trainer.close()


@pytest.fixture
def store(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store with the versions `one`, `two` and `three`; `two` is the champion, after `one`."""
    monkeypatch.setitem(catalog.TASKS, ECHO.name, ECHO)
    store = Store(settings.model_path)
    store.prepare()
    for name, accuracy in (("one", 0.75), ("two", 0.875), ("three", 0.5)):
        (store.versions_folder / name).mkdir()
        metadata = {
            "labels": [], "task": "echo", "created_at": "2026-01-02T03:04:05+00:00",
            "metrics": {"test": {"accuracy": accuracy}},
            "data": {"counts": {"train": {"bad": 5, "good": 7}}}, "settings": {"lr": 3e-5},
        }  # fmt: skip
        write_json(store.versions_folder / name / "metadata.json", metadata)
    store.promote("one")
    store.promote("two")
    refused = Decision("three", "refused", "gate", "it is worse", "two")
    write_decision(store.version("three"), refused)
    GO.set()
    yield store
    GO.clear()


@pytest.fixture
def start(settings: Settings, store: Store) -> Iterator[Callable[..., TestClient]]:
    ends: list[Any] = []

    def begin(**values: Any) -> TestClient:
        application = Application(changed(settings, **values), threads=1)
        client = TestClient(application.asgi)
        ends.append(client)
        client.__enter__()
        wait_until(lambda: client.get("/readyz").status_code == 200)
        return client

    yield begin
    for client in ends:
        client.__exit__(None, None, None)


def test_versions_are_listed_with_their_figures_and_decisions(start: Callable[..., TestClient]) -> None:
    client = start()
    found = client.get("/versions").json()
    assert found["answers"] == "two"
    assert [one["id"] for one in found["versions"]] == ["two", "three", "one"]  # by id, the newest first
    roles = {one["id"]: one["role"] for one in found["versions"]}
    assert roles == {"one": "previous", "two": "champion", "three": None}
    three = next(one for one in found["versions"] if one["id"] == "three")
    assert (three["test"], three["train_texts"]) == ({"accuracy": 0.5}, 12)
    assert (three["decision"]["verdict"], three["decision"]["sentence"]) == ("refused", "it is worse")
    assert client.get("/versions/one").json()["metadata"]["settings"] == {"lr": 3e-5}
    for name in ("four", "%2e%2e%2f", ".hidden", "x" * 300):
        assert client.get(f"/versions/{name}").status_code == 404


def test_what_answers_is_changed_by_the_key_alone(start: Callable[..., TestClient], store: Store) -> None:
    client = start()
    for path in ("/promote", "/rollback"):
        answer = client.post(path, json={"version": "one"})
        assert (answer.status_code, "API_KEY" in answer.json()["detail"]) == (403, True)
    assert store.champion_id() == "two"


def test_a_version_is_promoted_and_rolled_back_over_http(start: Callable[..., TestClient], store: Store) -> None:
    client = start(api_key=SecretStr("k"))
    assert client.post("/promote", json={"version": "three"}).status_code == 401
    client.headers.update(KEY)
    assert client.post("/promote", json={"version": "four"}).status_code == 404
    assert client.post("/promote", json={}).status_code == 422
    assert client.post("/promote", json={"version": "three"}).json() == {"champion": "three", "withdrawn": None}
    wait_until(lambda: client.get("/versions").json()["answers"] == "three")
    stale = client.post("/rollback", json={"version": "two"})  # a page that has not seen the promotion
    assert (stale.status_code, store.champion_id()) == (409, "three")
    assert client.post("/rollback", json={"version": "three"}).json() == {"champion": "two", "withdrawn": "three"}
    twice = client.post("/promote", json={"version": "two"})
    assert (twice.status_code, "already" in twice.json()["detail"]) == (409, True)
    again = client.post("/rollback", json={"version": "three"})  # the same click, sent twice
    assert (again.status_code, store.champion_id()) == (409, "two")
    wait_until(lambda: client.get("/versions").json()["answers"] == "two")
    decision = read_decision(store.version("three"))
    assert decision is not None
    assert decision.withdrawn_at is not None
    write_json(store.versions_folder / "three" / "metadata.json", {"labels": [], "task": "summarization"})
    other = client.post("/promote", json={"version": "three"})  # this server has no routes for it
    assert (other.status_code, "summarization" in other.json()["detail"]) == (409, True)
    (store.versions_folder / "one" / "metadata.json").write_text(
        json.dumps({"labels": [], "task": "echo", "sha256": {"gone": "0"}})
    )
    damaged = client.post("/promote", json={"version": "one"})
    assert (damaged.status_code, store.champion_id()) == (409, "two")


def test_examples_are_short_texts_of_the_test_of_each_label_in_turn(
    start: Callable[..., TestClient], store: Store
) -> None:
    texts = [
        "a bad one, the first",
        "a bad one, the second",
        "short",
        "x" * 300,
        "a good one, at last",
        "somebody else’s text",
    ]
    evidence = Evidence(texts, ["bad", "bad", "bad", "bad", "good", "good"], own=5)
    write_evidence(store.evidence_folder / "two", evidence, [])
    client = start(api_key=SecretStr("k"))
    assert client.get("/examples").status_code == 401  # they are the owner's
    client.headers.update(KEY)
    wanted = ["a bad one, the first", "a good one, at last", "a bad one, the second"]
    assert client.get("/examples").json() == {"texts": wanted}
    (store.evidence_folder / "two" / "examples.json").write_text('{"no": "list"}')
    assert client.get("/examples").json() == {"texts": []}


@pytest.fixture
def feedback(tmp_path: Path) -> Iterator[Feedback]:
    feedback = Feedback(tmp_path / FILE, max_rows=100, keep_texts=True, keyed=True)
    feedback.start()
    yield feedback
    feedback.close()


def answered(client: TestClient, *texts: str) -> None:
    assert client.post("/inference/batch", json={"texts": list(texts)}).status_code == 200


def test_texts_to_label_are_those_without_a_label(
    settings: Settings, slot: Slot, feedback: Feedback, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TestClient(app_of(keyed(settings), slot, feedback=feedback), headers=KEY) as client:
        assert client.get("/label/next").json() == {"texts": [], "unlabelled": 0}
        answered(client, "a great film", "a film", "a film", "a dull film")
        wait_until(lambda: len(feedback.unlabelled(9)) == 3)
        found = client.get("/label/next?count=2").json()
        assert (len(found["texts"]), found["unlabelled"]) == (2, 3)
        [first, _] = found["texts"]
        whole = client.post("/inference", json={"text": first["text"]}).json()
        assert first["scores"] == whole["scores"]
        assert list(first["scores"]) == sorted(first["scores"], key=lambda label: -first["scores"][label])
        before = counts(slot)
        assert client.post("/feedback", json={"text": first["text"], "label": "good"}).json() == {"stored": True}
        left = client.get("/label/next").json()
        assert {one["text"] for one in left["texts"]} == {"a great film", "a film", "a dull film"} - {first["text"]}
        assert counts(slot)[("/inference", "200")] == before[("/inference", "200")]
        assert slot.metrics.texts._value.get() == 5  # looking through them counts as no answer
        for count in ("0", "51", "x"):
            assert client.get(f"/label/next?count={count}").status_code == 422


def test_unsure_and_common_texts_come_first_and_no_two_that_say_the_same(
    settings: Settings, slot: Slot, feedback: Feedback
) -> None:
    with TestClient(app_of(keyed(settings), slot, feedback=feedback), headers=KEY) as client:
        answered(client, "a film", "a film.", "film a", "good good good good good good good")
        wait_until(lambda: len(feedback.unlabelled(9)) == 4)
        first, second, *_ = client.get("/label/next?count=4").json()["texts"]
        assert first["text"] in ("a film", "a film.", "film a")
        assert "unsure" in first["why"]
        assert second["text"] == "good good good good good good good"  # and not the same in other words
        skipped = client.get("/label/next?count=1&skip=1").json()["texts"]
        assert [one["text"] for one in skipped] == [second["text"]]


def test_texts_are_shown_to_nobody_without_a_key_and_only_if_they_are_kept(
    settings: Settings, slot: Slot, feedback: Feedback, tmp_path: Path
) -> None:
    with TestClient(app_of(settings, slot, feedback=feedback)) as client:
        assert client.get("/label/next").status_code == 403
    with TestClient(app_of(keyed(settings), slot, feedback=feedback)) as client:
        assert client.get("/label/next").status_code == 401
    without = Feedback(tmp_path / "other.sqlite", max_rows=100, keep_texts=False, keyed=True)
    with TestClient(app_of(keyed(settings), slot, feedback=without), headers=KEY) as client:
        answer = client.get("/label/next")
        assert (answer.status_code, "KEEP_TEXTS=1" in answer.json()["detail"]) == (409, True)
    without.close()


def test_labelling_looks_at_a_bounded_number_of_texts(
    settings: Settings, slot: Slot, feedback: Feedback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labelling, "MOST_CANDIDATES", 3)
    with TestClient(app_of(keyed(settings), slot, feedback=feedback), headers=KEY) as client:
        answered(client, *(f"film {number}" for number in range(6)))
        wait_until(lambda: len(feedback.unlabelled(9)) == 6)
        assert client.get("/label/next").json()["unlabelled"] == 3
