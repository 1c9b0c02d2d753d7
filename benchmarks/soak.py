"""Minutes of everything that clients do to a server (`run.py serve`), each answer held against the deserved one.

    .venv/bin/python benchmarks/soak.py --minutes 10                   the embedded reviews
    .venv/bin/python benchmarks/soak.py --data FOLDER --store FOLDER   the sentences of FOLDER/sst2, a trained model

Prints how often each kind of request was answered how, and the server's memory. Ends with 1 if an answer was none that
its request deserved, or the server has ended.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from client import LOST, Answer, Connection, write_request
from serve import Bench, say
from servers import CONTENDERS, OURS, Server
from tables import join

from tuneserve.settings import Settings

CLIENTS = 16
LARGEST_BATCH = 500
SAMPLE_S = 5.0
ANSWER_S = 60.0
SETTLED_S = 60.0
"""Seconds after which memory is expected to grow no more."""
FULL = 429
"""May always be answered: so many clients with large batches can fill the queue."""


@dataclass(frozen=True)
class Kind:
    """A kind of request: what is sent, which statuses it deserves, and whether the body of a 200 is right."""

    weight: int
    make: Callable[[random.Random, Sequence[str]], bytes]
    deserved: tuple[int, ...]
    right: Callable[[Any], bool] = lambda body: True
    manner: str = "at once"


def _one(text: str, *headers: str) -> bytes:
    return write_request("/inference", json.dumps({"text": text}).encode(), *headers)


def _batch(draw: random.Random, texts: Sequence[str]) -> bytes:
    chosen = draw.choices(texts, k=round(LARGEST_BATCH ** draw.random()))  # small ones are as frequent as large ones
    return write_request("/inference/batch", json.dumps({"texts": chosen}).encode())


def _with_empty(draw: random.Random, texts: Sequence[str]) -> bytes:
    return write_request(
        "/inference/batch", json.dumps({"texts": [draw.choice(texts), "", draw.choice(texts)]}).encode()
    )


def _raw(body: bytes, path: str = "/inference") -> Callable[[random.Random, Sequence[str]], bytes]:
    return lambda draw, texts: write_request(path, body)


def _is_answer(body: Any) -> bool:
    return abs(sum(body["scores"].values()) - 1) < 1e-6 and body["label"] == max(body["scores"], key=body["scores"].get)


def _errors(body: Any) -> list[bool]:
    return ["error" in one for one in body["predictions"]]


KINDS = {
    "one text": Kind(30, lambda draw, texts: _one(draw.choice(texts)), (200,), _is_answer),
    "batch of 1 to 500": Kind(6, _batch, (200,), lambda body: not any(_errors(body))),
    "batch with an empty text": Kind(4, _with_empty, (200,), lambda body: _errors(body) == [False, True, False]),
    "huge text": Kind(2, lambda draw, texts: _one(" ".join(draw.choices(texts, k=4000))), (200,), _is_answer),
    "empty text": Kind(4, lambda draw, texts: _one(draw.choice(["", " \n"])), (422,)),
    "invalid JSON": Kind(4, _raw(b'{"text": "a'), (422,)),
    "wrong fields": Kind(4, _raw(b'{"texts": 5}', "/inference/batch"), (422,)),
    "no UTF-8": Kind(4, _raw(b'{"text": "\xff\xfe"}'), (422,)),
    "too large": Kind(2, _raw(b'{"text": "' + b"film " * 220_000 + b'"}'), (413,)),
    "unknown route": Kind(2, _raw(b"{}", "/predict"), (404,)),
    "wrong method": Kind(2, lambda draw, texts: write_request("/inference", b"", method="GET"), (405,)),
    "a deadline too short": Kind(
        2, lambda draw, texts: _one(draw.choice(texts), "X-Request-Timeout-S: 0.001"), (504, 200)
    ),
    "slow client": Kind(4, lambda draw, texts: _one(draw.choice(texts)), (200,), _is_answer, "slowly"),
    "hung up before the answer": Kind(8, _batch, (LOST,), manner="hang up"),
    "hung up in the middle": Kind(8, lambda draw, texts: _one(draw.choice(texts)), (LOST,), manner="half"),
}


@dataclass
class Soak:
    """What was found out."""

    texts: Sequence[str]
    seconds: float
    statuses: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in KINDS})
    undeserved: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)

    async def run(self, server: Server) -> None:
        """Let all clients do what they do until the time is over."""
        self.began = time.perf_counter()
        clients = [asyncio.ensure_future(self._be_client(server.port, number)) for number in range(CLIENTS)]
        while self._elapsed() < self.seconds:
            self.memory.append((self._elapsed(), server.memory_bytes()))
            await asyncio.sleep(SAMPLE_S)
        await asyncio.gather(*clients)
        self.memory.append((self._elapsed(), server.memory_bytes()))

    def _elapsed(self) -> float:
        return time.perf_counter() - self.began

    async def _be_client(self, port: int, number: int) -> None:
        draw, kept = random.Random(number), None
        names, weights = list(KINDS), [kind.weight for kind in KINDS.values()]
        while self._elapsed() < self.seconds:
            [name] = draw.choices(names, weights)
            kind = KINDS[name]
            try:
                if kept is None or kept.ended:
                    kept = await _connect(port)
                answer = await _ask(kept, kind.make(draw, self.texts), kind.manner, draw)
            except (OSError, TimeoutError) as error:
                self.undeserved.append(f"{name}: {error!r}")
                kept = None
                continue
            self._judge(name, kind, answer)
            if answer.status == FULL:
                await asyncio.sleep(float(answer.header("retry-after") or 1) * draw.random())
                kept.transport.close()
                kept = None

    def _judge(self, name: str, kind: Kind, answer: Answer) -> None:
        self.statuses[name][str(answer.status) if answer.status else "no answer"] += 1
        deserved = answer.status in kind.deserved or (
            answer.status == FULL and answer.header("retry-after") is not None
        )
        if not deserved or (answer.status == 200 and not kind.right(json.loads(answer.body))):
            self.undeserved.append(f"{name}: {answer.status} {answer.body[:200]!r}")

    def growth(self) -> float:
        """Bytes of memory a minute that were added after it should have settled: the slope of a straight line."""
        late = [(at / 60, held) for at, held in self.memory if at >= min(SETTLED_S, self.seconds / 2)]
        middle = sum(at for at, _ in late) / len(late)
        mean = sum(held for _, held in late) / len(late)
        spread = sum((at - middle) ** 2 for at, _ in late)
        return sum((at - middle) * (held - mean) for at, held in late) / spread if spread else 0.0


class Client(Connection):
    """A connection that knows whether it has ended."""

    def __init__(self) -> None:
        super().__init__(self._end)
        self.ended = False

    def _end(self, connection: Connection) -> None:
        self.ended = True


async def _connect(port: int) -> Client:
    _, client = await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", port)
    return client


async def _ask(client: Client, request: bytes, manner: str, draw: random.Random) -> Answer:
    answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def done(answer: Answer) -> None:
        if not answered.done():
            answered.set_result(answer)

    if manner == "half":
        client.transport.write(request[: draw.randrange(1, len(request))])
        await asyncio.sleep(draw.random() / 10)
        client.transport.close()
        client.ended = True
        return Answer(LOST)
    if manner == "slowly":
        client.expect(done)
        pieces = [request[place : place + 40] for place in range(0, len(request), 40)]
        for piece in pieces[:-1]:
            client.transport.write(piece)
            await asyncio.sleep(0.2)
        client.transport.write(pieces[-1])
    else:
        client.ask(request, done)
    if manner == "hang up":
        await asyncio.sleep(draw.random() / 200)
        client.transport.abort()
        client.ended = True
        return Answer(LOST)
    return await asyncio.wait_for(answered, ANSWER_S)


def tabulate(soak: Soak) -> str:
    """How often each kind was answered how, then the memory."""
    found = sorted({status for counts in soak.statuses.values() for status in counts})
    rows = [["request", "deserved", *found], ["---"] * (2 + len(found))]
    for name, counts in soak.statuses.items():
        deserved = " or ".join(str(status) if status else "no answer" for status in KINDS[name].deserved)
        rows.append([name, deserved, *(f"{counts[status]:,}" if counts[status] else "" for status in found)])
    settled = next((held for at, held in soak.memory if at >= min(SETTLED_S, soak.seconds / 2)), soak.memory[-1][1])
    held = [soak.memory[0][1], settled, soak.memory[-1][1], max(held for _, held in soak.memory), soak.growth()]
    memory = [
        ["memory MiB, start", "after 1 min", "at the end", "most", "slope after 1 min, MiB a minute"],
        ["---"] * 5,
        [f"{one / 2**20:.1f}" for one in held],
    ]
    total = sum(sum(counts.values()) for counts in soak.statuses.values())
    return "\n\n".join([join(rows), join(memory), f"{total:,} requests, {len(soak.undeserved)} undeserved answers."])


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    environment = {name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields}
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(options, environment, Path(temporary))
        rows = bench.prepare()["short"]
        bench.find_model()
        soak = Soak([text for text, _ in rows], options.minutes * 60)
        place = {"store": bench.store.resolve(), "checkpoint": bench.checkpoint, "folder": Path(temporary)}
        with Server(CONTENDERS[OURS], **place, base=environment) as server:
            server.wait_until_right(*zip(*rows, strict=True))
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(soak.run(server))
            server.wait_until_right(*zip(*rows, strict=True))  # which fails if it has ended
    print(tabulate(soak))
    for one in soak.undeserved[:20]:
        say(one)
    return int(bool(soak.undeserved))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="(default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder with sst2/ and imdb/ (default: the embedded reviews)")
    parser.add_argument("--store", type=Path, help="store with a trained model (default: train one on the texts)")
    parser.add_argument("--texts", type=int, default=400, help="different texts (default: %(default)s)")
    parser.set_defaults(peers=[])
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
