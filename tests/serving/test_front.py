"""The front of the application over real sockets: the table of handlers, cancellation, deadlines, errors."""

import json
import logging
import threading
import time
from typing import Any

import pytest
from fastapi.telemetry import TelemetryConfig
from pydantic import SecretStr
from wire import BODY, LIVEZ, Client, batcher_of, counts, served, wait_until, write

from tuneserve.artifact import Version
from tuneserve.serving.http.routes import Direct
from tuneserve.serving.http.traces import SILENT
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings
from tuneserve.tasks import classification
from tuneserve.tasks.classifier import Classifier

BATCH = b'{"texts": ["film", " ", "good film"]}'
CHUNKED = b"POST /inference HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"

ROUTED: TelemetryConfig = {**SILENT, "operation_spans": False}
"""As silent, but not the very configuration for which the front has its table."""

REQUESTS = {
    "one": write(),
    "slash": write(path="/inference/"),
    "batch": write(BATCH, path="/inference/batch"),
    "in chunks": CHUNKED + b"8\r\n" + BODY[:8] + b"\r\n8\r\n" + BODY[8:] + b"\r\n0\r\n\r\n",
    "no JSON": write(b"{"),
    "deep JSON": write(b'{"text": ' + b"[" * 1500),
    "no text": write(b'{"txt": 1}'),
    "empty text": write(b'{"text": " "}'),
    "no texts": write(b'{"texts": []}', path="/inference/batch"),
    "no body": write(b""),
    "half a surrogate pair": write(rb'{"text": "\ud800"}'),
    "strange deadline": write(BODY, "X-Request-Timeout-S: soon"),
    "deadline": write(BODY, "X-Request-Timeout-S: 5"),
    "too large": write(b" " * 5000),
    "too large in chunks": CHUNKED + b"1388\r\n" + b" " * 5000 + b"\r\n0\r\n\r\n",
    "wrong method": b"GET /inference HTTP/1.1\r\nHost: a\r\n\r\n",
    "query": write(path="/inference?a=b"),
    "old HTTP": write(BODY, http="1.0"),
    "last one": write(BODY, "Connection: close"),
}


def shown(answer: tuple[int, dict[str, str], bytes]) -> tuple[int, dict[str, str], bytes]:
    status, headers, body = answer
    return status, {name: value for name, value in headers.items() if name not in {"date", "x-request-id"}}, body


@pytest.mark.parametrize("key", ["", "secret"])
def test_the_table_of_handlers_and_fastapis_router_give_the_same_answers(
    settings: Settings, version: Version, engine: Any, key: str
) -> None:
    answers: list[dict[str, Any]] = []
    for telemetry in (SILENT, ROUTED):
        slot = Slot()
        slot.take(Classifier(version, engine))
        changed = settings.model_copy(update={"api_key": SecretStr(key)})
        with served(changed, slot, telemetry=telemetry) as port:
            answers.append({})
            for name, request in REQUESTS.items():
                client = Client(port)
                answers[-1][name] = shown(client.ask(request))
                keyed = request.replace(b"Host: a", b"Host: a\r\nX-API-Key: secret")
                if answers[-1][name][0] and answers[-1][name][1].get("connection") != "close":
                    answers[-1][name + ", again with the key"] = shown(client.ask(keyed))
                client.close()
        answers[-1]["counted"] = counts(slot)
        slot.close()
    assert answers[0] == answers[1]
    assert answers[0]["one"][0] == (401 if key else 200)
    assert {answer[0] for name, answer in answers[0].items() if name != "counted"} >= {200, 405, 413, 422}


def test_requests_to_the_engine_do_not_pass_fastapis_router(
    settings: Settings, slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Direct, "get_route_handler", lambda route: None)
    with served(settings, slot, lifespan="off") as port:
        client = Client(port)
        for path, body in (("/inference", BODY), ("/inference/batch", BATCH)):
            status, headers, answer = client.ask(write(body, "X-Request-Id: mine", path=path))
            assert status == 200, answer
            assert headers["x-request-id"] == "mine"
        client.close()


