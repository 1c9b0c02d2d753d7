"""The commands of docs/tutorial.md, from the settings to the rollback, with a tiny model and made-up messages."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from loop import free_port
from tree import copy_project

from tuneserve.settings import PROJECT
from tuneserve.signals import end_with_parent

TUTORIAL = (PROJECT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^<!-- needs the data of this page -->\n```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall(TUTORIAL)
MESSAGES = [line.partition("|") for line in re.findall(r"^[a-z_]+\|.*$", TUTORIAL, re.MULTILINE)]
KEY = {"Authorization": "Bearer choose-your-own"}


@dataclass
class Walk:
    """A copy of the project with data and a tiny model for the tutorial, and its server once it is started."""

    clone: Path
    environment: dict[str, str]
    server: "subprocess.Popen[str] | None" = None

    @property
    def address(self) -> str:
        return f"localhost:{self.environment['PORT']}"

    def start(self, code: str, **options: int) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["bash", "-ec", code.replace("localhost:8000", self.address)],
            cwd=self.clone,
            env=self.environment,
            text=True,
            start_new_session=True,
            preexec_fn=end_with_parent,
            **options,
        )

    def run(self, code: str) -> str:
        """What a block prints."""
        process = self.start(code, stdout=subprocess.PIPE)
        said, _ = process.communicate()
        assert process.returncode == 0, f"{code}\n{said}"
        return said

    def serve(self, code: str) -> None:
        self.server = self.start(code)
        self.wait(lambda: httpx.get(f"http://{self.address}/readyz").status_code == 200)

    def ask(self, route: str, **body: str) -> Any:
        """What the server answers with the key."""
        headers = {"Authorization": "Bearer choose-your-own"}
        method = "POST" if body else "GET"
        return httpx.request(method, f"http://{self.address}{route}", json=body or None, headers=headers).json()

    def versions(self) -> list[str]:
        """Those of the trainings, the newest first, once all have ended."""
        self.wait(lambda: all(job["state"] == "finished" for job in self.ask("/jobs")))
        return [job["version"] for job in self.ask("/jobs")]

    def wait(self, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline:
            assert self.server is not None
            assert self.server.poll() is None, "the server has ended"
            with suppress(httpx.TransportError):
                if until():
                    return
            time.sleep(0.2)
        pytest.fail("nothing came of it")


@pytest.fixture
def walk(tmp_path: Path) -> Iterator[Walk]:
    """A walk whose server ends with the test."""
    clone = copy_project(tmp_path / "clone")
    labels = sorted({label for label, _, _ in MESSAGES})
    rows = [
        (f"{text} {tiny.WORDS[number % len(labels)]}", labels[number % len(labels)])
        for number, (text, _) in enumerate(tiny.sentences(210))
    ]
    tiny.write_csv(clone / "bank" / "train.csv", rows, header=("text", "category"))
    walk = Walk(
        clone,
        os.environ
        | {
            "BASE_MODEL": str(tiny.make_base_model(tmp_path / "base")),
            "HOST": "127.0.0.1",
            "PORT": str(free_port()),
            "NUM_MAX_POSITIONS": "32",
            "OMP_NUM_THREADS": "1",
            "RETRAIN_NICE": "10",  # this machine's cores may be busy
            "MAX_ACCURACY_DROP": "1",
            "MAX_LATENCY_INCREASE": "100",
        },
    )
    yield walk
    if walk.server is not None:
        with suppress(ProcessLookupError):
            os.killpg(walk.server.pid, signal.SIGKILL)
        walk.server.wait()


def test_the_walk_leads_from_settings_to_a_rollback(walk: Walk) -> None:
    settings, doctor, serve, right, wrong, correct, label, retrain, rollback = BLOCKS
    walk.run(settings)
    assert "ok    dataset" in walk.run(doctor)
    walk.serve(serve)
    [first] = walk.versions()
    assert json.loads(walk.run(right))["label"] in {label for label, _, _ in MESSAGES}
    before = json.loads(walk.run(wrong))
    assert json.loads(walk.run(correct)) == {"stored": True}
    walk.run(label)
    assert walk.ask("/feedback")["labels"] == len(MESSAGES)  # one of them had been sent before
    assert '"why":"POST /retrain"' in walk.run(retrain)
    second, _ = walk.versions()
    assert f"{first} is the champion again, {second} is withdrawn" in walk.run(rollback)
    walk.wait(lambda: walk.ask("/model")["version"] == first)
    assert walk.ask("/inference", text="An ATM ate my plastic last night.") == before
