"""The API's description: its viewer, and whether the server does as it says (schemathesis' cases, seeded)."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from wire import Client, served

from tuneserve.adapters.catalog import adapters_of
from tuneserve.lifecycle.feedback import Feedback
from tuneserve.lifecycle.feedback_database import FILE
from tuneserve.lifecycle.store import Store
from tuneserve.lifecycle.trainer import Trainer
from tuneserve.serving.http.front import OPEN_PATHS
from tuneserve.serving.http.viewer import PATHS
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings

KEY = "the-key"
EXAMPLES = os.environ.get("SCHEMATHESIS_EXAMPLES", "20")
"""Random cases of each route, beside those that follow from the description; thousands in all with 400."""
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.fixture
def port(settings: Settings, slot: Slot, tmp_path: Path) -> Iterator[int]:
    """A server with every route there is; what it is asked to train sleeps."""
    store = Store(settings.model_path)
    store.prepare()
    trainer = Trainer([sys.executable, "-c", "import time; time.sleep(600)"], store, serves=lambda: False)
    feedback = Feedback(settings.model_path / FILE, max_rows=1000, keep_texts=False)
    paths = {"aip_health_route": "/vertex/health", "aip_predict_route": "/vertex/predict"}
    changed = settings.model_copy(update={"api_key": SecretStr(KEY), **paths})
    with served(changed, slot, feedback=feedback, trainer=trainer, adapters=adapters_of(changed)) as port:
        yield port
    trainer.close()


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode()


def test_every_answer_is_described(port: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{port}/openapi.json"]
    # A stream of events has no end; tests/serving/test_page.py follows it.
    options = [
        "--exclude-path",
        "/events",
        "--checks",
        CHECKS,
        "--max-examples",
        EXAMPLES,
        "--seed",
        "1",
        "--generation-deterministic",
    ]
    done = subprocess.run(
        [*command, "-H", f"X-API-Key: {KEY}", "--phases", "examples,coverage,fuzzing", *options, "--no-color"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.findall(r"(\d+) generated", done.stdout)[0]) > 100, done.stdout


def test_the_viewers_files_are_the_servers_own(port: int) -> None:
    client = Client(port)
    status, headers, page = client.ask(get("/docs"))
    assert status == 200
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert not re.search(rb"https?://|<script>|<style| style=| on\w+=", page)  # the policy would not let them run
    named = {path.decode() for path in re.findall(rb'(?:src|href)="([^"]+)"', page)}
    assert "data:," in named  # an empty icon: without one browsers ask for /favicon.ico, and get 404
    named.remove("data:,")
    assert {"/docs", *named} == set(PATHS)
    assert named <= OPEN_PATHS
    for path in named:
        status, headers, content = client.ask(get(path))
        assert (status, len(content) > 100) == (200, True)
        assert headers["content-type"].startswith(("text/javascript", "text/css"))
        assert headers["x-content-type-options"] == "nosniff"
    client.close()


@pytest.mark.parametrize("path", ["/docs/README.md", "/docs/..%2f__init__.py", "/docs/swagger-ui.css/x", "/redoc"])
def test_no_other_file_is_shown(port: int, path: str) -> None:
    client = Client(port)
    request = get(path).replace(b"Host: a", f"Host: a\r\nX-API-Key: {KEY}".encode())
    assert client.ask(request)[0] == 404
    client.close()


def test_every_answer_says_that_its_type_is_meant(port: int) -> None:
    client = Client(port)
    for path in ("/livez", "/model", "/nothing"):
        assert client.ask(get(path))[1]["x-content-type-options"] == "nosniff"
    client.close()
