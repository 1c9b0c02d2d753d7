"""Answers that abstain, over HTTP; and what labels say of the promise."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from wire import app_of

from tuneserve.artifact import Version
from tuneserve.lifecycle.feedback import Feedback
from tuneserve.lifecycle.feedback_database import FILE, open_database
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings
from tuneserve.tasks.classifier import Classifier, Prediction

SURE, UNSURE = "three three three three one but very two", "a"

Open = Callable[..., TestClient]


def confidence(classifier: Classifier, text: str) -> float:
    [found] = classifier.predict([text])
    assert isinstance(found, Prediction)
    return found.verdict[1]


@pytest.fixture
def threshold(classifier: Classifier) -> float:
    """As sure as the surer of the two texts is."""
    assert confidence(classifier, UNSURE) < confidence(classifier, SURE)
    return confidence(classifier, SURE)


def promising(version: Version, threshold: float | None) -> Version:
    said = {"max_error": 0.1, "threshold": threshold, "reason": None if threshold else "there are 9 validation texts"}
    return Version(version.folder, {**version.metadata, "abstention": {**said, "test": {"answered_share": 0.5}}})


@pytest.fixture
def open_client(version: Version, make_engine: Any, settings: Settings, tmp_path: Path) -> Iterator[Open]:
    """A server of a version that promises at most a tenth of wrong answers from this confidence on, or of none."""
    with ExitStack() as ends:

        def open_(threshold: float | None, *, keyed: bool = True) -> TestClient:
            slot = Slot()
            slot.take(Classifier(promising(version, threshold), make_engine(lambda engine: None)))
            ends.callback(slot.close)
            feedback = Feedback(tmp_path / FILE, max_rows=1000, keep_texts=False, keyed=keyed)
            return TestClient(app_of(settings, slot, feedback=feedback))

        yield open_


def figures(client: TestClient) -> dict[str, float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {sample.name: sample.value for one in families for sample in one.samples}


def label(client: TestClient, text: str, *, right: int = 0, wrong: int = 0) -> None:
    """Answers to a text, of which people call so many right, then so many wrong."""
    for number in range(right + wrong):
        answer = client.post("/inference", json={"text": text})
        [other] = {"bad", "good"} - {answer.json()["label"]}
        said = answer.json()["label"] if number < right else other
        sent = {"request_id": answer.headers["X-Request-Id"], "label": said}
        assert client.post("/feedback", json=sent).json() == {"stored": True}


def test_an_answer_below_the_threshold_abstains_and_keeps_its_label(open_client: Open, threshold: float) -> None:
    client = open_client(threshold)
    answers = client.post("/inference/batch", json={"texts": [SURE, UNSURE, ""]}).json()["predictions"]
    assert [one.get("abstain") for one in answers] == [False, True, None]
    assert [one["label"] for one in answers[:2]] == ["good", "good"]
    assert client.post("/inference", json={"text": UNSURE}).json()["abstain"] is True
    found = figures(client)
    assert (found["tuneserve_texts_total"], found["tuneserve_abstained_texts_total"]) == (3, 2)
    assert client.get("/model").json()["abstention"]["threshold"] == threshold


def test_a_version_that_promises_nothing_has_no_word_of_it(slot: Slot, settings: Settings) -> None:
    with TestClient(app_of(settings, slot)) as client:
        assert "abstain" not in client.post("/inference", json={"text": UNSURE}).json()
        assert figures(client)["tuneserve_abstained_texts_total"] == 0
        assert math.isnan(figures(client)["tuneserve_promise_kept"])


def test_where_nothing_could_be_promised_every_answer_abstains_and_the_log_says_why(
    open_client: Open, caplog: pytest.LogCaptureFixture
) -> None:
    client = open_client(None)
    assert "abstains: MAX_ERROR=0.1 cannot be promised (there are 9 validation texts)" in caplog.text
    assert client.post("/inference", json={"text": SURE}).json()["abstain"] is True
    assert "promise" not in client.get("/feedback").json()


def test_labels_break_the_promise_when_chance_no_longer_explains_them(
    open_client: Open, threshold: float, caplog: pytest.LogCaptureFixture
) -> None:
    client = open_client(threshold)
    assert client.get("/feedback").json()["promise"]["kept"] is None
    assert math.isnan(figures(client)["tuneserve_promise_kept"])
    label(client, UNSURE, wrong=5)  # they abstained, and nothing was promised of them
    assert client.get("/feedback").json()["promise"]["kept"] is None
    label(client, SURE, right=17, wrong=3)
    promise = client.get("/feedback").json()["promise"]
    assert (promise["count"], promise["wrong"], promise["error"], promise["kept"]) == (20, 3, 0.15, True)
    assert promise["p_value"] > 0.05
    assert figures(client)["tuneserve_promise_kept"] == 1
    assert "does not keep" not in caplog.text
    label(client, SURE, wrong=6)
    assert "does not keep MAX_ERROR=0.1: of the last 25 labelled" in caplog.text  # as soon as that one was stored
    promise = client.get("/feedback").json()["promise"]
    assert (promise["count"], promise["wrong"], promise["kept"]) == (26, 9, False)
    assert figures(client)["tuneserve_promise_kept"] == 0
    assert caplog.text.count("does not keep") == 1


def test_only_labels_whose_answers_are_still_known_are_evidence(tmp_path: Path) -> None:
    feedback = Feedback(tmp_path / FILE, max_rows=9, keep_texts=False, keyed=True)
    for number in range(3):
        feedback.remember(f"r{number}", 0, "v1", "bad", 0.9, "text")
        assert feedback.label_answer(f"r{number}", 0, "good")  # before and after the answer is written
        found = feedback.kept("v1", threshold=0.9, max_error=0.1)
        assert (found.count, found.wrong) == (number + 1, number + 1)
    feedback._write()
    with open_database(tmp_path / FILE) as database:
        database.execute("DELETE FROM answers WHERE request = 'r0'")
    assert feedback.kept("v1", threshold=0.9, max_error=0.1).count == 2
    assert feedback.kept("v1", threshold=0.91, max_error=0.1).kept is None
    assert feedback.kept("v2", threshold=0.5, max_error=0.1).kept is None


def test_anonymous_labels_are_no_evidence_where_there_is_a_key(open_client: Open, threshold: float) -> None:
    stranger = open_client(threshold, keyed=False)
    label(stranger, SURE, wrong=9)
    assert stranger.get("/feedback").json()["promise"]["kept"] is False
    assert open_client(threshold).get("/feedback").json()["promise"]["kept"] is None


def test_a_broken_database_takes_no_answer_and_no_metric_away(
    open_client: Open, threshold: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = open_client(threshold)
    (tmp_path / FILE).write_bytes(b"this is no database, " * 500)
    caplog.set_level(logging.ERROR)
    assert client.post("/inference", json={"text": SURE}).json()["abstain"] is False
    assert client.get("/metrics").status_code == 200
