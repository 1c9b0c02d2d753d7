"""The server while its queue is full, on real sockets: what a client sees of a refusal and of what comes after it."""

import json
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from wire import BODY, LIVEZ, Client, Full, batcher_of, served, wait_until, write

from tuneserve.artifact import Version
from tuneserve.serving.http import backoff
from tuneserve.serving.http.backoff import BACKOFF_S
from tuneserve.serving.service import Service
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings
from tuneserve.tasks.classifier import Classifier


def test_a_refusal_says_why_and_when_to_come_back_in_the_shape_of_every_error(fill: Callable[..., Full]) -> None:
    client = fill().connect()
    for path in ("/inference", "/inference/", "/inference/batch", "/inference/batch/"):
        status, headers, body = client.ask(write(BODY, "X-Request-Id: mine", path=path))
        assert status == 429
        assert int(headers["retry-after"]) > 0
        assert headers["x-request-id"] == "mine"
        assert headers["content-type"] == "application/json"
        assert {"date", "server"} <= set(headers)
        assert "tokens are waiting" in json.loads(body)["detail"]


def test_a_deadline_that_cannot_be_met_is_refused_though_the_queue_has_room(fill: Callable[..., Full]) -> None:
    full = fill()
    full.batcher._max_queue_tokens = 10_000
    client = full.connect()
    full.batcher.tokens_per_s = full.batcher.tokens_waiting / 40  # and a request may wait for 30 s
    status, headers, _ = client.ask(write())
    assert (status, headers["retry-after"]) == (429, "20")
    full.batcher.tokens_per_s = full.batcher.tokens_waiting / 20
    client.send(write())
    wait_until(lambda: full.batcher.tokens_waiting > 6)
    full.make_room()
    assert client.read()[0] == 200


def test_a_refused_client_may_ask_again_at_once_on_the_same_connection_and_is_answered_when_there_is_room(
    fill: Callable[..., Full],
) -> None:
    full = fill()
    client = full.connect()
    for _ in range(20):
        assert client.ask(write())[0] == 429
    assert client.ask(LIVEZ)[0] == 200
    full.make_room()
    status, _, body = client.ask(write())
    assert status == 200, body
    assert client.ask(LIVEZ)[0] == 200


def ask_again_and_again(clients: list[Client], times: int) -> None:
    """Each is refused, and asks again as soon as it is."""
    for _ in range(times):
        for client in clients:
            client.send(write())
        assert {client.read()[0] for client in clients} == {429}


