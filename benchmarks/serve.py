"""Serving side by side: this server and others with the same checkpoint and texts, one after another, under wrk's load.

    make bench-serve                                              all servers, the embedded reviews: 45 minutes
    make bench-serve ARGS="--data FOLDER"                         with the sentences of SST-2 and the reviews of IMDB
    make bench-serve ARGS="--peers mosec --connections 1,32 --seconds 3 --rounds 1"     whether it runs: two minutes

Servers: `tuneserve`, `run.py serve` with its defaults; `fastapi-pipeline`, FastAPI around a transformers pipeline;
`litserve`, `infinity`, `bentoml` and `mosec` as their documentation shows, batches of up to 32,
in the precision and with the threads they choose themselves; `litserve-openvino`, LitServe as an expert would tune it,
with OpenVINO, padded batches and raw tokenizers; `infinity-onnx`, infinity with ONNX Runtime. The last two convert the
checkpoint before they are started. What each runs stands in benchmarks/peers, with its
versions; each has a virtual environment of its own in .venv/peers, made by the first run. In a round each server is
started, examined, pressed with each kind of texts at each number of connections, and ended; every other round goes the
other way round. A server that fails is a line that says why.

req/s       answers a second that were not refused; a request is one text, each connection has one under way
p50, p99    milliseconds within which half of the answers came, and 99 of 100
errors      answers of 400 and above, broken connections, and answers later than a minute, of all rounds
ready       seconds from the process's start to its first right answer
memory      the most that all its processes held together after one of the loads (PSS: shared pages count once)
accuracy    of labelled texts that are sent once each, 32 at once, before any load; no answer is a wrong one
agreement   with the answers of the checkpoint in torch, fp32, text by text
unanswered  of those texts, in all rounds
engine      this project's classifier without a server, and the share of the machine's measured rate of bf16 products
            that its tokens need: 2 operations a token for every weight outside embeddings, pooler and classifier

Short texts are single sentences or reviews, long ones about 200 tokens: IMDB's first 180 words, or embedded reviews of
one label joined to 150 words. Cells are mean ± standard deviation over the rounds.
"""

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
PROJECT = BENCHMARKS.parent
PRODUCTION = PROJECT / "production" / "docker-res"
sys.path.insert(0, str(PRODUCTION))

from load import examine, has_wrk, press, write_bodies
from servers import CONTENDERS, OURS, BenchError, Contender, Server
from tables import join, spread

from tuneserve.settings import Settings

KINDS = ("short", "long")
IMDB_WORDS, JOINED_WORDS = 180, 150
CACHE = PROJECT / "data" / "bench-serve"
"""Where a model that is trained for this stays: the same texts are never trained on twice."""

Rows = list[tuple[str, str]]


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if not has_wrk():
        print("wrk makes the load and is not installed: apt-get install wrk (brew install wrk).", file=sys.stderr)
        return 2
    environment = {name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields}
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(options, environment, Path(temporary))
        texts = bench.prepare()
        bench.find_model()
        bench.survey(texts)
        for contender in bench.contenders:
            bench.install(contender)
        for number in range(options.rounds):
            for contender in bench.contenders[:: -1 if number % 2 else 1]:
                bench.record["runs"].append({"round": number, **bench.measure(contender, texts)})
                bench.save()
        print(describe(bench.record))
    return 0


