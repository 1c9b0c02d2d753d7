"""The benchmarks of overload and mixed load: what their client reads, what they count, what they call undeserved."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import soak
from client import LOST, Answer, Pool, write_request
from overload import WARM_UP_S, Tally, offer, press, tabulate
from soak import KINDS, Soak
from soak import tabulate as tabulate_soak

Reply = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(reply: Reply):
    """A server that leaves each request's answer to `reply`; gives its port."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(Answer(0, head.lower()).header("content-length") or 0)
                await reply(await reader.readexactly(length), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def say_ok(body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Le")
    await asyncio.sleep(0.001)
    writer.write(b"ngth: 4\r\n\r\nfi")
    await asyncio.sleep(0.001)
    writer.write(b"ne")


async def refuse(body: bytes, writer: asyncio.StreamWriter) -> None:
    retry = b"Retry-After: 3\r\n" if body == b"told" else b""
    writer.write(b"HTTP/1.1 429 Too Many Requests\r\n" + retry + b"Content-Length: 0\r\n\r\n")


async def hang_up(body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def be_slow(body: bytes, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.3)
    await say_ok(body, writer)


async def ask(port: int, *requests: bytes) -> list[Answer]:
    answers = []
    async with Pool(port, 1) as pool:
        for request in requests:
            while not pool.free:
                await asyncio.sleep(0.01)
            answered = asyncio.get_running_loop().create_future()
            pool.free[0].ask(request, answered.set_result)
            answers.append(await asyncio.wait_for(answered, 5))
    return answers


def test_an_answer_is_read_however_it_comes_in_pieces() -> None:
    async def run() -> list[Answer]:
        async with serving(say_ok) as port:
            return await ask(port, write_request("/", b"a"), write_request("/", b"b"))

    assert [(one.status, one.body) for one in asyncio.run(run())] == [(200, b"fine")] * 2


def test_a_connection_that_ends_is_an_answer_too_and_is_replaced() -> None:
    async def run() -> list[Answer]:
        async with serving(hang_up) as port:
            return await ask(port, write_request("/", b"a"), write_request("/", b"b"))

    assert [one.status for one in asyncio.run(run())] == [LOST, LOST]


def test_requests_come_at_their_rate_however_slow_the_answers_are() -> None:
    async def run() -> dict[str, float]:
        async with serving(be_slow) as port:
            return await offer(port, [write_request("/", b"a")], per_s=50, seconds=WARM_UP_S + 1, connections=60)

    figures = asyncio.run(run())
    assert figures["sent_per_s"] == pytest.approx(50, rel=0.05)
    assert figures["goodput_per_s"] == pytest.approx(50, rel=0.15)
    assert 300 <= figures["p50_ms"] < 500
    assert figures["others"] == 0


def test_what_finds_no_free_connection_is_said_and_not_hidden() -> None:
    async def run() -> dict[str, float]:
        async with serving(be_slow) as port:
            return await offer(port, [write_request("/", b"a")], per_s=50, seconds=1, connections=2)

    assert asyncio.run(run())["others"] > 30


def test_as_many_are_under_way_as_there_are_connections() -> None:
    async def run() -> dict[str, float]:
        async with serving(be_slow) as port:
            return await press(port, [write_request("/", b"a")], connections=3, seconds=WARM_UP_S + 1)

    assert asyncio.run(run())["goodput_per_s"] == pytest.approx(9, abs=1)


def test_refusals_without_retry_after_are_counted() -> None:
    async def run() -> dict[str, float]:
        async with serving(refuse) as port:
            bodies = [write_request("/", b"told"), write_request("/", b"left alone")]
            return await offer(port, bodies, per_s=50, seconds=1, connections=9)

    figures = asyncio.run(run())
    assert (figures["refused_share"], figures["without_retry"], figures["retry_s"]) == (1, 25, 3)
    assert figures["goodput_per_s"] == 0


def test_the_table_compares_with_the_peak() -> None:
    one = Tally(seconds=3).figures() | {"goodput_per_s": 200.0, "p50_ms": 1.0, "p99_ms": 2.0}
    table = tabulate({"peaks": [one], "rates": [{"times": 4, **one, "goodput_per_s": 150.0}]})
    assert [line.split("|")[4].strip() for line in table.splitlines()[2:]] == ["100.0", "75.0"]


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
        writer.close()

    async def ask() -> int:
        server = await asyncio.start_server(refuse, "127.0.0.1", 0)
        async with server:
            client = await soak._connect(server.sockets[0].getsockname()[1])
            request = write_request("/inference", b"x" * 50)
            answer = await asyncio.wait_for(soak._ask(client, request, "slowly", random.Random(0)), 10)
            client.transport.close()
            await asyncio.sleep(0.05)  # both ends of the connection go
            return answer.status

    assert asyncio.run(ask()) == 429
