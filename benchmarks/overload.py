"""What a server does when more comes than it can answer: `run.py serve`, and requests at a constant rate.

    .venv/bin/python benchmarks/overload.py                        the embedded reviews: three minutes on two cores
    .venv/bin/python benchmarks/overload.py --data FOLDER          the sentences of FOLDER/sst2
    .venv/bin/python benchmarks/overload.py --store FOLDER --times 1,8 --seconds 5

First the peak is measured: as many requests under way as there are `--connections`, each sent when one is answered.
Then wrk sends requests at multiples of it, each at its time whatever became of those before, on kept connections; what
finds none free is not sent, so a row counts for its rate only if "sent/s" is that. Goodput is what was answered 200 in
a second. wrk has a core to itself and the server has the others, for a client's work is not the server's loss; with
`--together`, or one core, they share all, and the client's share says what that costs.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import quantiles
from typing import Any

from load import has_wrk, run_wrk, write_bodies
from serve import Bench, say
from servers import CONTENDERS, OURS, Server
from tables import join, spread

from tuneserve.settings import Settings

WARM_UP_S = 2
"""Seconds at the beginning of each measurement that do not count: the queue fills."""
PAUSE_S = 5
"""Seconds in which the server ends what wrk asked for and left."""


def offer(address: str, bodies: Path, *, per_s: float, seconds: int, connections: int) -> dict[str, Any]:
    """Send requests at a rate; 0 for as many under way as there are connections.

    Returns:
        All that a table shows.

    Raises:
        BenchError: wrk ended without figures.
    """
    used_s = _children_s()
    load = {"connections": connections, "seconds": seconds}
    found = run_wrk("offer.lua", address, bodies, per_s, WARM_UP_S, seconds, **load)
    statuses = {int(status): count for status, count in found["statuses"].items()}
    accepted, refused, answered = statuses.get(200, 0), statuses.get(429, 0), sum(statuses.values())
    cuts = quantiles(found["latencies_us"], n=100) if accepted > 1 else [float("nan")] * 99
    return {
        "sent_per_s": found["sent"] / seconds,
        "goodput_per_s": found["in_time"] / (seconds - WARM_UP_S),
        "refused_share": refused / max(answered, 1),
        "without_retry": found["unsaid"],
        "retry_s": found["retry_s"] if refused > found["unsaid"] else None,
        "p50_ms": cuts[49] / 1000,
        "p99_ms": cuts[98] / 1000,
        "others": answered - accepted - refused + found["broken"],
        "client_share": (_children_s() - used_s) / seconds,
    }


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if not has_wrk():
        print("wrk makes the load and is not installed: apt-get install wrk (brew install wrk).", file=sys.stderr)
        return 2
    environment = {name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields}
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(options, environment, Path(temporary))
        rows = bench.prepare()["short"]
        bench.find_model()
        bodies = write_bodies(CONTENDERS[OURS], [text for text, _ in rows], Path(temporary) / "bodies.jsonl")
        place = {"store": bench.store.resolve(), "checkpoint": bench.checkpoint, "folder": Path(temporary)}
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        apart = len(cores) > 1 and not options.together
        if apart:
            os.sched_setaffinity(0, cores[:-1])  # which the server inherits
        with Server(CONTENDERS[OURS], **place, base=environment) as server:
            if apart:
                os.sched_setaffinity(0, cores[-1:])
            server.wait_until_right(*zip(*rows, strict=True))
            record = run(f"http://127.0.0.1:{server.port}/inference", bodies, options)
            record["memory_bytes"] = server.memory_bytes()
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(tabulate(record))
    return 0


def run(address: str, bodies: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The peak, then each multiple of it, as often as there are rounds."""
    record: dict[str, Any] = {"peaks": [], "rates": []}
    for _ in range(options.rounds):
        figures = offer(address, bodies, per_s=0, seconds=options.seconds, connections=options.connections)
        peak = figures["goodput_per_s"]
        record["peaks"].append({"of_peak": 1.0, **figures})
        say(f"peak: {figures['goodput_per_s']:.0f} requests/s")
        for times in options.times:
            figures = offer(address, bodies, per_s=times * peak, seconds=options.seconds, connections=options.pool)
            record["rates"].append({"times": times, "of_peak": figures["goodput_per_s"] / peak, **figures})
            say(f"{times:g} times: {figures['goodput_per_s']:.0f} requests/s")
            time.sleep(PAUSE_S)
    return record


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
    groups = {"peak": record["peaks"]}
    for one in record["rates"]:
        groups.setdefault(f"{one['times']:g} ×", []).append(one)
    rows = [["load", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for name, own in groups.items():
        rows.append(
            [name, *(spread([one[key] for one in own], scale, digits) for key, scale, digits in COLUMNS.values())]
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
    parser.add_argument("--pool", type=int, default=2000, help="connections beyond it (default: %(default)s)")
    parser.add_argument("--together", action="store_true", help="let wrk and the server share all cores")
    parser.add_argument("--seconds", type=int, default=12, help="of each measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.set_defaults(peers=[])
    return parser.parse_args(arguments)


def _numbers(text: str) -> list[float]:
    return [float(one) for one in text.split(",")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
