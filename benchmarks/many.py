"""Minutes of a thousand archives in one server, of which fifty fit into MEMORY_LIMIT, each answer checked.

    .venv/bin/python benchmarks/many.py                                    ten minutes, about 400 MB of disk
    .venv/bin/python benchmarks/many.py --archives 40 --loaded 8 --seconds 20

The models are copies of one tiny classifier with labels of their own, and some have code of their own. Prints how often
each kind of request was answered how, and what was loaded, hit and evicted. Ends with 1 if an answer was none that its
request deserved, or memory was above the limit.
"""

import argparse
import asyncio
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
from client import Answer, Connection, write_request
from loop import free_port
from serve import say
from tables import join

from tuneserve import load
from tuneserve.artifact import describe_files
from tuneserve.hardware import memory_used
from tuneserve.settings import PROJECT, Settings

RUN = PROJECT / "production" / "docker-res" / "run.py"
SAMPLE_S = 0.25
ANSWER_S = 120.0
CODE_SHARE = 50
"""Of so many archives one has code of its own."""
PINNED = ("m0000", "m0001")
LABELS = ("bad", "good")
TOLERANCE = 1e-4
HANDLER = """
from helper import NAME

def model_fn(folder):
    return NAME

def transform_fn(model, data, content_type, accept):
    if NAME == "raises":
        raise LookupError(NAME)
    return f"{model} {data}", "text/plain"
"""
TARGET = "X-Amzn-SageMaker-Target-Model: "


def pack(archive: Path, files: Mapping[str, bytes]) -> None:
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def make_archives(folder: Path, version: Path, count: int) -> list[str]:
    """Archives of models of which each has labels, or code, of its own, and two that cannot answer; their names."""
    folder.mkdir()
    names = [f"m{number:04}" for number in range(count)]
    copy = folder.parent / "copy"
    shutil.copytree(version, copy)
    metadata, golden = (json.loads((copy / name).read_text()) for name in ("metadata.json", "golden.json"))
    for number, name in enumerate(names):
        (copy / "metadata.json").unlink(missing_ok=True)  # it is not among the files that it describes
        if has_code(number):
            pack(folder / f"{name}.tar.gz", code(name))
            continue
        (copy / "golden.json").write_text(
            json.dumps([one | {"scores": {f"{name} {k}": v for k, v in one["scores"].items()}} for one in golden])
        )
        changed = metadata | {"labels": [f"{name} {label}" for label in LABELS]} | describe_files(copy)
        (copy / "metadata.json").write_text(json.dumps(changed))
        paths = [path for path in sorted(copy.rglob("*")) if path.is_file()]
        pack(folder / f"{name}.tar.gz", {path.relative_to(copy).as_posix(): path.read_bytes() for path in paths})
    pack(folder / "raises.tar.gz", code("raises"))
    (folder / "damaged.tar.gz").write_bytes((folder / f"{names[0]}.tar.gz").read_bytes()[:-1000])
    return names


def has_code(number: int) -> bool:
    return number % CODE_SHARE == CODE_SHARE // 2


def code(name: str) -> dict[str, bytes]:
    return {"code/inference.py": HANDLER.encode(), "code/helper.py": f"NAME = {name!r}\n".encode()}


