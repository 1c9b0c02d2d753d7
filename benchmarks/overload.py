"""What a server does when more comes than it can answer: `run.py serve`, and requests at a constant rate.

    .venv/bin/python benchmarks/overload.py                        the embedded reviews: three minutes on two cores
    .venv/bin/python benchmarks/overload.py --data FOLDER          the sentences of FOLDER/sst2
    .venv/bin/python benchmarks/overload.py --store FOLDER --times 1,8 --seconds 5

First the peak is measured: as many requests under way as there are `--connections`, each sent when one is answered.
Then requests come at multiples of it, each at its time, answered the ones before or not, on kept connections. Latency
counts from that time. Goodput is what was answered 200 in a second. The client runs on the same cores; its share is
shown.
"""

import argparse
import asyncio
import json
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from statistics import quantiles
from typing import Any

import uvloop
from client import Answer, Connection, Pool, write_request
from serve import Bench, say
from servers import CONTENDERS, OURS, Server
from tables import join, spread

from tuneserve.settings import Settings

WARM_UP_S = 2.0
"""Seconds at the beginning of each measurement that do not count: the queue fills."""
PATIENCE_S = 60.0
TICK_S = 0.001


@dataclass
class Tally:
    """What became of the requests of one measurement."""

    seconds: float
    began: float = field(default_factory=time.perf_counter)
    sent: int = 0
    unsent: int = 0
    answered_in_time: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    retries_s: list[int] = field(default_factory=list)
    cpu_s: float = field(default_factory=lambda: -_cpu_s())

    def count(self, answer: Answer, due: float) -> None:
        """Note an answer to what should have been sent at `due`."""
        now = time.perf_counter()
        self.statuses[answer.status] += 1
        if answer.status == 200:
            self.latencies_s.append(now - due)
            self.answered_in_time += WARM_UP_S <= now - self.began < self.seconds
        elif retry := answer.header("retry-after"):
            self.retries_s.append(int(retry))

    def stop_clock(self) -> None:
        """The last request has been sent."""
        self.cpu_s += _cpu_s()

    def figures(self) -> dict[str, Any]:
        """All that a table shows."""
        answered = sum(self.statuses.values())
        cuts = quantiles(self.latencies_s, n=100) if len(self.latencies_s) > 1 else [float("nan")] * 99
        return {
            "sent_per_s": self.sent / self.seconds,
            "goodput_per_s": self.answered_in_time / (self.seconds - WARM_UP_S),
            "refused_share": self.statuses[429] / max(answered, 1),
            "without_retry": self.statuses[429] - len(self.retries_s),
            "retry_s": max(self.retries_s, default=None),
            "p50_ms": 1000 * cuts[49],
            "p99_ms": 1000 * cuts[98],
            "others": answered - self.statuses[200] - self.statuses[429] + self.unsent,
            "client_share": self.cpu_s / self.seconds,
        }


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def press(port: int, requests: Sequence[bytes], *, connections: int, seconds: float) -> dict[str, Any]:
    """Keep as many requests under way as there are connections."""
    async with Pool(port, connections) as pool:
        tally, turn, under_way = Tally(seconds), cycle(requests), asyncio.Event()

        def go(connection: Connection) -> None:
            due = time.perf_counter()
            if due - tally.began > seconds:
                under_way.set()
                return
            tally.sent += 1

            def done(answer: Answer) -> None:
                tally.count(answer, due)
                if answer.status:
                    go(connection)

            connection.ask(next(turn), done)

        for connection in list(pool.free):
            go(connection)
        await under_way.wait()
        tally.stop_clock()
        await _until(lambda: sum(tally.statuses.values()) >= tally.sent)
        return tally.figures()


async def offer(
    port: int, requests: Sequence[bytes], *, per_s: float, seconds: float, connections: int
) -> dict[str, Any]:
    """Send a request whenever its time has come, whatever became of those before it."""
    async with Pool(port, connections) as pool:
        tally, turn = Tally(seconds), cycle(requests)

        def go(due: float) -> None:
            if not pool.free:
                tally.unsent += 1
                return
            connection = pool.free.popleft()
            tally.sent += 1

            def done(answer: Answer) -> None:
                tally.count(answer, due)
                if answer.status:
                    pool.free.append(connection)

            connection.ask(next(turn), done)

        total, number = int(per_s * seconds), 0
        while number < total:
            for one in range(number, min(total, int((time.perf_counter() - tally.began) * per_s))):
                go(tally.began + one / per_s)
                number = one + 1
            await asyncio.sleep(TICK_S)
        tally.stop_clock()
        await _until(lambda: sum(tally.statuses.values()) >= tally.sent)
        return tally.figures()


