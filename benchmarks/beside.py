"""What a busy model that writes costs a classifier in the same server (`MODELS=FOLDER run.py serve`).

    .venv/bin/python benchmarks/beside.py                        tiny models, as the tests make them
    .venv/bin/python benchmarks/beside.py --version FOLDER --writer FOLDER

Clients ask the classifier for one short text after another, by turns alone and while others have texts written without
pause.
"""

import argparse
import asyncio
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import httpx
from client import Answer, Connection, write_request
from many import make_version, server
from tables import join

from tuneserve.settings import PROJECT

ANSWER_S = 300.0


@dataclass(frozen=True)
class Turn:
    """What clients of the classifier saw, and the tokens that were written meanwhile."""

    per_s: float
    p50_ms: float
    p99_ms: float
    tokens_per_s: float


async def ask_on(port: int, request: bytes, until: float, seconds: list[float]) -> None:
    """Ask the same again and again, and note how long each answer took."""
    _, client = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    while (began := time.perf_counter()) < until:
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        client.ask(request, answered.set_result)
        if (answer := await asyncio.wait_for(answered, ANSWER_S)).status != 200:
            raise SystemExit(f"{answer.status}: {answer.body[:300]!r}")
        seconds.append(time.perf_counter() - began)
    client.transport.close()


async def take_turn(port: int, options: argparse.Namespace, writers: int) -> Turn:
    """One measurement with so many texts under way."""
    parameters = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens}
    short = write_request("/models/classifier/invoke", b'{"inputs": "the film was good"}')
    long = write_request("/models/writer/invoke", json.dumps({"inputs": "a film", "parameters": parameters}).encode())
    until, before, seconds = time.perf_counter() + options.seconds, written(port), list[float]()
    await asyncio.gather(
        *(ask_on(port, long, until, []) for _ in range(writers)),
        *(ask_on(port, short, until, seconds) for _ in range(options.clients)),
    )
    took = options.seconds + time.perf_counter() - until
    cuts = quantiles(seconds, n=100)
    return Turn(len(seconds) / options.seconds, cuts[49] * 1000, cuts[98] * 1000, (written(port) - before) / took)


def written(port: int) -> float:
    found = re.search(
        r"^tuneserve_written_tokens_total (\S+)$", httpx.get(f"http://127.0.0.1:{port}/metrics").text, re.M
    )
    return float(found[1]) if found else 0.0


def tabulate(turns: Sequence[tuple[str, Turn]]) -> str:
    rows = [["classifier", "requests/s", "p50 ms", "p99 ms", "tokens/s written"], ["---"] * 5]
    for name in dict.fromkeys(name for name, _ in turns):
        own = [turn for one, turn in turns if one == name]
        found = [[getattr(turn, field) for turn in own] for field in ("per_s", "p50_ms", "p99_ms", "tokens_per_s")]
        rows.append([name, *(f"{median(one):,.1f} ({min(one):,.1f} to {max(one):,.1f})" for one in found)])
    return join(rows)


def make_writer(folder: Path, tokens: int) -> Path:
    """A tiny GPT-2, as the tests make it."""
    sys.path.append(str(PROJECT / "tests"))
    import writers

    return writers.make_causal(folder, positions=tokens + 64)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(options.version or make_version(folder / "train"), folder / "models" / "classifier")
        shutil.copytree(options.writer or make_writer(folder / "gpt", options.tokens), folder / "models" / "writer")
        variables = {
            "PINNED_MODELS": "classifier,writer",
            "REQUEST_TIMEOUT_S": "300",
            "MAX_NEW_TOKENS": str(options.tokens),
        }
        turns = []
        with server(folder, folder / "models", **variables) as (port, _):
            for _ in range(options.rounds):
                for name, writers in (("alone", 0), (f"beside {options.texts} texts being written", options.texts)):
                    turns.append((name, asyncio.run(take_turn(port, options, writers))))
    print(tabulate(turns))
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", type=Path, help="of the classifier (default: train a tiny one)")
    parser.add_argument("--writer", type=Path, help="a Hugging Face model that writes (default: a tiny GPT-2)")
    parser.add_argument("--clients", type=int, default=4, help="of the classifier (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=4, help="under way in the writer (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=400, help="of each of them (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=6, help="of a turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