@dataclass
class Run:
    """What was found out.

    Args:
        names: of the models.
        expected: of a text, the index of its label and the label's score, which are the same in all copies.
        seconds: for which clients ask.
        clients: that ask at a time.
        limit: MEMORY_LIMIT in bytes.
    """

    names: Sequence[str]
    expected: Mapping[str, tuple[int, float]]
    seconds: float
    clients: int
    limit: int
    statuses: dict[str, Counter[int]] = field(default_factory=dict)
    undeserved: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    loaded: list[int] = field(default_factory=list)
    answer_s: list[float] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    async def run(self, port: int, pid: int) -> None:
        """Let all clients ask until the time is over."""
        self._ends, self._port = time.monotonic() + self.seconds, port
        clients = [asyncio.ensure_future(self._be_client(number)) for number in range(self.clients)]
        while time.monotonic() < self._ends:
            self.memory.append(await asyncio.to_thread(memory_used, pid=pid))
            await asyncio.sleep(SAMPLE_S)
        await asyncio.gather(*clients)
        await asyncio.sleep(0.1)  # both ends of the connections go

    async def _be_client(self, number: int) -> None:
        draw = random.Random(number)
        weights = [(rank + 3) ** -1.2 for rank in range(len(self.names))]
        popular = random.Random(-1).sample(self.names, len(self.names))
        kinds = [getattr(self, f"_{name}") for name in KINDS]
        _, client = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", self._port)
        while time.monotonic() < self._ends:
            [name], [kind] = draw.choices(popular, weights), draw.choices(kinds, list(KINDS.values()))
            request, *others = kind(draw, name)
            began = time.monotonic()
            answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
            client.ask(request, answered.set_result)
            answer = await asyncio.wait_for(answered, ANSWER_S)
            if kind == self._one:
                self.answer_s.append(time.monotonic() - began)
            self._judge(kind.__name__[1:], name, answer, *others)
        client.transport.close()

    def _judge(self, kind: str, name: str, answer: Answer, *deserved: tuple[int, Callable[[Answer], bool]]) -> None:
        self.statuses.setdefault(kind, Counter())[answer.status] += 1
        if not any(status == answer.status and is_right(answer) for status, is_right in deserved):
            self.undeserved.append(f"{kind} {name}: {answer.status} {answer.body[:300]!r}")

    def _one(self, draw: random.Random, name: str) -> Any:
        text = draw.choice(list(self.expected))
        body = json.dumps({"inputs": text}).encode()
        ending = draw.choice(["", ".tar.gz"])
        if draw.random() < 0.3:
            request = write_request("/invocations", body, TARGET + name + ending)
        else:
            request = write_request(f"/models/{name}{ending}/invoke", body)
        return request, (200, lambda answer: self._is_right(name, [text], answer, body))

    def _three(self, draw: random.Random, name: str) -> Any:
        texts = draw.choices(list(self.expected), k=3)
        body = json.dumps({"inputs": texts}).encode()
        right = (200, lambda answer: self._is_right(name, texts, answer, body))
        return write_request(f"/models/{name}/invoke", body), right

    def _unknown(self, draw: random.Random, name: str) -> Any:
        return write_request(f"/models/x{name}/invoke", b"{}"), (404, lambda answer: True)

    def _damaged(self, draw: random.Random, name: str) -> Any:
        return write_request("/models/damaged/invoke", b"{}"), (400, lambda answer: b"damaged" in answer.body)

    def _raises(self, draw: random.Random, name: str) -> Any:
        return write_request("/models/raises/invoke", b"{}"), (400, lambda answer: b"LookupError" in answer.body)

    def _unload(self, draw: random.Random, name: str) -> Any:
        gone = [(status, lambda answer: True) for status in (200, 404)]
        return write_request(f"/models/{name}", b"", method="DELETE"), *gone

    def _load(self, draw: random.Random, name: str) -> Any:
        there = [(status, lambda answer: True) for status in (200, 404, 409)]
        return write_request("/models", json.dumps({"model_name": name}).encode()), *there

    def _list(self, draw: random.Random, name: str) -> Any:
        return write_request("/models", b"", method="GET"), (200, self._is_list)

    def _is_list(self, answer: Answer) -> bool:
        content = json.loads(answer.body)
        self.loaded.append(sum(one["state"] == "loaded" for one in content["models"]))
        return True

    def _is_right(self, name: str, texts: Sequence[str], answer: Answer, body: bytes) -> bool:
        if has_code(self.names.index(name)):
            return answer.body == f"{name} ".encode() + body
        found = json.loads(answer.body)
        expected = [self.expected[text] for text in texts]
        return len(found) == len(texts) and all(
            one["label"] == f"{name} {LABELS[index]}" and abs(one["score"] - score) < TOLERANCE
            for one, (index, score) in zip(found, expected, strict=True)
        )


KINDS = {"one": 70, "three": 10, "unknown": 3, "damaged": 2, "raises": 3, "unload": 1, "load": 3, "list": 8}
"""Kinds of requests, and how often each is made."""


