import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from wire import app_of

from tuneserve.artifact import Version
from tuneserve.errors import SettingsError, StoreError
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings
from tuneserve.tasks import classification
from tuneserve.tasks.classifier import Classifier


def filled(classifier: Classifier, **options: Any) -> Slot:
    slot = Slot(**options)
    slot.take(classifier)
    return slot


@pytest.fixture
def client(settings: Settings, slot: Slot) -> Iterator[TestClient]:
    with TestClient(app_of(settings, slot), raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("path", ["/inference", "/inference/"])
def test_one_text_gets_one_answer(client: TestClient, version: Version, path: str) -> None:
    answer = client.post(path, json={"text": "a great film"})
    assert answer.status_code == 200
    body = answer.json()
    assert set(body) == {"label", "scores", "tokens", "truncated", "model_version"}
    assert body["label"] == max(body["scores"], key=body["scores"].get) == "good"
    assert (body["tokens"], body["truncated"], body["model_version"]) == (5, False, version.id)


def test_a_batch_is_answered_in_order(client: TestClient) -> None:
    texts = ["film " * (1 + place % 9) for place in range(100)]
    body = client.post("/inference/batch", json={"texts": texts}).json()
    assert [one["tokens"] for one in body["predictions"]] == [len(text.split()) + 2 for text in texts]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/inference", {}, ["body", "text"]),
        ("/inference", {"text": ""}, ["body", "text"]),
        ("/inference", {"text": " \n"}, ["body", "text"]),
        ("/inference", {"text": 5}, ["body", "text"]),
        ("/inference", {"text": ["film"]}, ["body", "text"]),
        ("/inference", {"texts": ["film"]}, ["body", "text"]),
        ("/inference", ["film"], ["body"]),
        ("/inference/batch", {"texts": []}, ["body", "texts"]),
        ("/inference/batch", {"texts": "film"}, ["body", "texts"]),
        ("/inference/batch", {"texts": ["film", None]}, ["body", "texts", 1]),
    ],
)
def test_bad_input_is_422_with_the_field_named(client: TestClient, path: str, body: Any, field: list[Any]) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == field


