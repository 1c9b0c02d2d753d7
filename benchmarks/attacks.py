"""What hostile clients cost a server: its memory, and how long others wait for their answers meanwhile.

    .venv/bin/python benchmarks/attacks.py --store models                  every attack, five minutes on two cores
    .venv/bin/python benchmarks/attacks.py --store models --only pipelined,words
    .venv/bin/python benchmarks/attacks.py --store models --tree OTHER     the server of another checkout

Each attack meets a `run.py serve` of its own over real sockets, from a process of its own. Meanwhile a client asks for
`/livez` and a short text by turns; the slowest of its answers counts, refusals too. Memory is what the system says of
the server's process (VmRSS), every 10 ms, above what it was before the attack; it is looked at once more when the
attackers have left.
"""

import argparse
import asyncio
import http.client
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tables import join

PROJECT = Path(__file__).resolve().parents[1]
KEY = "the key"
START_S, LEAVE_S, PROBE_S = 120, 3, 60
MIB = 1 << 20


@dataclass(frozen=True)
class Attack:
    """Connections that each send the same bytes, one time after another; `reads` says whether they read the answers."""

    words: str
    connections: int
    content: bytes
    repeats: int = 1
    reads: bool = True
    keyed: bool = False


def post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def one(text: str) -> bytes:
    return post("/inference", json.dumps({"text": text}).encode())


def many(text: str, count: int) -> bytes:
    return post("/inference/batch", json.dumps({"texts": [text] * count}).encode())


REVIEW = "A warm film, and never a dull one; we left the house late and were glad that it took so long. " * 3
ATTACKS = {
    "words": Attack("a word of 1 MB, 8 at once, twice", 8, one("a" * (MIB - 100)), 2),
    "breaks": Attack("`<br` and 100 KB of spaces, 4 at once", 4, one("<br" + " " * 100_000)),
    "quotes": Attack('1 MB of `"`, 8 at once, twice', 8, one('"' * (MIB // 2 - 100)), 2),
    "pipelined": Attack(
        "50 connections, 16,000 requests on each, no answer read",
        50,
        b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n" * 16_000,
        reads=False,
    ),
    "keyless": Attack("600 bodies of 1 MB without the key", 600, one("a" * (MIB - 100)), keyed=True),
    "empty": Attack("340,000 empty strings, 4 at once, five times", 4, many("", 262_000), 5),
    "bodies": Attack("64 batches of 1 MB at once", 64, many(REVIEW, (MIB - 100) // (len(REVIEW) + 4))),
}


async def assail(attack: Attack, port: int, seconds: float) -> None:
    """Send and read on all connections at once, for so many seconds at most."""

    async def connect() -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(attack.repeats):
                writer.write(attack.content)
                if attack.reads:
                    await read_answer(reader)
            if not attack.reads:
                await asyncio.sleep(seconds)
            writer.close()

    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.gather(*(connect() for _ in range(attack.connections)))


async def read_answer(reader: asyncio.StreamReader) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), b":0")
    await reader.readexactly(int(length.split(b":")[1]))


class Others:
    """A client that does no harm: how long its answers take, and which they are."""

    def __init__(self, port: int) -> None:
        self.slowest_s, self.statuses = 0.0, Counter[int]()
        self._port, self._over = port, threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        while not self._over.wait(0.02):
            for method, path, body in (("GET", "/livez", None), ("POST", "/inference", '{"text": "A warm film."}')):
                began = time.monotonic()
                connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PROBE_S)
                try:
                    connection.request(method, path, body, {"X-API-Key": KEY})
                    answer = connection.getresponse()
                    answer.read()
                    self.statuses[answer.status] += 1
                except OSError:
                    self.statuses[0] += 1
                connection.close()
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)

    def end(self) -> None:
        """Ask no more."""
        self._over.set()
        self._thread.join()


class Memory:
    """The largest resident memory of a process, in MB, until `end`."""

    def __init__(self, pid: int) -> None:
        self._pid, self._over = pid, threading.Event()
        self.peak = self.now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def now(self) -> float:
        """What it is at this moment."""
        status = Path(f"/proc/{self._pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.peak = max(self.peak, self.now())

    def end(self) -> None:
        """Look no more."""
        self._over.set()
        self._thread.join()


@contextmanager
def serving(tree: Path, store: Path, folder: Path, *, keyed: bool) -> Iterator[tuple[int, int]]:
    """A server that is ready and warm: its port and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = {
        **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        **{"MODEL_PATH": str(store), "LOG_PATH": str(folder), "DATA_PATH": str(folder), "PORT": str(port)},
        **({"API_KEY": KEY} if keyed else {}),
    }
    with (folder / "server.txt").open("w") as log:
        command = [sys.executable, str(tree / "production" / "docker-res" / "run.py"), "serve"]
        server = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_S
        while not answers(port):
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit((folder / "server.txt").read_text())
            time.sleep(0.1)
        for request in (one(REVIEW), many(REVIEW, 30)) * 5:
            asyncio.run(assail(Attack("", 4, request), port, 30))
        yield port, server.pid
    finally:
        server.send_signal(signal.SIGKILL)
        server.wait()


def answers(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False


def measure(attack: Attack, tree: Path, store: Path, seconds: float) -> list[str]:
    with tempfile.TemporaryDirectory() as folder, serving(tree, store, Path(folder), keyed=attack.keyed) as (port, pid):
        memory = Memory(pid)
        idle, others = memory.now(), Others(port)
        attacker = multiprocessing.Process(target=run, args=[attack, port, seconds])
        attacker.start()
        attacker.join()
        time.sleep(LEAVE_S)
        others.end()
        memory.end()
        statuses = ", ".join(f"{count} × {status or 'none'}" for status, count in sorted(others.statuses.items()))
        figures = f"{memory.peak - idle:.0f}", f"{memory.now() - idle:.0f}", f"{others.slowest_s:.2f}"
        return [attack.words, *figures, statuses]


def run(attack: Attack, port: int, seconds: float) -> None:
    asyncio.run(assail(attack, port, seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description="What hostile clients cost a server.")
    parser.add_argument("--store", type=Path, required=True, help="the MODEL_PATH to serve")
    parser.add_argument("--tree", type=Path, default=PROJECT, help="the checkout whose server is attacked")
    parser.add_argument("--only", default=",".join(ATTACKS), help="names of attacks")
    parser.add_argument("--seconds", type=float, default=20, help="that an attack may take")
    options = parser.parse_args()
    header = ["attack", "peak RSS over idle, MB", "after it, MB", "slowest other answer, s", "other answers"]
    rows = [header, ["---"] * len(header)]
    for name in options.only.split(","):
        rows.append(measure(ATTACKS[name], options.tree.absolute(), options.store.absolute(), options.seconds))
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    print(join(rows))


if __name__ == "__main__":
    main()
