import csv
import io
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from wire import app_of

from tuneserve.artifact import Version
from tuneserve.lifecycle.drift import Answers, Window, write_reference
from tuneserve.serving import monitor as monitor_module
from tuneserve.serving.monitor import Monitor
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings
from tuneserve.tasks.classifier import Classifier, Prediction

TEXTS = ["a great film", "it was very good", "the food was cold and awful", "not bad"]
STRANGE = "zzz zzz zzz zzz zzz zzz"


def predictions(classifier: Classifier, texts: list[str]) -> list[Prediction]:
    return [one for one in classifier.predict(texts) if isinstance(one, Prediction)]


@pytest.fixture
def referring(version: Version, tmp_path: Path, engine: Any, classifier: Classifier) -> Classifier:
    """A classifier whose version holds what it answers to the texts above."""
    folder = tmp_path / version.id
    folder.mkdir()
    for path in version.folder.iterdir():
        (folder / path.name).symlink_to(path)
    write_reference(folder, answered(classifier, TEXTS * 50), seed=0)
    return Classifier(Version(folder, version.metadata), engine)


def answered(classifier: Classifier, texts: list[str]) -> Answers:
    monitor = Monitor(classifier, Window(max_texts=len(texts)))
    for prediction in predictions(classifier, texts):
        monitor.observe(prediction.observation)
    return monitor.window.read()[1]


def test_what_is_noted_of_a_text_is_what_was_answered(classifier: Classifier) -> None:
    found = answered(classifier, ["a great film", "a zzz film", "film " * 30])
    assert found.tokens.tolist() == [5, 5, 16]
    assert found.unknown.tolist() == [0, 1, 0]
    assert found.truncated.tolist() == [False, False, True]
    wanted = predictions(classifier, ["a great film", "a zzz film", "film " * 30])
    assert [classifier.labels[label_id] for label_id in found.label_ids] == [one.label for one in wanted]
    assert found.confidences.tolist() == [max(one.scores.values()) for one in wanted]


def test_a_text_read_in_windows_counts_as_one_that_is_cut(version: Version, engine: Any) -> None:
    found = answered(Classifier(version, engine, long_text="window"), ["film " * 30])
    assert (found.tokens.tolist(), found.truncated.tolist()) == ([16], [True])


def test_the_same_texts_are_no_drift_and_strange_ones_are(referring: Classifier) -> None:
    monitor = Monitor(referring, Window())
    for prediction in predictions(referring, TEXTS * 20):
        monitor.observe(prediction.observation)
    assert not monitor.report().drifted
    monitor = Monitor(referring, Window())
    for prediction in predictions(referring, [STRANGE] * 80):
        monitor.observe(prediction.observation)
    report = monitor.report()
    assert report.drifted
    assert {one.name for one in report.figures if one.drifted} >= {"unknown", "length"}


def test_a_server_that_refuses_long_texts_is_not_blamed_for_their_absence(referring: Classifier, engine: Any) -> None:
    write_reference(referring.version.folder, answered(referring, [*TEXTS * 25, *["film " * 30] * 100]), seed=0)
    for long_text, drifted in (("truncate", True), ("error", False)):
        monitor = Monitor(Classifier(referring.version, engine, long_text=long_text), Window())
        for prediction in predictions(referring, TEXTS * 25):
            monitor.observe(prediction.observation)
        assert monitor.report().drifted == drifted


