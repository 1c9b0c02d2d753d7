"""The benchmarks of overload and mixed load: what their clients read, what they count, what they call undeserved."""

import asyncio
import json
import random
import shutil
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import overload
import pytest
import soak
from client import LOST, Answer, Connection, write_request
from overload import offer, parse, run, tabulate
from soak import KINDS, Soak
from soak import tabulate as tabulate_soak

Reply = Callable[[bytes, bytes, asyncio.StreamWriter], Awaitable[None]]
needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")


@asynccontextmanager
async def listening(handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]):
    """A server of which no connection outlives the block; gives its port."""
    transports: list[asyncio.Transport] = []

    class Protocol(asyncio.StreamReaderProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:
            transports.append(transport)
            super().connection_made(transport)

    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Protocol(asyncio.StreamReader(), handle), "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
        loop.remove_reader(
            server.sockets[0].fileno()
        )  # none is accepted any more, and those that are become connections
        for _ in range(10):
            await asyncio.sleep(0)
    for transport in transports:
        transport.abort()
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await asyncio.sleep(0)


async def hang_up_on(client: Connection) -> None:
    """End a connection, of which nothing is left then."""
    client.transport.abort()
    await asyncio.sleep(0)


@asynccontextmanager
async def serving(reply: Reply):
    """A server that leaves each request's answer to `reply`, which gets its id and body; gives its port."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                asked = Answer(0, head.lower())
                body = await reader.readexactly(int(asked.header("content-length") or 0))
                await reply((asked.header("x-request-id") or "").encode(), body, writer)
        writer.close()

    async with listening(handle) as port:
        yield port


async def say_ok(request_id: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nx-request-id: " + request_id + b"\r\nContent-Le")
    await asyncio.sleep(0.001)
    writer.write(b"ngth: 4\r\n\r\nfi")
    await asyncio.sleep(0.001)
    writer.write(b"ne")


async def refuse(request_id: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
    retry = b"retry-after: 3\r\n" if body == b"told" else b""
    writer.write(b"HTTP/1.1 429 Too Many Requests\r\n" + retry + b"Content-Length: 0\r\n\r\n")


async def hang_up(request_id: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def be_slow(request_id: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.3)
    await say_ok(request_id, body, writer)


async def ask(port: int, request: bytes) -> Answer:
    loop = asyncio.get_running_loop()
    answered = loop.create_future()
    _, connection = await loop.create_connection(Connection, "127.0.0.1", port)
    connection.ask(request, answered.set_result)
    answer = await asyncio.wait_for(answered, 5)
    await hang_up_on(connection)
    return answer


def load(folder: Path, reply: Reply, bodies: list[str], **how: Any) -> dict[str, Any]:
    """What wrk finds at such a server."""
    file = folder / "bodies.jsonl"
    file.write_text("".join(f"{body}\n" for body in bodies))

    async def run() -> dict[str, Any]:
        async with serving(reply) as port:
            return await asyncio.to_thread(offer, f"http://127.0.0.1:{port}/", file, **how)

    return asyncio.run(run())


def test_an_answer_is_read_however_it_comes_in_pieces() -> None:
    async def run() -> Answer:
        async with serving(say_ok) as port:
            return await ask(port, write_request("/", b"a"))

    answer = asyncio.run(run())
    assert (answer.status, answer.body) == (200, b"fine")


def test_a_connection_that_ends_is_an_answer_too() -> None:
    async def run() -> Answer:
        async with serving(hang_up) as port:
            return await ask(port, write_request("/", b"a"))

    assert asyncio.run(run()).status == LOST


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overload, "WARM_UP_S", 1)


@needs_wrk
def test_requests_come_at_their_rate_however_slow_the_answers_are(tmp_path: Path) -> None:
    figures = load(tmp_path, be_slow, ["a"], per_s=50, seconds=3, connections=60)
    assert 20 < figures["sent_per_s"] < 55  # where 60 connections could ask 200 times a second
    assert 0 < figures["goodput_per_s"] < 55
    assert figures["p50_ms"] >= 300
    assert figures["others"] == 0


@needs_wrk
def test_what_finds_no_free_connection_is_not_sent(tmp_path: Path) -> None:
    assert load(tmp_path, be_slow, ["a"], per_s=50, seconds=2, connections=2)["sent_per_s"] < 10


@needs_wrk
def test_as_many_are_under_way_as_there_are_connections(tmp_path: Path) -> None:
    under_way: list[int] = [0]

    async def count(request_id: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        under_way.append(under_way[-1] + 1)
        await be_slow(request_id, body, writer)
        under_way.append(under_way[-1] - 1)

    figures = load(tmp_path, count, ["a"], per_s=0, seconds=2, connections=3)
    assert max(under_way) == 3
    assert 0 < figures["goodput_per_s"] <= 12


@needs_wrk
def test_refusals_without_retry_after_are_counted(tmp_path: Path) -> None:
    figures = load(tmp_path, refuse, ["told", "left alone"], per_s=50, seconds=2, connections=9)
    assert (figures["refused_share"], figures["retry_s"], figures["goodput_per_s"]) == (1, 3, 0)
    assert figures["without_retry"] == pytest.approx(figures["sent_per_s"], abs=2)  # half of those of two seconds


@needs_wrk
def test_connections_that_end_are_counted(tmp_path: Path) -> None:
    figures = load(tmp_path, hang_up, ["a"], per_s=20, seconds=2, connections=9)
    assert figures["others"] > 9  # wrk opens them anew and asks at once


def test_each_rate_is_compared_with_the_peak_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    one = dict.fromkeys(
        ["sent_per_s", "refused_share", "without_retry", "retry_s", "p50_ms", "p99_ms", "others", "client_share"], 1.0
    )
    offered = iter([200.0, 150.0, 300.0, 240.0])
    monkeypatch.setattr(overload, "offer", lambda *_, **__: one | {"goodput_per_s": next(offered)})
    monkeypatch.setattr(overload, "PAUSE_S", 0)
    table = tabulate(run("", Path(), parse(["--times", "4", "--rounds", "2"])))  # 75% of one peak and 80 of the other
    assert [line.split("|")[4].strip() for line in table.splitlines()[2:]] == ["100.0 ± 0.0", "77.5 ± 3.5"]


GOOD = {"label": "a", "scores": {"a": 0.75, "b": 0.25}}


@pytest.mark.parametrize(
    ("name", "answer", "deserved"),
    [
        ("one text", Answer(200, body=json.dumps(GOOD).encode()), True),
        ("one text", Answer(200, body=json.dumps(GOOD | {"label": "b"}).encode()), False),
        ("one text", Answer(429, b"\r\nretry-after: 1\r\n"), True),
        ("one text", Answer(429), False),
        ("one text", Answer(500), False),
        ("one text", Answer(LOST), False),
        ("invalid JSON", Answer(422), True),
        ("invalid JSON", Answer(200, body=b"{}"), False),
        ("batch with an empty text", Answer(200, body=b'{"predictions": [{}, {"error": ""}, {}]}'), True),
        ("batch with an empty text", Answer(200, body=b'{"predictions": [{"error": ""}, {}, {}]}'), False),
        ("hung up in the middle", Answer(LOST), True),
    ],
)
def test_an_answer_is_held_against_what_was_deserved(name: str, answer: Answer, deserved: bool) -> None:
    found = Soak(["a film"], 1)
    found._judge(name, KINDS[name], answer)
    assert bool(found.undeserved) != deserved
    assert sum(found.statuses[name].values()) == 1


def test_memory_that_grows_has_a_slope() -> None:
    found = Soak(["a film"], 300)
    found.memory = [(0, 50 << 20), *((60.0 * minute, (100 + 3 * minute) << 20) for minute in range(1, 6))]
    assert found.growth() == pytest.approx(3 << 20)
    assert "| 50.0 | 103.0 | 115.0 | 115.0 | 3.0 |" in tabulate_soak(found)


def test_an_answer_that_comes_before_a_slow_request_is_sent_is_not_lost() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\ncontent-length: 2\r\n\r\n{}")
        await reader.read()

    async def ask() -> int:
        async with listening(refuse) as port:
            client = await soak._connect(port)
            request = write_request("/inference", b"x" * 50)
            answer = await asyncio.wait_for(soak._ask(client, request, "slowly", random.Random(0)), 10)
            await hang_up_on(client)
            return answer.status

    assert asyncio.run(ask()) == 429