@contextmanager
def server(folder: Path, models: Path, **variables: str) -> Iterator[tuple[int, int]]:
    """A server of these models, its port and its process; it has to end well."""
    own = {name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields}
    own |= {"MODELS": str(models), "HOST": "127.0.0.1", "PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    own |= {f"{name}_PATH": str(folder / name) for name in ("MODEL", "DATA", "LOG")} | variables
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen([sys.executable, RUN, "serve"], env=own, stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                if httpx.get(f"http://127.0.0.1:{own['PORT']}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if process.poll() is not None:
                raise SystemExit((folder / "server.log").read_text()[-2000:])
            time.sleep(0.2)
        yield int(own["PORT"]), process.pid
        process.send_signal(signal.SIGTERM)
        if code := process.wait(60):
            raise SystemExit(f"The server ended with {code}.")
    finally:
        process.kill()


def measure_limit(folder: Path, models: Path, names: Sequence[str]) -> int:
    """What a server takes in which these models are loaded."""
    with server(folder, models) as (port, _), httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        for name in names:
            if (found := client.post("/models", json={"model_name": name})).status_code != 200:
                raise SystemExit(found.text)
        return int(client.get("/models").json()["memory"]["used"])


def make_version(folder: Path) -> Path:
    """A tiny classifier, as the tests train it."""
    sys.path.append(str(PROJECT / "tests"))
    import tiny

    return tiny.train(tiny.write_csv(folder / "texts.csv", tiny.sentences(120)), folder).folder


def figures_of(port: int) -> dict[str, float]:
    """The server's own figures of its models."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    return {
        name: float(value) for name, value in re.findall(r"^tuneserve_(model_\S+_total\S*) (\S+)$", text, re.MULTILINE)
    }


def tabulate(run: Run) -> str:
    found = sorted({status for counts in run.statuses.values() for status in counts})
    rows = [["request", *map(str, found)], ["---"] * (1 + len(found))]
    rows += [
        [name, *(f"{counts[status]:,}" if counts[status] else "" for status in found)]
        for name, counts in run.statuses.items()
    ]
    cuts = quantiles(run.answer_s, n=100)
    total = sum(sum(counts.values()) for counts in run.statuses.values())
    shown = {
        "requests": f"{total:,} ({total / run.seconds:.0f}/s)",
        "p50, p99 of one text": f"{cuts[49] * 1000:.1f}, {cuts[98] * 1000:.0f} ms",
        "loaded at a time, median and most": f"{median(run.loaded):.0f}, {max(run.loaded)}",
        "memory, median and most": f"{median(run.memory) / 2**20:.1f}, {max(run.memory) / 2**20:.1f} MiB",
        "MEMORY_LIMIT": f"{run.limit / 2**20:.1f} MiB",
        "undeserved answers": str(len(run.undeserved)),
        **{name.replace("_total", ""): f"{value:,.0f}" for name, value in sorted(run.figures.items())},
    }
    return "\n\n".join([join(rows), join([["what", "figure"], ["---"] * 2, *([k, v] for k, v in shown.items())])])


def wanted(answer: Any) -> tuple[int, float]:
    return LABELS.index(answer.label), answer.scores[answer.label]


def find_out(options: argparse.Namespace, folder: Path) -> Run:
    version = options.version or make_version(folder / "train")
    texts = [f"the film number {number} was {word}" for number in range(10) for word in ("good", "bad", "great")]
    with closing(load(version)) as model:
        expected = {text: wanted(one) for text, one in zip(texts, model.predict(texts), strict=True)}
    names = make_archives(folder / "models", version, options.archives)
    limit = options.limit << 20 or measure_limit(folder, folder / "models", names[: options.loaded])
    say(f"{len(names)} archives, MEMORY_LIMIT {limit / 2**20:.1f} MiB")
    run = Run(names, expected, options.seconds, options.clients, limit)
    variables = {"MEMORY_LIMIT": str(limit), "PINNED_MODELS": ",".join(PINNED), "REQUEST_TIMEOUT_S": "60"}
    with server(folder, folder / "models", **variables) as (port, pid):
        asyncio.run(run.run(port, pid))
        run.figures = figures_of(port)
    return run


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        run = find_out(options, Path(temporary))
    print(tabulate(run))
    for one in run.undeserved[:20]:
        say(one)
    return int(bool(run.undeserved) or max(run.memory) > run.limit)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archives", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--loaded", type=int, default=50, help="archives that fit into memory (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=0, help="MEMORY_LIMIT in MiB (default: measured for --loaded)")
    parser.add_argument("--clients", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=600, help="(default: %(default)s)")
    parser.add_argument("--version", type=Path, help="the version to copy (default: train a tiny one)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