def test_a_report_is_given_again_for_a_while(referring: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = Monitor(referring, Window())
    first = monitor.report()
    for prediction in predictions(referring, TEXTS):
        monitor.observe(prediction.observation)
    assert monitor.report() is first
    now = time.monotonic() + monitor_module.FRESH_S
    monkeypatch.setattr(monitor_module.time, "monotonic", lambda: now)
    assert monitor.report().texts == len(TEXTS)


def test_a_damaged_reference_does_not_keep_a_model_from_answering(
    referring: Classifier, engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (referring.version.folder / "drift.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        damaged = Classifier(referring.version, engine)
    assert "without a reference" in Monitor(damaged, Window()).report().sentence
    assert "drift cannot be judged" in caplog.text


@pytest.fixture
def serve(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[TestClient, Slot]]:
    monkeypatch.setattr(monitor_module, "FRESH_S", 0.0)

    def make(classifier: Classifier | None, **changed: Any) -> tuple[TestClient, Slot]:
        slot = Slot(new_window=lambda: Window(max_texts=80))
        if classifier is not None:
            slot.take(classifier)
        app = app_of(settings.model_validate(settings.model_dump() | changed), slot)
        return TestClient(app, raise_server_exceptions=False), slot

    return make


def gauges(client: TestClient) -> dict[str, float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        f"{sample.name}/{sample.labels.get('figure', '')}": sample.value
        for family in families
        for sample in family.samples
        if family.name.startswith("tuneserve_drift")
    }


def test_the_api_and_prometheus_tell_of_drift(serve: Any, referring: Classifier) -> None:
    client, _ = serve(referring)
    client.post("/inference/batch", json={"texts": TEXTS * 20})
    body = client.get("/drift").json()
    assert (body["drifted"], body["texts"], body["max_texts"]) == (False, 80, 80)
    assert body["model_version"] == referring.version.id
    assert [one["name"] for one in body["figures"]] == ["labels", "confidence", "length", "unknown", "truncated"]
    assert all(one["sentence"] and one["threshold"] > 0 for one in body["figures"])
    assert gauges(client)["tuneserve_drift_detected/"] == 0
    client.post("/inference/batch", json={"texts": [STRANGE] * 80})
    body = client.get("/drift").json()
    assert body["drifted"]
    found = gauges(client)
    assert found["tuneserve_drift_detected/"] == 1
    for one in body["figures"]:
        assert found[f"tuneserve_drift/{one['name']}"] == one["value"]
        assert found[f"tuneserve_drift_threshold/{one['name']}"] == one["threshold"]
        assert found[f"tuneserve_drift_p_value/{one['name']}"] == one["p_value"]


def test_another_version_starts_an_empty_window(serve: Any, referring: Classifier, classifier: Classifier) -> None:
    client, slot = serve(referring)
    client.post("/inference/batch", json={"texts": [STRANGE] * 80})
    assert "tuneserve_drift/unknown" in gauges(client)
    slot.take(classifier)
    assert client.get("/drift").json()["texts"] == 0
    assert gauges(client) == {"tuneserve_drift_detected/": 0}


def test_the_window_and_its_reference_are_tables_of_the_same_columns_without_texts(
    serve: Any, referring: Classifier
) -> None:
    client, _ = serve(referring)
    client.post("/inference/batch", json={"texts": ["a great film", "a zzz film", "film " * 30]})
    answer = client.get("/drift/window")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [list(row) for row in rows] == [
        ["prediction", "confidence", "tokens", "unknown_share", "truncated", "at"]
    ] * 3
    assert [row["unknown_share"] for row in rows] == ["0.0000", "0.2000", "0.0000"]
    assert [row["truncated"] for row in rows] == ["0", "0", "1"]
    assert all(np.datetime64(row["at"].removesuffix("+00:00")) > np.datetime64("2020-01-01") for row in rows)
    assert "film" not in answer.text
    rows = list(csv.DictReader(io.StringIO(client.get("/drift/reference").text)))
    assert (len(rows), list(rows[0])) == (200, ["prediction", "confidence", "tokens", "unknown_share", "truncated"])


@pytest.mark.parametrize("path", ["/drift", "/drift/window", "/drift/reference"])
def test_drift_wants_a_model_and_the_key(serve: Any, classifier: Classifier, path: str) -> None:
    client, _ = serve(None)
    answer = client.get(path)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    client, _ = serve(classifier, api_key="secret")
    assert client.get(path).status_code == 401
    assert client.get(path, headers={"X-API-Key": "secret"}).status_code == 200
