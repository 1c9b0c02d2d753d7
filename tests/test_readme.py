"""README's shell blocks, run from the first to the last in a copy of the project, as a newcomer would.

A comment above a block says when it is not run here: `<!-- needs Docker -->`. `<!-- background -->` starts a server
that the blocks after it talk to.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tuneserve.artifact import read_version
from tuneserve.settings import PROJECT

BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```sh\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(found["mark"] or "", found["code"]) for found in BLOCK.finditer((PROJECT / "README.md").read_text())]
NEEDS = re.compile(r"needs (Docker|Docker and a GPU|a GPU|a network|a trained store)")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's files in an empty folder; only the libraries are not installed again."""
    folder = tmp_path_factory.mktemp("clone") / "tuneserve"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in files.stdout.splitlines():
        if (PROJECT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, folder / name)
    (folder / ".venv").symlink_to(PROJECT / ".venv")
    return folder


def test_every_mark_is_one_that_is_known() -> None:
    assert {mark for mark, _ in BLOCKS if not NEEDS.fullmatch(mark)} == {"", "background"}
    assert [mark for mark, _ in BLOCKS].count("background") == 1


def test_the_blocks_work_in_their_order(clone: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"PORT": port, "HOST": "127.0.0.1"}
    answers = []
    server: subprocess.Popen[bytes] | None = None
    try:
        for mark, code in BLOCKS:
            script = code.replace("localhost:8000", f"localhost:{port}").replace("/tmp/tickets", str(clone / "tickets"))
            if mark == "background":
                server = subprocess.Popen(["bash", "-c", script], cwd=clone, env=environment, start_new_session=True)
                wait_until_ready(port, server)
            elif not mark:
                done = subprocess.run(
                    ["bash", "-ec", script], cwd=clone, env=environment, capture_output=True, text=True
                )
                assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}"
                answers.append(done.stdout)
    finally:
        if server is not None:
            os.killpg(server.pid, signal.SIGINT)
            assert server.wait(timeout=10) in (0, 130, -signal.SIGINT)
    assert json.loads(answers[0])["label"] == "positive"
    assert [one["label"] for one in json.loads(answers[1])["predictions"]] == ["positive", "negative"]
    assert "validation_accuracy=" in answers[2]
    assert re.search(r"encoded \d+ of \d+ texts", answers[3])
    assert answers[4].splitlines()[-3].startswith("text,label,predicted_label,score,scores,tokens,truncated,error,")
    assert "'label': 'negative'" in answers[5]

    champion = (clone / "models" / "champion").read_text().strip()
    metadata = read_version(clone / "models" / "versions" / champion).metadata
    assert metadata["data"]["dataset"] == "sample"
    assert metadata["metrics"]["test"]["accuracy"] > 0.7


def wait_until_ready(port: str, server: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        assert server.poll() is None, "the server has ended"
        with suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                return
        time.sleep(0.2)  # a test that asks without pause takes a core from the training it waits for
    pytest.fail("the server never became ready")