def test_clients_that_ask_again_at_once_cannot_keep_the_server_busy(
    fill: Callable[..., Full], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = fill()
    clients = [full.connect() for _ in range(8)]
    slept: list[float] = []
    monkeypatch.setattr(backoff, "time", SimpleNamespace(sleep=slept.append))
    full.batcher.tokens_per_s = 1
    ask_again_and_again(clients, times=20)
    assert len(slept) >= 19  # before it is refused once more, the last one perhaps not yet
    assert set(slept) == {BACKOFF_S}
    full.batcher.tokens_per_s = full.batcher.tokens_waiting / (BACKOFF_S / 5)  # it would run dry in a whole backoff
    ask_again_and_again(clients, times=20)
    assert slept[-1] == pytest.approx(BACKOFF_S / 10)


def test_requests_that_are_read_together_do_not_overfill_the_queue(
    settings: Settings, held: tuple[Slot, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    slot, go = held
    answer, let_in, others_sent = Service.answer, [], threading.Event()

    async def answer_slowly(service: Service, *about: Any, **options: Any) -> Any:
        let_in.append(about)
        assert others_sent.wait(10)  # the loop finds them all at once
        return await answer(service, *about, **options)

    monkeypatch.setattr(Service, "answer", answer_slowly)
    with served(settings, slot) as port:
        first, *others = clients = [Client(port) for _ in range(20)]
        assert {client.ask(LIVEZ)[0] for client in clients} == {200}
        first.send(write())
        for client in others:
            client.send(write())
        others_sent.set()
        wait_until(lambda: sum(client.is_answered() for client in others) >= 15)
        go.set()
        statuses = Counter(client.read()[0] for client in clients)
        assert statuses == {429: 20 - statuses[200], 200: statuses[200]}
        assert statuses[200] <= 5  # one is computed, one laid out, and three that wait are as many as may
        for client in clients:
            client.close()
    assert len(let_in) <= 5  # hardly one that is refused came as far as to be parsed


def test_nobody_is_refused_for_what_others_sent_before(settings: Settings, version: Version, engine: Any) -> None:
    slot = Slot()
    slot.take(Classifier(version, engine, max_queue_tokens=500))
    batch = json.dumps({"texts": ["good film " * 20] * 20}).encode()
    with served(settings.model_copy(update={"max_body_kb": 64}), slot) as port:
        clients = [Client(port) for _ in range(40)]
        for _ in range(20):
            assert clients[0].ask(write(batch, path="/inference/batch"))[0] == 200
        for client in clients:
            client.send(write())
        assert [client.read()[0] for client in clients] == [200] * 40
        for client in clients:
            client.close()
    slot.close()


def test_texts_that_threads_tokenize_do_not_overfill_the_queue(
    settings: Settings, held: tuple[Slot, threading.Event]
) -> None:
    slot, go = held
    batcher_of(slot)._max_queue_tokens = 200
    batch = json.dumps({"texts": ["film " * 200] * 8}).encode()  # 128 tokens, in two parts
    with served(settings.model_copy(update={"max_body_kb": 64}), slot) as port:
        clients = [Client(port) for _ in range(20)]
        assert {client.ask(LIVEZ)[0] for client in clients} == {200}
        for client in clients:
            client.send(write(batch, path="/inference/batch"))
        wait_until(lambda: sum(client.is_answered() for client in clients) > 14)
        assert batcher_of(slot).tokens_waiting < 200 + 128
        go.set()
        statuses = [client.read()[0] for client in clients]
        assert set(statuses) == {200, 429}
        for client in clients:
            client.close()


def test_newcomers_do_not_wait_a_backoff_each(fill: Callable[..., Full], monkeypatch: pytest.MonkeyPatch) -> None:
    full = fill()
    begun, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def sleep(seconds: float) -> None:
        begun.release()
        go_on.acquire(timeout=240)

    monkeypatch.setattr(backoff, "time", SimpleNamespace(sleep=sleep))
    busy = full.connect()
    busy.send(write())
    assert begun.acquire(timeout=240)
    newcomers = [full.connect() for _ in range(60)]
    for newcomer in newcomers:
        newcomer.send(LIVEZ)
    try:
        for _ in range(5):
            go_on.release()
            assert busy.read()[0] == 429
            busy.send(write())
            assert begun.acquire(timeout=240)
        assert {newcomer.read()[0] for newcomer in newcomers} == {200}
    finally:
        go_on.release(1000)


def test_pipelined_requests_are_answered_in_their_order(fill: Callable[..., Full]) -> None:
    client = fill().connect()
    wrong = b"GET /inference HTTP/1.1\r\nHost: a\r\n\r\n"
    client.send(write() + LIVEZ + write(b"x" * 500) + wrong + write() + write())
    assert [client.read()[0] for _ in range(6)] == [429, 200, 429, 405, 429, 429]


def test_a_pipelined_request_waits_for_the_answer_of_the_one_before(fill: Callable[..., Full]) -> None:
    full = fill()
    client = full.connect()
    model = full.slot.model()
    room, model.batcher._max_queue_tokens = model.batcher._max_queue_tokens, 1000
    waiting = model.batcher.tokens_waiting
    client.send(write())
    wait_until(lambda: model.batcher.tokens_waiting != waiting)
    model.batcher._max_queue_tokens = room
    client.send(write() + LIVEZ)
    client.socket.settimeout(0.3)
    with pytest.raises(TimeoutError):
        client.socket.recv(1, socket.MSG_PEEK)
    client.socket.settimeout(10)
    full.go.set()
    assert client.read()[0] == 200
    assert client.read()[0] in (200, 429)
    assert client.read()[0] == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_comes_late_is_forgotten_and_the_connection_goes_on(
    fill: Callable[..., Full], chunked: bool
) -> None:
    client = fill().connect()
    size = "Transfer-Encoding: chunked" if chunked else "Content-Length: 30"
    client.send(f"POST /inference HTTP/1.1\r\nHost: a\r\n{size}\r\n\r\n".encode())
    assert client.read()[0] == 429
    body = [b"5\r\n", b"abc", b"de\r\n", b"0\r\n\r\n"] if chunked else [b"GET / HTTP", b"x" * 15, b"y" * 5]
    for part in body:
        client.send(part)
        time.sleep(0.02)
    assert client.ask(LIVEZ)[0] == 200
    assert client.ask(write())[0] == 429


@pytest.mark.parametrize(
    ("headers", "http"),
    [(["Connection: close"], "1.1"), (["Connection: keep-alive"], "1.0"), (["Expect: 100-continue"], "1.1")],
)
def test_who_wants_no_more_or_may_send_no_body_finds_the_connection_closed(
    fill: Callable[..., Full], headers: list[str], http: str
) -> None:
    client = fill().connect()
    request = write(BODY, *headers, http=http)
    status, found, body = client.ask(request.removesuffix(BODY) if "Expect: 100-continue" in headers else request)
    assert status == 429
    assert found["connection"] == "close"
    assert json.loads(body)
    assert client.read()[0] == 0


def test_a_connection_that_was_refused_and_then_says_nothing_is_closed(fill: Callable[..., Full]) -> None:
    client = fill(timeout_keep_alive=1).connect()
    assert client.ask(write())[0] == 429
    assert client.ask(write())[0] == 429
    assert client.read()[0] == 0


def test_connections_that_are_refused_and_refused_stay_open(fill: Callable[..., Full]) -> None:
    full = fill(timeout_keep_alive=1)
    full.batcher.tokens_per_s = 1
    clients = [full.connect() for _ in range(8)]
    ask_again_and_again(clients, times=round(2 / BACKOFF_S))
    assert {client.read()[0] for client in clients} == {0}


def test_a_refused_request_whose_body_is_broken_gets_no_second_answer(fill: Callable[..., Full]) -> None:
    client = fill().connect()
    client.send(b"POST /inference HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert client.read()[0] == 429
    client.send(b"zzz\r\n")
    assert client.read()[0] == 0


def test_whoever_does_not_show_the_key_is_not_told_how_much_waits(fill: Callable[..., Full]) -> None:
    client = fill("X-API-Key: open sesame", key="open sesame").connect()
    assert client.ask(write())[0] == 401
    assert client.ask(write(BODY, "X-API-Key: wrong"))[0] == 401
    assert client.ask(write(BODY, "X-API-Key: open sesame"))[0] == 429
    assert client.ask(write(BODY, "Authorization: Bearer open sesame"))[0] == 429


def test_refusals_are_counted_and_logged_like_all_answers(
    fill: Callable[..., Full], caplog: pytest.LogCaptureFixture
) -> None:
    client = fill(access_log=True).connect()
    with caplog.at_level(logging.INFO, "tuneserve"):
        client.ask(write(BODY, "X-Request-Id: one", path="/inference/batch/"))
        client.ask(write(BODY, "X-Request-Id: two", path="/inference/batch?why=not"))  # which the middleware refuses
        metrics = client.ask(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")[2].decode()
    assert 'tuneserve_requests_total{route="/inference/batch",status="429"} 2.0' in metrics
    # They are not timed, or there would hardly be an answer as slow as most are.
    assert 'tuneserve_request_seconds_count{route="/inference/batch"} 0.0' in metrics
    requests = [record.request for record in caplog.records if hasattr(record, "request")]
    assert [(one["route"], one["status"], one["id"]) for one in requests if one["status"] == 429] == [
        ("/inference/batch", 429, "one"),
        ("/inference/batch", 429, "two"),
    ]