class Bench:
    """The options, what all servers share, and what was measured."""

    def __init__(self, options: argparse.Namespace, environment: dict[str, str], temporary: Path) -> None:
        self.options, self.environment, self.temporary = options, environment, temporary
        self.contenders = [CONTENDERS[OURS], *(CONTENDERS[name] for name in options.peers)]
        self.obstacles: dict[str, str] = {}
        self.record: dict[str, Any] = {"options": vars(options), "runs": []}

    def prepare(self) -> dict[str, Rows]:
        """Labelled texts of both kinds; what a model could be trained on lies beside them."""
        count, data = self.options.texts, self.options.data
        if data is None:
            self.training = self._split(PRODUCTION, "data", count)
            short = read_rows(self.training / "test.csv")
            return {"short": short, "long": join_reviews(short, count)}
        self.training = self._split(data, "sst2", count)
        reviews = read_rows(self._split(data, "imdb", count) / "test.csv")
        return {
            "short": read_rows(self.training / "test.csv"),
            "long": [(" ".join(text.split()[:IMDB_WORDS]), label) for text, label in reviews],
        }

    def _split(self, data: Path, texts: str, count: int) -> Path:
        folder = self.temporary / texts
        wanted = {"texts": texts, "data": str(data), "folder": str(folder), "num_train": 0, "num_test": count}
        self._run("conditions.py", "prepare", json.dumps(wanted))
        return folder

    def find_model(self) -> None:
        """The champion of the given store, or of one that is filled by training on the texts."""
        self.store: Path = self.options.store or CACHE / "models"
        if self.options.store is None:
            say("training, unless these texts have been trained on before")
            places = {
                "MODEL_PATH": self.store,
                "DATA_PATH": CACHE,
                "LOG_PATH": self.temporary,
                "DATASET": self.training,
            }
            self._run(PRODUCTION / "run.py", "train", **{name: str(place) for name, place in places.items()})
        try:
            champion = (self.store / "champion").read_text(encoding="utf-8").strip()
        except OSError as error:
            raise SystemExit(f"--store {self.store} holds no trained model: {error}") from None
        self.checkpoint = (self.store / "versions" / champion).resolve()

    def survey(self, texts: dict[str, Rows]) -> None:
        """What every server should answer, and how fast this machine and the engine alone are."""
        say("asking the checkpoint itself")
        asked = {kind: [text for text, _ in rows] for kind, rows in texts.items()}
        about = {"checkpoint": str(self.checkpoint), "texts": asked}
        self.reference: dict[str, list[str]] = self._run("inference.py", "reference", told=about)
        wanted = {"name": str(self.checkpoint), "folder": "", "device": "cpu"}
        base = self._run("conditions.py", "survey", json.dumps(wanted))
        self.record |= {"checkpoint": self.checkpoint.name, "machine": base, "texts": {}, "engine": []}
        for kind, rows in texts.items():
            right = sum(label == answer for (_, label), answer in zip(rows, self.reference[kind], strict=True))
            words = sum(len(text.split()) for text, _ in rows) / len(rows)
            self.record["texts"][kind] = {"count": len(rows), "words": words, "accuracy": right / len(rows)}
            if not right:
                raise SystemExit(f"The checkpoint answers none of the {kind} texts with its label: other labels?")
        if self.options.engine:
            say("measuring the engine alone")
            about |= {"body": base["body"], "flops": base["flops"], "seconds": self.options.seconds}
            try:
                self.record["engine"] = self._run("inference.py", "engine-alone", told=about)
            except SystemExit as problem:
                self.record["engine_failure"] = str(problem)

    def install(self, contender: Contender) -> None:
        """Make the server's environment; what is in the way is said in its row."""
        try:
            contender.install()
        except BenchError as obstacle:
            self.obstacles[contender.name] = str(obstacle)

    def measure(self, contender: Contender, texts: dict[str, Rows]) -> dict[str, Any]:
        """One start of one server: `failure`, None unless it failed, and all figures up to there."""
        run: dict[str, Any] = {"server": contender.name, "failure": self.obstacles.get(contender.name), "cells": []}
        if run["failure"] is None:
            try:
                self._measure(contender, texts, run)
            except BenchError as failure:
                run["failure"] = str(failure)
        say(f"{contender.name}: {run['failure'] or 'done'}")
        return run

    def _measure(self, contender: Contender, texts: dict[str, Rows], run: dict[str, Any]) -> None:
        place = {"store": self.store.resolve(), "checkpoint": self.checkpoint, "folder": self.temporary}
        plain = [text for text, _ in texts["short"]], self.reference["short"]
        with Server(contender, **place, base=self.environment) as server:
            run["ready_s"] = server.wait_until_right(*plain)
            for kind, rows in texts.items():
                asked, labels = [text for text, _ in rows], [label for _, label in rows]
                run[kind] = examine(contender, server.port, asked, labels, self.reference[kind])
            run["memory_bytes"] = server.memory_bytes()
            for kind, rows in texts.items():
                bodies = write_bodies(contender, [text for text, _ in rows], self.temporary / f"{kind}.jsonl")
                for count in self.options.connections:
                    load = {"connections": count, "seconds": self.options.seconds}
                    figures = press(contender, server.port, bodies, **load)
                    run["cells"].append({"texts": kind, "connections": count, **figures})
                    run["memory_bytes"] = max(run["memory_bytes"], server.memory_bytes())
                    server.wait_until_right(*plain)  # done with what wrk asked for and left

    def save(self) -> None:
        """Write down all that is known by now, if a file is wanted."""
        if self.options.json:
            self.options.json.write_text(json.dumps(self.record, indent=2, default=str) + "\n", encoding="utf-8")

    def _run(self, program: str | Path, *verb: str, told: Any = None, **variables: str) -> Any:
        command = [sys.executable, str(BENCHMARKS / program), *verb]
        done = subprocess.run(
            command, input=json.dumps(told), env=self.environment | variables, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command[:3])}\nended with {done.returncode}:\n{done.stderr[-4000:]}")
        return json.loads(done.stdout) if done.stdout.startswith(("{", "[")) else None


def read_rows(path: Path) -> Rows:
    """Texts and labels of a file with these columns."""
    with path.open(newline="", encoding="utf-8") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


def join_reviews(rows: Rows, count: int) -> Rows:
    """Long texts out of short ones with the same label, drawn by chance, always the same."""
    draw = random.Random(0)
    by_label: dict[str, list[str]] = {}
    for text, label in rows:
        by_label.setdefault(label, []).append(text)
    long: Rows = []
    for label in draw.choices([label for _, label in rows], k=count):
        words: list[str] = []
        while len(words) < JOINED_WORDS:
            words += draw.choice(by_label[label]).split()
        long.append((" ".join(words), label))
    return long