@pytest.mark.parametrize("path", ["/inference", "/feedback", "/nothing"])
def test_the_key_is_asked_for_before_the_body_is_read(settings: Settings, slot: Slot, path: str) -> None:
    with served(settings.model_copy(update={"api_key": SecretStr("secret")}), slot) as port:
        client = Client(port)
        client.send(f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n".encode())
        assert client.read()[0] == 401  # and not 413, nor 408 later
        client.close()


def test_who_asks_before_the_body_is_sent_is_told_to_go_on(settings: Settings, slot: Slot) -> None:
    with served(settings, slot) as port:
        client = Client(port)
        head, _, body = write(BODY, "Expect: 100-continue").partition(b"\r\n\r\n")
        assert client.ask(head + b"\r\n\r\n")[0] == 100
        assert client.ask(body)[0] == 200
        client.close()


def test_a_body_may_come_in_pieces(settings: Settings, slot: Slot) -> None:
    with served(settings, slot) as port:
        client = Client(port)
        request = write()
        for byte in range(len(request)):
            client.send(request[byte : byte + 1])
            time.sleep(0.001)
        assert client.read()[0] == 200
        client.send(write() + LIVEZ + write())
        assert [client.read()[0] for _ in range(3)] == [200, 200, 200]
        client.close()


def test_work_whose_client_hung_up_is_dropped_and_is_nobodys_failure(
    settings: Settings, held: tuple[Slot, threading.Event]
) -> None:
    slot, go = held
    batcher_of(slot)._max_queue_tokens = 1000
    with served(settings, slot) as port:
        first, leaves, stays = (Client(port) for _ in range(3))
        first.send(write())
        wait_until(lambda: hasattr(engine_of(slot), "running"))
        second = 3  # tokens of the body's text
        for client in (leaves, stays):
            before = batcher_of(slot).tokens_waiting
            client.send(write())
            wait_until(lambda before=before: batcher_of(slot).tokens_waiting == before + second)
        leaves.close()
        wait_until(lambda: counted(slot, "499") == 1)
        go.set()
        assert (first.read()[0], stays.read()[0]) == (200, 200)
        first.close()
        stays.close()
    assert sum(map(len, engine_of(slot).batches)) == 2
    assert counted(slot, "500") == 0


def test_a_client_that_disconnects_behind_pipelined_requests_leaves_no_error(
    settings: Settings, held: tuple[Slot, threading.Event], caplog: pytest.LogCaptureFixture
) -> None:
    slot, go = held
    batcher_of(slot)._max_queue_tokens = 1000
    with served(settings, slot) as port, caplog.at_level(logging.WARNING):
        for _ in range(5):
            client = Client(port)
            client.send(write() * 30 + LIVEZ)
            wait_until(lambda: in_flight(slot) > 0)
            client.close()
        go.set()
        wait_until(lambda: sum(counts(slot).values()) >= 5 and in_flight(slot) == 0)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert {status for _, status in counts(slot)} <= {"200", "499"}


def test_what_nobody_foresaw_is_a_500_and_the_connection_goes_on(
    settings: Settings, slot: Slot, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(prediction: Any) -> None:
        raise ZeroDivisionError("".join(["priv", "ate"]))

    with served(settings, slot) as port:
        client = Client(port)
        with monkeypatch.context() as patch:
            patch.setattr(classification, "shown", fail)
            status, headers, body = client.ask(write(BODY, "X-Request-Id: mine"))
        assert (status, headers["x-request-id"]) == (500, "mine")
        assert "went wrong inside" in json.loads(body)["detail"]
        assert client.ask(write())[0] == 200
        client.close()
    assert "request mine failed: ZeroDivisionError" in caplog.text
    assert "private" not in caplog.text
    assert counted(slot, "500") == 1


def test_a_request_that_takes_too_long_is_504_and_the_connection_goes_on(
    settings: Settings, held: tuple[Slot, threading.Event]
) -> None:
    slot, go = held
    with served(settings, slot) as port:
        client = Client(port)
        status, _, body = client.ask(write(BODY, "X-Request-Timeout-S: 0.2"))
        assert (status, json.loads(body)["detail"]) == (504, "There was no answer in time.")
        go.set()
        assert client.ask(write())[0] == 200
        client.close()


def counted(slot: Slot, status: str) -> float:
    return counts(slot).get(("/inference", status), 0)


def in_flight(slot: Slot) -> int:
    assert slot.ready is not None
    return slot.ready.in_flight


def engine_of(slot: Slot) -> Any:
    return batcher_of(slot)._engine
