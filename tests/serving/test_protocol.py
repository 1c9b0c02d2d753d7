"""What a connection may send has bounds, and a broken request harms none before it, on real sockets."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from pydantic import SecretStr
from wire import BODY, LIVEZ, Client, batcher_of, counts, served, write

from tuneserve.serving.http.front import Bodies
from tuneserve.serving.http.protocol import MAX_HEADERS, SLICE_BYTES
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings

HEAD = b"POST /inference HTTP/1.1\r\nHost: a\r\nX-API-Key: secret\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
WHOLE = b"10\r\n" + BODY + b"\r\n0\r\n"
WAIT_S = 0.5


@pytest.fixture
def connect(settings: Settings, slot: Slot) -> Iterator[Callable[[], Client]]:
    clients: list[Client] = []
    changed = settings.model_copy(update={"request_timeout_s": WAIT_S, "api_key": SecretStr("secret")})
    with served(changed, slot) as port:

        def connect() -> Client:
            clients.append(Client(port))
            return clients[-1]

        yield connect
        for client in clients:
            client.close()


def push(client: Client, piece: bytes) -> int:
    """Send a piece over and over until nobody reads it; returns the bytes sent."""
    sent = 0
    try:
        while sent < 64 << 20:
            client.send(piece)
            sent += len(piece)
    except OSError:
        pass
    return sent


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (HEAD, b"X-A: " + b"b" * 1000 + b"\r\n"),
        (HEAD + b"X-A: ", b"b" * 1000),
        (b"GET /livez HTTP/1.1\r\n", b"X-A: " + b"b" * 1000 + b"\r\n"),
        (CHUNKED + WHOLE, b"X-A: " + b"b" * 1000 + b"\r\n"),
    ],
)
def test_headers_without_end_are_not_read(connect: Callable[[], Client], begin: bytes, piece: bytes) -> None:
    client = connect()
    client.send(begin)
    assert push(client, piece) < 32 << 20  # most of it stays in the buffers of the sockets
    with suppress(ConnectionError):
        assert client.read()[0] in (0, 431)


def test_headers_up_to_the_limit_are_read(connect: Callable[[], Client]) -> None:
    client = connect()
    status, _, _ = client.ask(write(BODY, "X-API-Key: secret", *["X-A: " + "b" * 1000] * 60))
    assert status == 200


@pytest.mark.parametrize("begin", [HEAD, b"GET /livez HTTP/1.1\r\n"])
def test_headers_beyond_the_limit_are_refused(connect: Callable[[], Client], begin: bytes) -> None:
    client = connect()
    client.send((begin + b"X-A: ").ljust((64 << 10) + SLICE_BYTES + 1, b"b"))  # the slice it begins in is not counted
    assert client.read()[0] == 431
    assert client.read()[0] == 0


@pytest.mark.parametrize("end", [b"", b"\r\n", b"Content-Length: 16\r\n\r\n" + BODY], ids=["no end", "a head", "whole"])
def test_more_headers_than_a_request_may_have_are_refused(connect: Callable[[], Client], end: bytes) -> None:
    client = connect()
    client.send(HEAD + b"a:\r\n" * (MAX_HEADERS - 3) + b"Content-Length: 16\r\n\r\n" + BODY)
    assert client.read()[0] == 200
    client.send(HEAD + b"a:\r\n" * MAX_HEADERS + end)
    assert [client.read()[0] for _ in range(2)] == [431, 0]


def test_a_body_that_became_too_large_leaves_the_connection_as_it_was(
    connect: Callable[[], Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, hold = threading.Event(), Bodies.hold
    monkeypatch.setattr(Bodies, "hold", lambda *a, **k: begun.set() or hold(*a, **k))
    client = connect()
    client.send(HEAD + b"X-API-Key: secret\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n \r\n")
    assert begun.wait(60)
    client.send(b"2000\r\n" + b" " * 0x2000 + b"\r\n0\r\n\r\n")
    assert client.read()[0] == 413
    assert connect().read()[0] == 0  # one that came later and says nothing
    assert client.ask(write(BODY, "X-API-Key: secret"))[0] == 200


def test_a_refused_request_whose_body_does_not_come_is_closed(connect: Callable[[], Client], slot: Slot) -> None:
    batcher = batcher_of(slot)
    batcher._max_queue_tokens = 0
    client = connect()
    client.send(write(BODY, "X-API-Key: secret")[:-3])
    assert client.read()[0] == 429
    assert client.read()[0] == 0


def test_an_answered_upload_that_stops_is_closed(connect: Callable[[], Client]) -> None:
    client = connect()
    client.send(HEAD + b"Content-Length: 1000000\r\n\r\n")
    assert client.read()[0] == 413
    client.send(b" ")
    assert client.read()[0] == 0


def test_what_follows_a_body_in_chunks_is_no_header(connect: Callable[[], Client]) -> None:
    without_key = CHUNKED.replace(b"X-API-Key: secret\r\n", b"")
    status, headers, _ = connect().ask(without_key + WHOLE + b"X-API-Key: secret\r\nX-Request-Id: mine\r\n\r\n")
    assert status == 401
    assert headers["x-request-id"] != "mine"


@pytest.mark.parametrize("garbage", [b"\x00\x01\x02", b"no HTTP at all\r\n\r\n"])
def test_a_whole_request_before_garbage_is_answered(connect: Callable[[], Client], garbage: bytes) -> None:
    client = connect()
    client.send(write(BODY, "X-API-Key: secret") + garbage)
    status, headers, _ = client.read()
    assert (status, headers["connection"]) == (200, "close")
    assert client.read()[0] == 0


def test_a_broken_body_is_a_bad_request_and_counted_as_one(connect: Callable[[], Client], slot: Slot) -> None:
    client = connect()
    status, headers, _ = client.ask(CHUNKED + b"no number\r\n")
    assert (status, headers["connection"]) == (400, "close")
    assert "x-request-id" in headers
    assert client.read()[0] == 0
    assert {status for _, status in counts(slot)} == {"400"}


@pytest.mark.parametrize("before", [b"", write(BODY, "X-API-Key: secret", "X-Request-Id: mine")])
def test_what_is_no_http_is_told_so_and_counted(connect: Callable[[], Client], slot: Slot, before: bytes) -> None:
    client = connect()
    if before:
        assert client.ask(before)[0] == 200
    status, headers, body = client.ask(b"\x16\x03\x01\x02\x00\x01\x00")
    assert (status, headers["connection"]) == (400, "close")
    assert headers["x-request-id"] != "mine"
    assert json.loads(body) == {"detail": "Invalid HTTP request received."}
    assert client.read()[0] == 0
    assert slot.metrics.requests.labels("(none)", "400")._value.get() == 1


@pytest.mark.parametrize("before", [write(BODY, "X-API-Key: secret"), LIVEZ + LIVEZ])
def test_a_broken_request_does_not_take_the_answer_of_one_before_it(
    connect: Callable[[], Client], before: bytes
) -> None:
    client = connect()
    client.send(before + CHUNKED + b"no number\r\n")
    assert client.read()[0] == 200
    assert client.read()[0] in (0, 200)
    assert client.read()[0] == 0


def test_many_requests_in_one_piece_are_answered(connect: Callable[[], Client]) -> None:
    client = connect()
    request = LIVEZ[:-2] + b"X-Pad: " + b"a" * 100 + b"\r\n\r\n"
    sending = threading.Thread(target=client.send, args=[request * 3000])
    sending.start()
    assert {client.read()[0] for _ in range(3000)} == {200}
    sending.join()


@pytest.mark.parametrize("first", ["1", r'"\ud800"'])
def test_a_million_faults_do_not_hold_up_the_server(settings: Settings, slot: Slot, first: str) -> None:
    body = b'{"texts": [' + first.encode() + b", 1" * 300_000 + b"]}"
    with served(settings.model_copy(update={"max_body_kb": 1000}), slot) as port:
        client = Client(port)
        status, _, answer = client.ask(write(body, path="/inference/batch"))
        assert (status, answer.count(b"string_type")) == (422, 20)
        client.close()