@pytest.mark.parametrize("body", [b"", b"{", b'{"text": "\\ud800"}', b'{"text": "\xff"}', b"\xff\xfe"])
def test_what_is_no_json_or_no_text_is_422(client: TestClient, body: bytes) -> None:
    answer = client.post("/inference", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert client.post("/inference", json={"text": "film"}).status_code == 200


def test_a_thousand_problems_are_not_all_listed(client: TestClient) -> None:
    answer = client.post("/inference/batch", json={"texts": [1] * 1000})
    assert answer.status_code == 422
    assert len(answer.json()["detail"]) == 20


@pytest.mark.parametrize(
    ("path", "status"),
    [("/livez", 200), ("/readyz", 200), ("/metrics", 200), ("/model", 200), ("/drift", 200), ("/inference", 405)],
)
def test_what_can_be_read_can_be_asked_for_with_head(client: TestClient, path: str, status: int) -> None:
    assert client.head(path).status_code == status


def test_what_was_sent_is_not_repeated_in_the_error(client: TestClient) -> None:
    assert "private" not in client.post("/inference", json={"text": ["private"]}).text


def test_a_text_of_any_script_is_answered(client: TestClient) -> None:
    for text in ("電影很好看", "😀" * 50, "\x00 film", "e\u0301", "فيلم رائع"):
        assert client.post("/inference", json={"text": text}).status_code == 200, text


def test_a_body_beyond_the_limit_is_413_declared_or_not(client: TestClient) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"text": "'
        for _ in range(8):
            yield b"film " * 200
        yield b'"}'

    assert client.post("/inference", content=b"".join(chunks())).status_code == 413
    assert client.post("/inference", content=chunks()).status_code == 413


def test_in_a_batch_one_bad_text_fails_alone(client: TestClient) -> None:
    body = client.post("/inference/batch", json={"texts": ["film", "", "a great film"]}).json()
    first, bad, last = body["predictions"]
    assert bad == {"error": "the text is empty"}
    assert (first["tokens"], last["tokens"]) == (3, 5)


def test_half_a_surrogate_pair_is_its_own_texts_fault(client: TestClient) -> None:
    batch = client.post("/inference/batch", content=b'{"texts": ["film", "\\ud800", "film"]}')
    assert ["error" in one for one in batch.json()["predictions"]] == [False, True, False]
    single = client.post("/inference", content=b'{"text": "\\ud800"}')
    assert (single.status_code, single.json()["detail"][0]["loc"]) == (422, ["body", "text"])
    assert client.post("/inference", content=b'{"text": "film"').status_code == 422


def test_a_batch_of_any_size_is_answered_in_order(client: TestClient) -> None:
    texts = ["film" if place % 7 else "film film" for place in range(400)]
    body = client.post("/inference/batch", json={"texts": texts}).json()
    assert [one["tokens"] for one in body["predictions"]] == [len(text.split()) + 2 for text in texts]


def test_without_a_model_everything_says_so_and_when_to_come_back(settings: Settings) -> None:
    with TestClient(app_of(settings, Slot())) as client:
        for answer in (client.post("/inference", json={"text": "film"}), client.get("/model"), client.get("/readyz")):
            assert answer.status_code == 503
            assert int(answer.headers["Retry-After"]) > 0
        assert client.get("/readyz").json()["phase"] == "empty"
        assert client.get("/livez").status_code == 200


def test_a_slot_that_failed_is_neither_ready_nor_alive(settings: Settings) -> None:
    slot = Slot()
    slot.fail(StoreError("torn"))
    with TestClient(app_of(settings, slot)) as client:
        assert client.get("/readyz").json()["phase"] == "failed"
        assert client.get("/livez").status_code == 503
        assert isinstance(slot.failure, StoreError)


def test_overload_is_429_at_once(settings: Settings, held: tuple[Slot, threading.Event]) -> None:
    slot, go = held
    with TestClient(app_of(settings, slot)) as client, ThreadPoolExecutor(9) as pool:
        requests = [pool.submit(client.post, "/inference", json={"text": "film"}) for _ in range(9)]
        first = next(iter(wait(requests, timeout=240, return_when=FIRST_COMPLETED).done))
        assert first.result().status_code == 429
        assert int(first.result().headers["Retry-After"]) > 0
        go.set()
        statuses = [one.result(10).status_code for one in requests]
        assert set(statuses) == {200, 429}
        assert client.post("/inference", json={"text": "film"}).status_code == 200


def test_a_refusal_reads_nothing_of_the_request_and_is_counted_by_its_route(
    settings: Settings, held: tuple[Slot, threading.Event]
) -> None:
    slot, go = held
    guarded = settings.model_copy(update={"api_key": SecretStr("open sesame")})
    key = {"X-API-Key": "open sesame"}
    with TestClient(app_of(guarded, slot)) as client, ThreadPoolExecutor(9) as pool:
        requests = [pool.submit(client.post, "/inference", json={"text": "film"}, headers=key) for _ in range(9)]
        wait(requests, timeout=240, return_when=FIRST_COMPLETED)
        for path in ("/inference", "/inference/batch/"):
            answer = client.post(path, content=b"{" + b" " * 9000, headers=key)  # neither JSON nor small enough
            assert answer.status_code == 429
            assert int(answer.headers["Retry-After"]) > 0
            assert answer.headers["X-Request-Id"]
            assert "tokens are waiting" in answer.json()["detail"]
        assert client.post("/inference", json={"text": "film"}).status_code == 401
        assert client.get("/inference").status_code == 401
        assert client.get("/inference", headers=key).status_code == 405
        assert client.get("/livez").status_code == 200
        assert 'tuneserve_requests_total{route="/inference/batch",status="429"} 1.0' in client.get("/metrics").text
        go.set()


@pytest.mark.parametrize(("header", "status"), [("0.05", 504), ("0", 422), ("soon", 422), ("nan", 422)])
def test_a_client_may_wait_less(
    settings: Settings, held: tuple[Slot, threading.Event], header: str, status: int
) -> None:
    with TestClient(app_of(settings, held[0])) as client:
        answer = client.post("/inference", json={"text": "film"}, headers={"X-Request-Timeout-S": header})
        assert answer.status_code == status


@pytest.mark.parametrize("batch", [False, True])
def test_an_engine_that_dies_is_seen_by_all_and_the_server_is_told(
    settings: Settings, version: Version, make_engine: Callable[..., Any], batch: bool
) -> None:
    def die(engine: Any) -> None:
        raise SystemExit("gone")

    slot = filled(Classifier(version, make_engine(die)))
    told = threading.Event()
    slot.on_failure = told.set
    with TestClient(app_of(settings, slot)) as client:
        assert client.get("/livez").status_code == 200
        # A batch is told so as a whole: it is no fault of its texts.
        path, wanted = ("/inference/batch", {"texts": ["film"]}) if batch else ("/inference", {"text": "film"})
        assert client.post(path, json=wanted).status_code == 503
        assert told.wait(5)
        assert client.get("/livez").status_code == 503
        assert client.get("/readyz").status_code == 503
        assert client.post("/inference", json={"text": "film"}).status_code == 503


def test_a_figure_that_is_no_number_is_500_and_counted(
    settings: Settings, version: Version, make_engine: Callable[..., Any]
) -> None:
    engine = make_engine(lambda engine: np.full((len(engine.running), 2), np.nan, dtype=np.float32))
    slot = filled(Classifier(version, engine))
    with TestClient(app_of(settings, slot)) as client:
        assert client.post("/inference", json={"text": "film"}).status_code == 500
        assert "tuneserve_not_finite_total 1.0" in client.get("/metrics").text


@pytest.mark.parametrize(("sent", "kept"), [("abc-1", True), ("x" * 200, False), ("", False)])
def test_every_answer_has_the_requests_id(client: TestClient, sent: str, kept: bool) -> None:
    answer = client.post("/inference", json={"text": "film"}, headers={"X-Request-Id": sent})
    assert (answer.headers["X-Request-Id"] == sent) == kept
    assert answer.headers["X-Request-Id"]


def test_the_api_key_guards_answers_and_metadata_but_not_health(settings: Settings, slot: Slot) -> None:
    guarded = Settings.from_environ({"API_KEY": "open sesame ü"})
    key = "open sesame ü".encode()
    with TestClient(app_of(guarded, slot)) as client:
        for headers in ({}, {"X-API-Key": b"open"}, {"Authorization": b"Bearer wrong"}, {"Authorization": b"Basic x"}):
            answer = client.post("/inference", json={"text": "film"}, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert client.get("/model").status_code == 401
        for headers in ({"X-API-Key": key}, {"Authorization": b"Bearer " + key}):
            assert client.post("/inference", json={"text": "film"}, headers=headers).status_code == 200
        gateway = {"X-API-Key": key, "Authorization": b"Bearer of a gateway"}
        assert client.post("/inference", json={"text": "film"}, headers=gateway).status_code == 200
        for path in ("/livez", "/readyz", "/metrics"):
            assert client.get(path).status_code == 200


def test_the_api_key_guards_everything_if_it_is_told_to(slot: Slot) -> None:
    guarded = Settings.from_environ({"API_KEY": "open sesame", "API_KEY_GUARDS": "everything"})
    with TestClient(app_of(guarded, slot)) as client:
        for path in ("/livez", "/readyz", "/metrics", "/docs", "/openapi.json", "/", "/model", "/nothing"):
            for headers in ({}, {"X-API-Key": "open"}, {"Authorization": "Bearer"}, {"Authorization": "open sesame"}):
                refused = client.get(path, headers=headers)
                assert refused.status_code == 401, path
                assert refused.headers["WWW-Authenticate"] == "Bearer"
                assert "API key" in refused.json()["detail"]
            for headers in ({"X-API-Key": "open sesame"}, {"Authorization": "bearer open sesame"}):
                assert client.get(path, headers=headers).status_code == (404 if path == "/nothing" else 200), path
        assert client.post("/inference", content=b"{").status_code == 401
    with pytest.raises(SettingsError, match="set API_KEY"):
        Settings.from_environ({"API_KEY_GUARDS": "everything"})


def test_the_documentation_says_how_the_key_is_shown(client: TestClient) -> None:
    description = client.get("/openapi.json").json()
    assert set(description["components"]["securitySchemes"]) == {"HTTPBearer", "APIKeyHeader"}
    assert description["paths"]["/inference"]["post"]["security"] == [{"HTTPBearer": []}, {"APIKeyHeader": []}]
    assert "security" not in description["paths"]["/livez"]["get"]


def test_the_model_page_is_the_versions_metadata(client: TestClient, version: Version) -> None:
    assert client.get("/model").json() == {"version": version.id, **version.metadata}


def test_metrics_count_by_route_and_status_and_invent_no_routes(client: TestClient, version: Version) -> None:
    client.post("/inference", json={"text": "film"})
    client.post("/inference/", json={"text": "film"})
    client.post("/inference", json={})
    client.get("/nothing/here")
    families = {one.name: one for one in text_string_to_metric_families(client.get("/metrics").text)}
    counts = {
        (sample.labels["route"], sample.labels["status"]): sample.value
        for sample in families["tuneserve_requests"].samples
        if sample.name.endswith("_total")
    }
    assert counts == {("/inference", "200"): 2, ("/inference", "422"): 1, ("(none)", "404"): 1}
    [model] = families["tuneserve_model_info"].samples
    assert (model.labels["version"], model.value) == (version.id, 1)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing_wrong_with_the_metrics(client: TestClient) -> None:
    client.post("/inference", json={"text": "film"})
    client.post("/inference/batch", json={"texts": ["film", "a great film " * 9, ""]})
    client.get("/nothing/here")
    command = ["promtool", "check", "metrics"]
    done = subprocess.run(command, input=client.get("/metrics").text, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_failure_of_the_engine_is_500_without_its_words(
    settings: Settings, version: Version, make_engine: Callable[..., Any]
) -> None:
    def fail(engine: Any) -> None:
        if any(len(row) == 5 for row in engine.running):
            raise RuntimeError("internal words")

    slot = filled(Classifier(version, make_engine(fail)))
    with TestClient(app_of(settings, slot), raise_server_exceptions=False) as client:
        answer = client.post("/inference", json={"text": "a great film"})
        assert answer.status_code == 500
        assert "internal words" not in answer.text
        body = client.post("/inference/batch", json={"texts": ["film", "a great film", "film"]}).json()
        assert ["error" in one for one in body["predictions"]] == [False, True, False]


@pytest.mark.parametrize("path", ["/inference", "/inference/batch"])
def test_json_that_is_too_deep_is_a_fault_of_the_request(
    client: TestClient, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    body = '{"text": "private", "texts": [], "x": ' + "[" * 1800 + "]" * 1800 + "}"
    assert client.post(path, content=body).status_code == 422
    assert "private" not in caplog.text


def test_what_nobody_foresaw_is_a_500_with_its_id_and_the_log_has_where_and_not_what(
    settings: Settings, slot: Slot, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*about: Any) -> None:
        raise ZeroDivisionError("".join(["priv", "ate"]))  # the trace shows this line

    monkeypatch.setattr(classification, "shown", fail)
    with TestClient(app_of(settings, slot)) as client:
        answer = client.post("/inference", json={"text": "film"}, headers={"X-Request-Id": "mine"})
        metrics = client.get("/metrics").text
    assert (answer.status_code, answer.headers["X-Request-Id"]) == (500, "mine")
    assert "the server's log says what" in answer.json()["detail"]
    assert 'tuneserve_requests_total{route="/inference",status="500"} 1.0' in metrics
    assert "request mine failed: ZeroDivisionError" in caplog.text
    assert "test_api.py" in caplog.text
    assert "private" not in caplog.text


def test_the_documentation_has_every_status(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("/inference", "/inference/batch"):
        known = {"200", "400", "401", "408", "413", "415", "422", "429", "431", "500", "501", "503", "504"}
        assert set(paths[path]["post"]["responses"]) == known


def test_the_documentation_has_examples_of_every_request_and_answer(client: TestClient) -> None:
    description = client.get("/openapi.json").json()
    schemas = description["components"]["schemas"]
    assert schemas["PredictionResponse"]["examples"]
    for path in ("/inference", "/inference/batch"):
        body = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body["examples"]
    assert client.get("/docs").status_code == 200
    assert client.get("/").status_code == 200