async def _until(done: Callable[[], bool]) -> None:
    deadline = time.perf_counter() + PATIENCE_S
    while not done() and time.perf_counter() < deadline:
        await asyncio.sleep(0.01)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    environment = {name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields}
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(options, environment, Path(temporary))
        rows = bench.prepare()["short"]
        bench.find_model()
        requests = [write_request("/inference", json.dumps({"text": text}).encode()) for text, _ in rows]
        place = {"store": bench.store.resolve(), "checkpoint": bench.checkpoint, "folder": Path(temporary)}
        with Server(CONTENDERS[OURS], **place, base=environment) as server:
            server.wait_until_right(*zip(*rows, strict=True))
            record = run(server.port, requests, options)
            record["memory_bytes"] = server.memory_bytes()
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(tabulate(record))
    return 0


def run(port: int, requests: Sequence[bytes], options: argparse.Namespace) -> dict[str, Any]:
    """The peak, then each rate, as often as there are rounds; the rates are those of the first peak."""
    record: dict[str, Any] = {"peaks": [], "rates": []}
    for _ in range(options.rounds):
        load = {"connections": options.connections, "seconds": options.seconds}
        record["peaks"].append(measured(press(port, requests, **load)))
        peak = record["peaks"][0]["goodput_per_s"]
        say(f"peak: {record['peaks'][-1]['goodput_per_s']:.0f} requests/s")
        for times in options.times:
            load = {"per_s": times * peak, "seconds": options.seconds, "connections": options.pool}
            figures = measured(offer(port, requests, **load))
            record["rates"].append({"times": times, **figures})
            say(f"{times:g} times: {figures['goodput_per_s']:.0f} requests/s")
            time.sleep(1)
    return record


def measured(work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """What the work finds, in an event loop of its own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


COLUMNS = {
    "sent/s": ("sent_per_s", 1, 0),
    "goodput/s": ("goodput_per_s", 1, 0),
    "of peak %": ("of_peak", 100, 1),
    "429 %": ("refused_share", 100, 1),
    "429 without Retry-After": ("without_retry", 1, 0),
    "Retry-After, most s": ("retry_s", 1, 0),
    "accepted: p50 ms": ("p50_ms", 1, 0),
    "p99 ms": ("p99_ms", 1, 0),
    "anything else": ("others", 1, 0),
    "client's share of a core %": ("client_share", 100, 0),
}


def tabulate(record: dict[str, Any]) -> str:
    """A row for the peak and one for each rate: mean ± standard deviation over the rounds."""
    peak = sum(one["goodput_per_s"] for one in record["peaks"]) / len(record["peaks"])
    groups = {"peak": record["peaks"]}
    for one in record["rates"]:
        groups.setdefault(f"{one['times']:g} ×", []).append(one)
    rows = [["load", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for name, own in groups.items():
        known = [{**one, "of_peak": one["goodput_per_s"] / peak} for one in own]
        rows.append(
            [name, *(spread([one[key] for one in known], scale, digits) for key, scale, digits in COLUMNS.values())]
        )
    return join(rows)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with sst2/ and imdb/ (default: the embedded reviews)")
    parser.add_argument("--store", type=Path, help="store with a trained model (default: train one on the texts)")
    parser.add_argument("--texts", type=int, default=400, help="different texts (default: %(default)s)")
    parser.add_argument(
        "--times", type=_numbers, default=[0.5, 1, 2, 4], help="rates, by the peak (default: 0.5,1,2,4)"
    )
    parser.add_argument("--connections", type=int, default=128, help="of the peak (default: %(default)s)")
    parser.add_argument("--pool", type=int, default=1200, help="connections beyond it (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=12, help="of each measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.set_defaults(peers=[])
    return parser.parse_args(arguments)


def _numbers(text: str) -> list[float]:
    return [float(one) for one in text.split(",")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
