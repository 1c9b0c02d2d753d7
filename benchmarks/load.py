"""What is sent to a server: each text once, to see whether it is right, and many at once from wrk, to see how fast."""

import asyncio
import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from client import LOST, Answer, Connection, write_request
from servers import BenchError, Contender, last_line

PATIENCE_S = 60
"""Seconds after which wrk counts an answer as late."""
GRACE_S = 120
"""Seconds that wrk gets beyond its own; it waits for nothing, so these only pass when it hangs."""
AT_ONCE = 32


def has_wrk() -> bool:
    """Whether wrk is installed."""
    return shutil.which("wrk") is not None


def write_bodies(contender: Contender, texts: Sequence[str], path: Path) -> Path:
    """A file with a line a text: the body that asks this server for it."""
    path.write_bytes(b"".join(contender.encode(text) + b"\n" for text in texts))
    return path


def press(contender: Contender, port: int, bodies: Path, *, connections: int, seconds: int) -> dict[str, Any]:
    """Keep as many requests under way as there are connections, for some seconds.

    Returns:
        As `read_figures`.

    Raises:
        BenchError: wrk ended without figures.
    """
    address = f"http://127.0.0.1:{port}{contender.path}"
    return read_figures(run_wrk("post.lua", address, bodies, connections=connections, seconds=seconds))


def run_wrk(script: str, address: str, *arguments: object, connections: int, seconds: int) -> dict[str, Any]:
    """The JSON that a script of wrk's prints at its end.

    Raises:
        BenchError: wrk ended without it.
    """
    load = ["--threads", "1", "--connections", str(connections), "--duration", f"{seconds}s"]
    command = ["wrk", *load, "--timeout", f"{PATIENCE_S}s", "--script", str(Path(__file__).with_name(script))]
    try:
        done = subprocess.run(
            [*command, address, "--", *map(str, arguments)], capture_output=True, text=True, timeout=seconds + GRACE_S
        )
    except subprocess.TimeoutExpired as error:
        raise BenchError("wrk hangs") from error
    if done.returncode:
        raise BenchError(f"wrk ended with {done.returncode}: {last_line(done.stderr or done.stdout)}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise BenchError(f"wrk printed no figures: {last_line(done.stdout)}")
    figures: dict[str, Any] = json.loads(lines[-1])
    return figures


def read_figures(printed: dict[str, Any]) -> dict[str, Any]:
    """What `post.lua` printed.

    Returns:
        `requests_per_s` that were answered and not refused; `p50_ms` and `p99_ms` of all answers, None without any;
        `errors`: answers of 400 and above, connections that failed, and answers that came too late.
    """
    answers = printed["answers"]
    return {
        "requests_per_s": (answers - printed["refused"]) / (printed["duration_us"] / 1e6),
        "p50_ms": printed["p50_us"] / 1e3 if answers else None,
        "p99_ms": printed["p99_us"] / 1e3 if answers else None,
        "errors": printed["refused"] + printed["unanswered"] + printed["late"],
    }


def press_without_wrk(
    contender: Contender, port: int, bodies: Path, *, connections: int, seconds: float
) -> dict[str, Any]:
    """As `press`, by a client in Python, which takes more of the machine for itself."""
    lines = bodies.read_bytes().splitlines()
    return asyncio.run(_press([write_request(contender.path, line) for line in lines], port, connections, seconds))


async def _press(requests: Sequence[bytes], port: int, connections: int, seconds: float) -> dict[str, Any]:
    running, took, errors = asyncio.get_running_loop(), list[float](), 0
    began = time.perf_counter()

    async def ask_on(first: int) -> None:
        nonlocal errors
        number, client = first, None
        while (sent := time.perf_counter()) < began + seconds:
            if client is None:
                _, client = await running.create_connection(Connection, "127.0.0.1", port)
            answered: asyncio.Future[Answer] = running.create_future()
            client.ask(requests[number % len(requests)], answered.set_result)
            status = (await asyncio.wait_for(answered, PATIENCE_S)).status
            number += connections
            if status == 200:
                took.append(1e3 * (time.perf_counter() - sent))
            else:
                errors += 1
            if status == LOST:
                client = None
        if client is not None:
            client.transport.close()

    await asyncio.gather(*map(ask_on, range(connections)))
    took.sort()
    p50, p99 = (took[int(share * (len(took) - 1))] if took else None for share in (0.5, 0.99))
    rate = len(took) / (time.perf_counter() - began)
    return {"requests_per_s": rate, "p50_ms": p50, "p99_ms": p99, "errors": errors}


def examine(
    contender: Contender, port: int, texts: Sequence[str], labels: Sequence[str], reference: Sequence[str]
) -> dict[str, Any]:
    """Ask for every text once, several at a time, so that a server that batches does so.

    Returns:
        `accuracy`, the share answered with its label; `agreement`, with the reference's; `unanswered`, their number.
    """

    def ask(text: str) -> str | None:
        try:
            return contender.ask(port, text)
        except BenchError:
            return None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(ask, texts))
    return {
        "accuracy": share_equal(answers, labels),
        "agreement": share_equal(answers, reference),
        "unanswered": answers.count(None),
    }


def share_equal(answers: Sequence[str | None], labels: Sequence[str]) -> float:
    """The share of answers that are the label in their place."""
    return sum(answer == label for answer, label in zip(answers, labels, strict=True)) / len(labels)
