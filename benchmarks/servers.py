"""The servers that benchmarks/serve.py compares: how each is installed, started, asked, measured and ended.

Each is started as its own documentation tells its users; `peers/` holds what they would write, and its versions. A peer
reads the checkpoint's folder in `CHECKPOINT` and its port in `PORT`.
"""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
PEERS = PROJECT / "benchmarks" / "peers"
ENVIRONMENTS = Path(sys.prefix) / "peers"

START_S, STOP_S, ANSWER_S = 300, 15, 60
"""Seconds a server gets to give a right answer at all, to leave after SIGTERM, and for one answer."""
POLL_S = 0.05
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "BENTOML_DO_NOT_TRACK": "True",
    "INFINITY_ANONYMOUS_USAGE_STATS": "0",
    "INFINITY_CHECK_REQUIREMENTS": "0",
}
"""No server may call home; nothing here changes how one computes."""


class BenchError(Exception):
    """A server that cannot be installed, does not start or does not answer; the words are for its row."""


@dataclass(frozen=True)
class Contender:
    """A server: its command, in which `{bin}`, `{port}` and `{checkpoint}` are filled in, and how it is asked."""

    name: str
    command: tuple[str, ...]
    path: str
    body: Callable[[str], dict[str, Any]]
    label: Callable[[Any], str]
    folder: Path = PEERS
    export: tuple[str, ...] = ()
    """What converts the checkpoint before a start; `{made}`, an empty folder, is filled in too."""

    @property
    def environment(self) -> Path:
        """The virtual environment's folder; this project's server lives in that of the benchmark."""
        return Path(sys.prefix) if self.name == OURS else ENVIRONMENTS / self.name

    def encode(self, text: str) -> bytes:
        """The body that asks for one text, on one line."""
        return json.dumps(self.body(text)).encode()

    def ask(self, port: int, text: str) -> str:
        """The label of one text.

        Raises:
            BenchError: it was not answered, or not with a label.
        """
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
        try:
            connection.request("POST", self.path, self.encode(text), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                raise BenchError(f"answered {answer.status}: {content[:200].decode(errors='replace')}")
            return self.label(json.loads(content))
        except (OSError, http.client.HTTPException) as error:
            raise BenchError(f"did not answer: {error!r}") from error
        except (ValueError, LookupError, TypeError) as error:
            raise BenchError(f"answered without a label: {content[:200].decode(errors='replace')}") from error
        finally:
            connection.close()

    def install(self) -> None:
        """Make the peer's virtual environment, unless it is there with these very requirements.

        Raises:
            BenchError: pip could not do it.
        """
        if self.name == OURS:
            return
        wanted = PEERS / f"requirements-{self.name}.txt"
        stamp = self.environment / ".installed"
        if stamp.exists() and stamp.read_bytes() == wanted.read_bytes():
            return
        pip = [str(self.environment / "bin" / "pip"), "install", "--quiet", "--requirement", str(wanted)]
        for command in ([sys.executable, "-m", "venv", str(self.environment)], pip):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise BenchError(f"cannot be installed: {last_line(done.stderr or done.stdout)}")
        stamp.write_bytes(wanted.read_bytes())

    def convert(self, checkpoint: Path, made: Path, base: dict[str, str]) -> None:
        """Write into a folder whatever the server loads in place of the checkpoint; it counts as no start.

        Raises:
            BenchError: it could not be done.
        """
        if not self.export or made.exists():
            return
        made.mkdir(parents=True)
        places = {"bin": str(self.environment / "bin"), "checkpoint": str(checkpoint), "made": str(made)}
        done = subprocess.run(
            [part.format(**places) for part in self.export],
            cwd=self.folder,
            env=base | QUIET | {"CHECKPOINT": str(checkpoint)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            shutil.rmtree(made)
            raise BenchError(f"cannot convert the checkpoint: {last_line(done.stderr or done.stdout)}")


class Server:
    """A contender's running process with its children: a context that kills them all at its end.

    Raises:
        BenchError: the command cannot be started.
    """

    def __init__(self, contender: Contender, *, store: Path, checkpoint: Path, folder: Path, base: dict[str, str]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.contender = contender
        made = folder / f"{contender.name}-model"
        contender.convert(checkpoint, made, base)
        self._log = folder / f"{contender.name}.log"
        own = {"PORT": str(self.port), "CHECKPOINT": str(checkpoint), "BENTOML_HOME": str(folder / "bentoml")}
        own |= {"EXPORT": str(made)}
        if contender.name == OURS:
            own |= {"MODEL_PATH": str(store), "HOST": "127.0.0.1", "LOG_PATH": str(folder)}
        places = {"bin": str(contender.environment / "bin"), "port": str(self.port), "checkpoint": str(checkpoint)}
        places |= {"made": str(made)}
        self._began = time.perf_counter()
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [part.format(**places) for part in contender.command],
                    cwd=contender.folder,
                    env=base | QUIET | own,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise BenchError(f"cannot be started: {error}") from error

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        end_family(self._process, patience_s=STOP_S)

    def wait_until_right(self, texts: Sequence[str], labels: Sequence[str]) -> float:
        """Ask for one text after another until one is answered with its label, which also waits for abandoned work.

        Returns:
            Seconds since the process was started.

        Raises:
            BenchError: it ended, or took too long.
        """
        last, asked = "nothing was asked", time.perf_counter()
        for text, label in cycle(zip(texts, labels, strict=True)):
            if self._process.poll() is not None:
                words = last_line(self._log.read_text(encoding="utf-8", errors="replace"))
                raise BenchError(f"ended with {self._process.returncode}: {words}")
            try:
                answer = self.contender.ask(self.port, text)
                if answer == label:
                    break
                last = f"it answered {answer}"
            except BenchError as problem:
                last = str(problem)
            if time.perf_counter() - asked > START_S:
                raise BenchError(f"gave no right answer in {START_S} s: {last}")
            time.sleep(POLL_S)
        return time.perf_counter() - self._began

    def wait_until_answered(self, text: str) -> float:
        """As `wait_until_right`, where any answer to this text is a right one.

        Returns:
            Seconds since it was first asked for.

        Raises:
            BenchError: it took too long.
        """
        asked = time.perf_counter()
        while True:
            try:
                self.contender.ask(self.port, text)
                return time.perf_counter() - asked
            except BenchError as error:
                if time.perf_counter() - asked > START_S:
                    raise BenchError(f"gave no answer in {START_S} s: {error}") from error
                time.sleep(POLL_S)

    def memory_bytes(self) -> int:
        """What the processes hold now; a page that several share counts once."""
        return sum(map(held_bytes, family(self._process.pid)))


def end_family(process: "subprocess.Popen[bytes]", *, patience_s: float = 0) -> None:
    """Kill a process with all that descend from it; it first gets SIGTERM, and so many seconds, if any."""
    members = family(process.pid)
    if patience_s:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
    for member in members:
        with suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    process.wait()


def family(process: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, IndexError):  # it has ended meanwhile
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    members = [process]
    for member in members:  # grows while it is walked
        members += children.get(member, [])
    return members


def held_bytes(process: int) -> int:
    """Proportional set size (`smaps_rollup` in the kernel's document `proc`): shared pages are split among sharers."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended meanwhile
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def last_line(text: str) -> str:
    """What a program said last, short enough for a table."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if lines else "it said nothing")[:200].replace("|", "/")


def best_of(scores: list[dict[str, Any]]) -> str:
    """The label with the highest score."""
    label: str = max(scores, key=lambda one: float(one["score"]))["label"]
    return label


OURS = "tuneserve"
CONTENDERS = {
    one.name: one
    for one in [
        Contender(
            OURS,
            ("{bin}/python", "run.py", "serve"),
            "/inference",
            lambda text: {"text": text},
            lambda answer: answer["label"],
            PROJECT / "production" / "docker-res",
        ),
        Contender(
            "fastapi-pipeline",
            ("{bin}/uvicorn", "fastapi_pipeline:app", "--port", "{port}"),
            "/classify",
            lambda text: {"text": text},
            lambda answer: answer["label"],
        ),
        Contender(
            "litserve",
            ("{bin}/python", "litserve_.py"),
            "/predict",
            lambda text: {"text": text},
            lambda answer: answer["label"],
        ),
        Contender(
            "litserve-openvino",
            ("{bin}/python", "litserve_openvino.py"),
            "/predict",
            lambda text: {"text": text},
            lambda answer: answer["label"],
            export=("{bin}/python", "litserve_openvino.py", "export", "{made}"),
        ),
        Contender(
            "infinity",
            (
                *("{bin}/infinity_emb", "v2", "--model-id", "{checkpoint}", "--served-model-name", "sentiment"),
                *("--engine", "torch", "--device", "cpu", "--batch-size", "32", "--port", "{port}"),
            ),
            "/classify",
            lambda text: {"model": "sentiment", "input": [text]},
            lambda answer: best_of(answer["data"][0]),
        ),
        Contender(
            "infinity-onnx",
            (
                *("{bin}/infinity_emb", "v2", "--model-id", "{made}", "--served-model-name", "sentiment"),
                *("--engine", "optimum", "--device", "cpu", "--batch-size", "32", "--port", "{port}"),
            ),
            "/classify",
            lambda text: {"model": "sentiment", "input": [text]},
            lambda answer: best_of(answer["data"][0]),
            export=(
                *("{bin}/optimum-cli", "export", "onnx", "--model", "{checkpoint}"),
                *("--task", "text-classification", "{made}"),
            ),
        ),
        Contender(
            "bentoml",
            ("{bin}/bentoml", "serve", "bentoml_:Sentiment", "--port", "{port}"),
            "/classify",
            lambda text: {"texts": [text]},
            lambda answer: answer[0]["label"],
        ),
        Contender(
            "mosec",
            ("{bin}/python", "mosec_.py", "--port", "{port}", "--timeout", "60000"),  # its own 3 s drop long queues
            "/inference",
            lambda text: {"text": text},
            lambda answer: answer["label"],
        ),
    ]
}
