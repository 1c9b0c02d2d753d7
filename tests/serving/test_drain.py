"""Bodies and heads that do not come, other protocols, and the drain, on real sockets."""

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
from wire import BODY, LIVEZ, Client, counts, served, wait_until_it_computes, write

from tuneserve.serving.http import front
from tuneserve.serving.http.protocol import UNREAD_BYTES
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings


def test_a_body_that_does_not_come_ends_its_request_in_time(settings: Settings, slot: Slot) -> None:
    with served(settings.model_copy(update={"request_timeout_s": 0.3}), slot) as port:
        client = Client(port)
        status, headers, body = client.ask(write(BODY)[:-3])
        assert (status, headers["connection"]) == (408, "close")
        assert "0.3 s" in json.loads(body)["detail"]
        client.close()
        large = Client(port)
        assert large.ask(write(b" " * 5000))[0] == 413
        large.close()
    assert counts(slot).keys() == {("/inference", "408"), ("/inference", "413")}


@pytest.fixture
def served_port(settings: Settings, slot: Slot) -> Iterator[int]:
    """The port of a server with a model."""
    with served(settings, slot) as port:
        yield port


@pytest.fixture
def client(served_port: int) -> Iterator[Client]:
    client = Client(served_port)
    yield client
    client.close()


UPGRADES = [
    ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA"],
    ["Connection: keep-alive", "Upgrade: websocket", "Sec-WebSocket-Key: AAAA", "connection: upgrade"],
]


@pytest.mark.parametrize("headers", UPGRADES)
def test_who_offers_another_protocol_is_answered_over_this_one_and_fills_no_log(
    client: Client, headers: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    request = write(BODY, *headers, "X-Request-Id: mine")
    for _ in range(2):  # also on a connection that has had such a request
        status, found, body = client.ask(request)
        assert (status, json.loads(body)["label"], found["x-request-id"]) == (200, "good", "mine")
    for byte in range(len(request)):  # however it comes in pieces
        client.send(request[byte : byte + 1])
    assert client.read()[0] == 200
    client.send(request * 2 + LIVEZ)
    assert [client.read()[0] for _ in range(3)] == [200, 200, 200]
    assert client.ask(write(BODY, "Connection: close, Upgrade", "Upgrade: h2c"))[0] == 200
    assert client.read()[0] == 0
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_tunnel_is_refused_like_any_other_method(client: Client) -> None:
    assert client.ask(b"CONNECT /inference HTTP/1.1\r\nHost: a\r\n\r\n")[0] in (400, 404, 405)


def test_a_head_is_answered_as_get_is_without_the_body(client: Client) -> None:
    client.send(LIVEZ.replace(b"GET", b"HEAD") + LIVEZ)
    first, *_ = iter(client._file.readline, b"\r\n")
    assert first == b"HTTP/1.1 200 OK\r\n"
    assert client.read()[::2] == (200, b'{"status":"alive"}')


@pytest.mark.parametrize("sent", [b"", b"POST /inference HTTP/1.1\r\nX-A", LIVEZ + b"GET /li"])
def test_headers_that_do_not_come_close_the_connection(settings: Settings, slot: Slot, sent: bytes) -> None:
    with served(settings.model_copy(update={"request_timeout_s": 0.5}), slot, timeout_keep_alive=60) as port:
        client = Client(port)
        client.send(sent)
        if sent.startswith(LIVEZ):
            assert client.read()[0] == 200
        assert client.read()[0] == 0
        kept = Client(port)  # while one whose headers came is kept
        assert kept.ask(LIVEZ)[0] == 200
        later = Client(port)
        assert later.read()[0] == 0
        assert kept.ask(LIVEZ)[0] == 200
        for one in (client, kept, later):
            one.close()


def test_a_body_that_nobody_wants_is_read_up_to_a_limit(client: Client) -> None:
    client.send(b"POST /inference HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000000\r\n\r\n")
    assert client.read()[0] == 413
    sent = 0
    with suppress(ConnectionError):
        while sent < 40 * UNREAD_BYTES:
            client.send(bytes(1 << 20))
            sent += 1 << 20
    assert UNREAD_BYTES <= sent < 40 * UNREAD_BYTES


def test_a_server_that_is_to_leave_waits_for_no_body_but_finishes_what_it_has(
    settings: Settings, held: tuple[Slot, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "DRAIN_BODY_S", 0.3)
    slot, go = held
    context = served(settings, slot, timeout_graceful_shutdown=20)
    port = context.__enter__()
    whole, half = Client(port), Client(port)
    whole.send(write())
    half.send(write(BODY, "X-Request-Id: half")[:-3])
    wait_until_it_computes(slot)
    ending = threading.Thread(target=context.__exit__, args=[None, None, None])
    ending.start()
    status, headers, body = half.read()
    assert (status, headers["connection"], headers["x-request-id"]) == (503, "close", "half")
    assert int(headers["retry-after"]) > 0
    assert "about to end" in json.loads(body)["detail"]
    go.set()
    assert whole.read()[0] == 200
    ending.join()
    whole.close()
    half.close()


def test_what_a_leaving_server_cannot_finish_is_told_so(
    settings: Settings, held: tuple[Slot, threading.Event], caplog: pytest.LogCaptureFixture
) -> None:
    slot, _ = held
    context = served(settings, slot, timeout_graceful_shutdown=1)
    client = Client(context.__enter__())
    client.send(write(BODY, "X-Request-Id: mine"))
    wait_until_it_computes(slot)
    context.__exit__(None, None, None)
    status, headers, body = client.read()
    assert (status, headers["x-request-id"]) == (503, "mine")
    assert int(headers["retry-after"]) > 0
    assert "about to end" in json.loads(body)["detail"]
    assert "Traceback" not in caplog.text
    client.close()
