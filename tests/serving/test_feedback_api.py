"""What people say about answers, over HTTP."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from wire import app_of

from tuneserve.artifact import Version
from tuneserve.lifecycle.feedback import Feedback
from tuneserve.lifecycle.feedback_database import FILE, labelled_texts, open_database
from tuneserve.serving import service
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings

Open = Callable[..., TestClient]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(service, "WRITE_EVERY_S", 0.01)
    return tmp_path / FILE


@pytest.fixture
def open_client(settings: Settings, slot: Slot, path: Path) -> Open:

    def open_(*, keep_texts: bool = False, keyed: bool = True, **changed: Any) -> TestClient:
        feedback = Feedback(path, max_rows=100, keep_texts=keep_texts, keyed=keyed)
        app = app_of(settings.model_copy(update=changed), slot, feedback=feedback)
        return TestClient(app, raise_server_exceptions=False)

    return open_


def figures(client: TestClient) -> dict[str, float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {sample.name: sample.value for one in families for sample in one.samples if "feedback" in sample.name}


def test_the_id_of_an_answer_takes_its_label_at_once(open_client: Open, version: Version) -> None:
    client = open_client()
    answer = client.post("/inference", json={"text": "a great film"})
    said = {"request_id": answer.headers["X-Request-Id"], "label": "bad"}
    assert [client.post("/feedback", json=said).json() for _ in range(2)] == [{"stored": True}, {"stored": False}]
    summary = client.get("/feedback").json()
    assert (summary["labels"], summary["labelled_texts"]) == (1, 0)
    accuracy = summary["accuracy"]
    assert (accuracy["version"], accuracy["count"], accuracy["right"]) == (version.id, 1, 0)
    assert accuracy["low"] == 0 < accuracy["high"] < 1


def test_a_text_of_a_batch_is_named_by_its_index(open_client: Open, path: Path) -> None:
    client = open_client(keep_texts=True)
    sent = {"texts": ["a great film", "", "the food was awful"]}
    name = client.post("/inference/batch", json=sent, headers={"X-Request-Id": "mine"}).headers["X-Request-Id"]
    assert client.post("/feedback", json={"request_id": name, "index": 2, "label": "bad"}).status_code == 200
    assert labelled_texts(path, pytest.fail) == [("the food was awful", "bad")]
    for nothing in (1, 3):  # an empty text has no answer
        assert client.post("/feedback", json={"request_id": name, "index": nothing, "label": "bad"}).status_code == 404


def test_a_text_with_its_label_is_kept(open_client: Open, path: Path) -> None:
    client = open_client()
    assert client.post("/feedback", json={"text": "we left", "label": "bad"}).json() == {"stored": True}
    assert labelled_texts(path, pytest.fail) == [("we left", "bad")]
    assert client.get("/feedback").json() == {"labels": 1, "labelled_texts": 1, "kept_apart": 0, "accuracy": None}


def test_without_a_key_a_label_is_kept_apart_and_marked_with_no_address(open_client: Open, path: Path) -> None:
    client = open_client(keyed=False)
    assert client.post("/feedback", json={"text": "we left", "label": "bad"}).json() == {"stored": True}
    assert labelled_texts(path, pytest.fail) == []
    assert client.get("/feedback").json() == {"labels": 1, "labelled_texts": 0, "kept_apart": 1, "accuracy": None}
    with open_database(path) as database:
        [(origin, mark)] = database.execute("SELECT origin, client FROM labels")
    assert (origin, len(mark)) == ("anonymous", 8)
    assert b"testclient" not in path.read_bytes()


def test_an_id_that_another_client_took_is_409_with_the_way_out(open_client: Open) -> None:
    client = open_client(keep_texts=True)
    for text in ("a great film", "the food was awful and cold"):
        client.post("/inference", json={"text": text}, headers={"X-Request-Id": "mine"})
    answer = client.post("/feedback", json={"request_id": "mine", "label": "bad"})
    assert (answer.status_code, "send the text" in answer.json()["detail"]) == (409, True)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"text": "we left", "label": "awful"}, "bad, good"),
        ({"text": " \n", "label": "bad"}, "empty"),
        ({"text": "we left"}, "label"),
        ({"label": "bad"}, "either request_id or text"),
        ({"text": "we left", "request_id": "x", "label": "bad"}, "either request_id or text"),
        ({"request_id": "x" * 129, "label": "bad"}, "request_id"),
        ({"request_id": "x", "index": -1, "label": "bad"}, "index"),
        ({"request_id": "x", "index": 2**63, "label": "bad"}, "index"),
    ],
)
def test_what_cannot_be_meant_is_422_with_words(open_client: Open, body: Any, words: str) -> None:
    answer = open_client().post("/feedback", json=body)
    assert answer.status_code == 422
    assert words in answer.text


def test_an_unknown_request_is_404_with_words(open_client: Open) -> None:
    answer = open_client().post("/feedback", json={"request_id": "nobody's", "label": "bad"})
    assert answer.status_code == 404
    assert "nobody's" in answer.json()["detail"]


def test_a_broken_database_is_503_with_the_reason_and_answers_go_on(open_client: Open, path: Path) -> None:
    path.write_bytes(b"this is no database, " * 500)
    client = open_client()
    answer = client.post("/feedback", json={"text": "we left", "label": "bad"})
    assert answer.status_code == 503
    assert "not a database" in answer.json()["detail"]
    assert client.get("/feedback").status_code == 503
    assert client.get("/metrics").status_code == 200
    assert client.post("/inference", json={"text": "a great film"}).status_code == 200


def test_feedback_wants_the_key_too(open_client: Open) -> None:
    client = open_client(api_key=Settings.from_environ({"API_KEY": "secret"}).api_key)
    said = {"text": "we left", "label": "bad"}
    assert client.post("/feedback", json=said).status_code == client.get("/feedback").status_code == 401
    assert client.post("/feedback", json=said, headers={"X-API-Key": "secret"}).status_code == 200


def test_prometheus_sees_the_accuracy_and_no_figure_before_there_is_one(open_client: Open) -> None:
    client = open_client()
    assert math.isnan(figures(client)["tuneserve_feedback_accuracy"])
    client.post("/inference", json={"text": "a great film"}, headers={"X-Request-Id": "mine"})
    client.post("/feedback", json={"request_id": "mine", "label": "good"})
    assert figures(client) == pytest.approx(
        {
            "tuneserve_feedback_labels": 1,
            "tuneserve_feedback_accuracy": 1,
            "tuneserve_feedback_accuracy_low": 0.2065,
            "tuneserve_feedback_accuracy_high": 1,
            "tuneserve_feedback_dropped": 0,
        },
        abs=1e-4,
    )
