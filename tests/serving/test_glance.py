"""What is seen at a glance is what a parser reads; whatever else may come is left to it."""

import random
from typing import Any

import httptools
import pytest
from wire import BODY, LIVEZ, write

from tuneserve.serving.glance import see_whole_request

PLAIN = write(BODY, "User-Agent: a", "X-Request-Id: one", "X-API-Key: key", "Content-Type: application/json")


class Reading:
    """What httptools reads of some bytes."""

    def __init__(self, data: bytes) -> None:
        self.url, self.headers, self.body, self.ends = b"", list[tuple[bytes, bytes]](), b"", 0
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.ends += 1


def test_a_plain_request_is_seen_with_the_headers_that_matter() -> None:
    assert see_whole_request(PLAIN) == (
        "/inference",
        [(b"x-request-id", b"one"), (b"x-api-key", b"key"), (b"content-length", b"16")],
    )
    assert see_whole_request(write(path="/inference/batch")) == ("/inference/batch", [(b"content-length", b"16")])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        LIVEZ,
        PLAIN[:-1],
        PLAIN + b"P",
        PLAIN + PLAIN,
        PLAIN[:40],
        write(path="/inference?a=b"),
        write(path="/inference/other"),
        write(http="1.0"),
        write(BODY, "Connection: close"),
        write(BODY, "connection: keep-alive, Upgrade", "Upgrade: h2c"),
        write(BODY, "Expect: 100-continue"),
        write(BODY, "Transfer-Encoding: chunked"),
        write(BODY, "Content-Length: 5"),
        write(BODY, "A: b\nContent-Length: 5"),
        write(BODY, "A: b", " folded"),
        write(BODY, "A : b"),
        write(BODY, "A: \0"),
        write(BODY).replace(b"POST", b"GET"),
    ],
)
def test_all_else_is_for_a_parser(data: bytes) -> None:
    assert see_whole_request(data) is None


def test_a_parser_reads_the_same() -> None:
    rng, seen = random.Random(0), 0
    pieces = [b"\r", b"\n", b"\r\n", b":", b" ", b"0", b"1", b"\t", b"x", b"\r\n\r\n", b"Connection: close\r\n", b"-"]
    for _ in range(30_000):
        data = bytearray(PLAIN)
        for _ in range(rng.choice([1, 1, 2, 3])):
            place = rng.randrange(len(data))
            data[place : place + rng.choice([0, 1, 1, 5])] = rng.choice(pieces)
        found = see_whole_request(bytes(data))
        if found is None:
            continue
        seen += 1
        path, headers = found
        reading: Any = Reading(bytes(data))  # it raises where this is no HTTP
        assert (reading.ends, reading.url, reading.parser.get_method()) == (1, path.encode(), b"POST")
        assert len(reading.body) == int(dict(headers)[b"content-length"])
        assert reading.parser.should_keep_alive()
        assert not reading.parser.should_upgrade()
        mattering = [(name, value.strip()) for name, value in headers]
        assert mattering == [(name, value.strip()) for name, value in reading.headers if name in dict(headers)]
    assert seen > 1000
