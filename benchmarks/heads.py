"""One body, many heads: what a further classifier costs a server of many models, and how fast a thousand answer.

    make bench-heads                                       1, 10, 100 and 1,000 heads: some minutes on two cores
    make bench-heads ARGS="--heads 1,10 --seconds 3"
    make bench-heads ARGS="--version FOLDER"               heads on this version's body (made with TRAIN_BODY=0)

A version is trained on the embedded sample with a frozen body. Its head is changed at random, once for each further
version, which gets golden answers of its own; the files that are the body's are hard links. Each is loaded by
`POST /models` of `run.py multimodel`, by one client, one after another, and asked once: an answer that is not its own
head's ends the benchmark. Then wrk asks for short texts, for all heads in turn. By turns with that, another server with
the same settings answers the same requests by one version that is loaded alone.

Memory is that of the server's processes (PSS). A load is timed by its client, from the request to the answer.
"""

import argparse
import hashlib
import http.client
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
PRODUCTION = BENCHMARKS.parent / "production" / "docker-res"
sys.path.insert(0, str(PRODUCTION))

import numpy as np
from load import read_figures, run_wrk
from servers import OURS, BenchError, Contender, Server
from tables import join

from tuneserve.artifact import HEAD, METADATA, Golden, Version, read_golden, read_version, write_golden
from tuneserve.files import write_json
from tuneserve.network.numpy_head import Layer, NumpyHead
from tuneserve.serving.model import wait_for
from tuneserve.settings import Settings
from tuneserve.tasks.heads import FILES, Bodies

RUN = PRODUCTION / "run.py"
TARGET = "X-Amzn-SageMaker-Target-Model"
TEXTS = [
    "Worth every minute.",
    "The battery died within a week, and nobody answered my letters.",
    "A warm film with a wonderful cast, and never a dull moment.",
    "It came two days late and the box was torn, but what was in it is exactly what I had hoped for.",
]
START_S = 120
SETTLE_S = 2.0
"""Seconds after a load in which what wrk has left is done with."""
MOST_APART = 0.03
"""Between a head's answer and the expected one: bf16."""


def train(folder: Path) -> Version:
    """A version with a frozen body, of the embedded sample."""
    paths = {f"{name}_PATH": str(folder / name) for name in ("MODEL", "DATA", "LOG")}
    subprocess.run([sys.executable, str(RUN), "train"], env=environment() | paths | {"TRAIN_BODY": "0"}, check=True)
    store = folder / "MODEL"
    return read_version(store / "versions" / (store / "champion").read_text().strip())


def environment() -> dict[str, str]:
    """That of the process, without the project's variables."""
    return {name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields}


def make_heads(version: Version, folder: Path, count: int) -> dict[str, list[float]]:
    """So many versions on one body, and the probabilities that each should give the first of TEXTS."""
    bodies = Bodies(Settings.from_environ({"PRECISION": "fp32", "DEVICE": "cpu"}), threads=1)
    found = bodies.open(version)
    if found is None:
        raise BenchError(f"{version.folder} has no head of its own; was it trained with TRAIN_BODY=0?")
    texts = [*read_golden(version).texts, TEXTS[0]]
    states = np.stack([outcomes[0] for _, outcomes in wait_for(found.body.ask(texts, max_windows=1))])
    found.close()
    head, expected = NumpyHead.read(version.folder / HEAD), {}
    for number in range(count):
        name = f"head{number:04d}"
        made = _changed(head, number)
        rows = _softmax(made(states)).tolist()
        golden = [dict(zip(version.labels, row, strict=True)) for row in rows[:-1]]
        _write(version, folder / name, made, Golden(texts[:-1], golden))
        expected[name] = rows[-1]
    return expected


def _changed(head: NumpyHead, seed: int) -> NumpyHead:
    """Another head of the same shape, whose last layer answers otherwise."""
    *others, last = head.layers
    noise = np.random.default_rng(seed).standard_normal(last.weight.shape, dtype=np.float32)
    weight = last.weight + noise * np.linalg.norm(last.weight) / np.linalg.norm(noise)
    return NumpyHead([*others, Layer(last.activation, weight, last.bias)])


def _softmax(logits: Any) -> Any:
    odds = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def _write(version: Version, folder: Path, head: NumpyHead, golden: Golden) -> None:
    shutil.copytree(version.folder, folder, copy_function=os.link, ignore=shutil.ignore_patterns(*FILES, METADATA))
    head.write(folder / HEAD)
    write_golden(folder, golden)
    said = {**version.metadata, "sha256": dict(version.metadata["sha256"]), "files": dict(version.metadata["files"])}
    for name in FILES:
        content = (folder / name).read_bytes()
        said["sha256"][name], said["files"][name] = hashlib.sha256(content).hexdigest(), len(content)
    write_json(folder / METADATA, said)