def describe(record: dict[str, Any]) -> str:
    """All that was measured, as Markdown."""
    machine, options = record["machine"], record["options"]
    parts = [
        f"Checkpoint {record['checkpoint']}, {machine['body'] / 1e6:.1f}M weights in the body; "
        f"{machine['precision']} products: {machine['flops'] / 1e12:.2f} TFLOP/s; "
        f"{machine['threads']} threads; {options['seconds']} s a cell, "
        f"{options['rounds']} round(s).",
        tabulate_servers(record),
    ]
    for kind, about in record["texts"].items():
        parts += [
            f"## {kind} texts: {about['count']}, of {about['words']:.0f} words on average",
            tabulate_load(record["runs"], kind),
        ]
    if record.get("engine_failure"):
        parts.append(f"The engine alone could not be measured: {record['engine_failure']}")
    elif record["engine"]:
        parts += ["## the engine alone", tabulate_engine(record["engine"], machine["precision"])]
    return "\n\n".join(parts)


def tabulate_servers(record: dict[str, Any]) -> str:
    """A row for each server: what does not depend on the load, and what went wrong."""
    titles = ["ready s", "memory MiB", *(f"{what}, {kind} %" for what in ("accuracy", "agreement") for kind in KINDS)]
    rows = [["server", *titles, "unanswered", "failed"], ["---"] * (len(titles) + 3)]
    for server, runs in by_server(record["runs"]).items():
        examined = [
            spread([run[kind][what] if kind in run else None for run in runs], 100, 1)
            for what in ("accuracy", "agreement")
            for kind in KINDS
        ]
        ready = spread([run.get("ready_s") for run in runs], 1, 1)
        memory = spread([run.get("memory_bytes") for run in runs], 1 / 2**20, 0)
        failures = dict.fromkeys(run["failure"] for run in runs if run["failure"])
        unanswered = str(sum(run[kind]["unanswered"] for run in runs for kind in KINDS if kind in run))
        rows.append([server, ready, memory, *examined, unanswered, "; ".join(failures) or "-"])
    known = [f"{100 * record['texts'][kind]['accuracy']:.1f}" for kind in KINDS]
    rows.append(["(the checkpoint itself)", "-", "-", *known, *"----"])
    return join(rows)


def tabulate_load(runs: list[dict[str, Any]], kind: str) -> str:
    """A row for each server and number of connections."""
    rows = [["server", "connections", "req/s", "p50 ms", "p99 ms", "errors"], ["---"] * 6]
    for server, own in by_server(runs).items():
        cells = [cell for run in own for cell in run["cells"] if cell["texts"] == kind]
        for count in dict.fromkeys(cell["connections"] for cell in cells):
            same = [cell for cell in cells if cell["connections"] == count]
            figures = [spread([cell[key] for cell in same], 1, 1) for key in ("requests_per_s", "p50_ms", "p99_ms")]
            rows.append([server, str(count), *figures, str(sum(cell["errors"] for cell in same))])
    return join(rows)


def tabulate_engine(measured: list[dict[str, Any]], precision: str) -> str:
    """A row for each kind of texts and size of a call; `precision` is that of the machine's rate."""
    rows = [["texts", "in one call", "texts/s", "tokens/s", f"of {precision} rate %"], ["---"] * 5]
    for one in measured:
        figures = [f"{one['texts_per_s']:.0f}", f"{one['tokens_per_s']:.0f}", f"{100 * one['rate_share']:.1f}"]
        rows.append([one["texts"], str(one["at_once"]), *figures])
    return join(rows)


def by_server(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each server, in the order in which the first round had them."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        grouped.setdefault(run["server"], []).append(run)
    return grouped


def say(words: str) -> None:
    """Tell whoever waits."""
    print(words, file=sys.stderr, flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    peers = [name for name in CONTENDERS if name != OURS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        type=Path,
        help="folder with sst2/ and imdb/, each with train.csv (columns text and label) and perhaps valid.csv (or "
        "dev.csv) and test.csv; what is not there comes from the Hugging Face hub (default: the embedded reviews)",
    )
    parser.add_argument("--store", type=Path, help="store with a trained model (default: train one on the short texts)")
    parser.add_argument("--peers", type=_peers, default=peers, help=f"some of {','.join(peers)}; none (default: all)")
    parser.add_argument(
        "--connections",
        type=_counts,
        default=[1, 8, 32, 128],
        help="with commas between (default: 1,8,32,128)",
    )
    parser.add_argument("--seconds", type=_count, default=10, help="of each measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=_count, default=2, help="starts of each server (default: %(default)s)")
    parser.add_argument("--texts", type=_count, default=400, help="texts of each kind (default: %(default)s)")
    parser.add_argument("--engine", action=argparse.BooleanOptionalAction, default=True, help="measure it alone, too")
    parser.add_argument("--json", type=Path, help="file for all figures, written after each server")
    return parser.parse_args(arguments)


def _peers(names: str) -> list[str]:
    chosen = [] if names == "none" else names.split(",")
    if unknown := set(chosen) - (set(CONTENDERS) - {OURS}):
        known = ", ".join(name for name in CONTENDERS if name != OURS)
        raise argparse.ArgumentTypeError(f"there is no peer {', '.join(sorted(unknown))}; use {known} or none")
    return chosen


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 up")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