class Many:
    """A server of many models, and one connection to it."""

    def __init__(self, stack: ExitStack, folder: Path, device: str) -> None:
        folder.mkdir()
        command = ("{bin}/python", "run.py", "multimodel")
        contender = Contender(OURS, command, "/invocations", lambda text: {"inputs": text}, str, PRODUCTION)
        base = environment() | {"DEVICE": device, "DATA_PATH": str(folder / "data")}
        self.server = stack.enter_context(
            Server(contender, store=folder / "none", checkpoint=folder, folder=folder, base=base)
        )
        self.bodies = folder / "bodies"
        self.bodies.write_bytes(b"".join(contender.encode(text) + b"\n" for text in TEXTS))
        self._ask = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=START_S)
        stack.callback(self._ask.close)
        began = time.perf_counter()
        while True:
            try:
                self.request("GET", "/ping")
                return
            except OSError as error:
                self._ask.close()  # the next request connects again
                if time.perf_counter() - began > START_S:
                    raise BenchError(f"does not start: {error}") from error
                time.sleep(0.1)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """The JSON that is answered.

        Raises:
            BenchError: it is an error.
            OSError: nobody answers.
        """
        content = None if body is None else json.dumps(body)
        self._ask.request(method, path, content, {"Content-Type": "application/json", **headers})
        answer = self._ask.getresponse()
        said = answer.read()
        if answer.status != 200:
            raise BenchError(f"{method} {path} was answered {answer.status}: {said[:300].decode(errors='replace')}")
        return json.loads(said) if said else None

    def load(self, name: str, folder: Path) -> float:
        """Load a model; seconds that it took."""
        began = time.perf_counter()
        self.request("POST", "/models", {"model_name": name, "url": str(folder)})
        return time.perf_counter() - began

    def check(self, name: str, labels: Sequence[str], expected: Sequence[float]) -> None:
        """Make sure that this head answers as it should.

        Raises:
            BenchError: it does not.
        """
        asked = {"inputs": [TEXTS[0]], "parameters": {"top_k": None}}
        [answer] = self.request("POST", f"/models/{name}/invoke", asked)
        found = {one["label"]: one["score"] for one in answer}
        if any(abs(found[label] - one) > MOST_APART for label, one in zip(labels, expected, strict=True)):
            raise BenchError(f"{name} answers {found}, not {list(expected)}")

    def press(self, names: Sequence[str], *, connections: int, seconds: int) -> float:
        """Requests a second, for these models in turn.

        Raises:
            BenchError: some were not answered.
        """
        listed = self.bodies.with_name("names")
        listed.write_text("".join(f"{name}\n" for name in names))
        address = f"http://127.0.0.1:{self.server.port}/invocations"
        printed = run_wrk("post.lua", address, self.bodies, listed, connections=connections, seconds=seconds)
        figures = read_figures(printed)
        if figures["errors"]:
            raise BenchError(f"{figures['errors']} requests were not answered")
        return float(figures["requests_per_s"])


def measure(version: Version, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A run for each number of heads."""
    expected = make_heads(version, folder / "heads", max(options.heads))
    names = list(expected)
    shutil.copytree(version.folder, folder / "alone", copy_function=os.link, ignore=shutil.ignore_patterns(METADATA))
    said = {name: value for name, value in version.metadata.items() if name != "body"}
    write_json(folder / "alone" / METADATA, said)
    runs: list[dict[str, Any]] = []
    with ExitStack() as stack:
        many = Many(stack, folder / "many", options.device)
        alone = Many(stack, folder / "one", options.device)
        alone.load("alone", folder / "alone")
        first, one_head, loads = min(options.heads), 0, list[float]()
        for count in sorted(options.heads):
            begun = len(loads)
            time.sleep(SETTLE_S)
            for name in names[begun:count]:
                loads.append(many.load(name, folder / "heads" / name))
                many.check(name, version.labels, expected[name])
            rates: dict[str, list[float]] = {"heads": [], "alone": []}
            for number in range(options.rounds):
                for who in ("heads", "alone")[:: -1 if number % 2 else 1]:
                    server, asked = (many, names[:count]) if who == "heads" else (alone, ["alone"])
                    rates[who].append(server.press(asked, connections=options.connections, seconds=options.seconds))
            memory = many.server.memory_bytes()  # after the load, which has set up what is set up once
            one_head = one_head or memory
            runs.append(
                {
                    "heads": count,
                    "memory": memory,
                    "a_head": (memory - one_head) / (count - first) if runs else None,
                    "load_s": statistics.median(loads[begun:]),
                    "requests_per_s": rates["heads"],
                    "alone_per_s": rates["alone"],
                }
            )
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    return runs


def describe(runs: Sequence[dict[str, Any]], connections: int) -> str:
    """The figures as a table; rates are medians of the rounds, and the last column that of each round's ratio."""
    titles = ["heads", "memory, MiB", "a further head, KiB", "load, ms (median)"]
    rows = [[*titles, f"requests/s, {connections} connections", "one version alone", "ratio"]]
    rows.append(["---"] * len(rows[0]))
    for run in runs:
        pairs = zip(run["requests_per_s"], run["alone_per_s"], strict=True)
        rows.append(
            [
                f"{run['heads']:,}",
                f"{run['memory'] / 2**20:.0f}",
                "-" if run["a_head"] is None else f"{run['a_head'] / 2**10:.0f}",
                f"{1000 * run['load_s']:.1f}" + (" (with the body)" if run["heads"] == 1 else ""),
                f"{statistics.median(run['requests_per_s']):.0f}",
                f"{statistics.median(run['alone_per_s']):.0f}",
                f"{statistics.median(one / other for one, other in pairs):.2f}",
            ]
        )
    return join(rows)


def main(arguments: list[str]) -> int:
    """Run the benchmark; see the module."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        version = train(folder) if options.version is None else read_version(options.version.absolute())
        try:
            runs = measure(version, options, folder)
        except BenchError as error:
            print(error, file=sys.stderr)
            return 1
    if options.json is not None:
        options.json.write_text(json.dumps(runs, indent=1))
    print(describe(runs, options.connections))
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(one) for one in text.split(",")]  # noqa: E731
    parser.add_argument("--heads", type=numbers, default=[1, 10, 100, 1000])
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=int, default=8, help="of each load")
    parser.add_argument("--rounds", type=int, default=3, help="of each number of heads, by turns with one alone")
    parser.add_argument("--version", type=Path, help="the folder of a version; one is trained without it")
    parser.add_argument("--folder", type=Path, help="where to make them; on the file system of --version")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
