"""The real server as a real process on a real port."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import Disk

from tuneserve.settings import PROJECT

FOLDER = PROJECT / "production" / "docker-res"
Start = Callable[..., "Server"]


class Server:
    def __init__(self, environment: dict[str, str], command: list[str]) -> None:
        self.url = f"http://127.0.0.1:{environment['PORT']}"
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=FOLDER,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)
        pytest.fail(f"not ready: {self.end()}")

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=15)
        return self.process.returncode, output


@pytest.fixture
def environment(store: Path, tmp_path: Path) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"MODEL_PATH": str(store), "LOG_PATH": str(tmp_path), "HOST": "127.0.0.1", "PORT": str(port)}


@pytest.fixture
def start() -> Iterator[Start]:
    servers: list[Server] = []

    def start_server(environment: dict[str, str], *command: str) -> Server:
        servers.append(Server(environment, list(command or ("run.py", "serve"))))
        return servers[-1]

    yield start_server
    for server in servers:
        server.process.kill()
        server.process.communicate()


def test_what_was_trained_is_served(start: Start, environment: dict[str, str], store: Path) -> None:
    server = start(environment)
    server.wait_until_ready()
    answers = httpx.post(f"{server.url}/inference/batch", json={"texts": ["a great film", "awful food"]}).json()
    assert [one["label"] for one in answers["predictions"]] == ["good", "bad"]
    champion = (store / "champion").read_text().strip()
    assert {one["model_version"] for one in answers["predictions"]} == {champion}
    assert httpx.get(f"{server.url}/model").json()["settings"]["lr"] == 5e-3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_told_to_stop_leaves_with_zero(
    start: Start, environment: dict[str, str], number: signal.Signals
) -> None:
    server = start(environment)
    server.wait_until_ready()
    began = time.monotonic()
    code, output = server.end(number)
    assert code == 0, output
    assert time.monotonic() - began < 10
    assert "Traceback" not in output


def test_a_stop_while_the_model_loads_is_quick_too(start: Start, environment: dict[str, str]) -> None:
    server = start(environment)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            httpx.get(f"{server.url}/livez")
            break
        except httpx.TransportError:
            time.sleep(0.02)
    began = time.monotonic()
    code, output = server.end()
    assert code in (0, 143), output
    assert time.monotonic() - began < 10


HANGING = """
import sys, time
import run
from tuneserve.serving import batcher, follower
from tuneserve.serving.http import server

def hang(*about, **options):
    print("it hangs", flush=True)
    time.sleep(600)

server.LEAVE_S, server.DRAIN_S = 4, 1
{where} = hang
sys.exit(run.main(["serve"]))
"""
"""A server in which something never ends; its 25 seconds are 4, which is all that is changed of its leaving."""


def test_an_engine_that_hangs_does_not_keep_a_server_that_was_told_to_leave(
    start: Start, environment: dict[str, str]
) -> None:
    server = start(environment, "-c", HANGING.format(where="batcher.Batcher._finish"))
    server.wait_until_ready()
    with socket.create_connection(("127.0.0.1", int(environment["PORT"]))) as client:
        client.sendall(b'POST /inference HTTP/1.1\r\nHost: a\r\nContent-Length: 16\r\n\r\n{"text": "film"}')
        assert server.process.stdout is not None
        assert any("it hangs" in line for line in server.process.stdout)
        began = time.monotonic()
        code, output = server.end()
    assert 3 < time.monotonic() - began < 8
    assert code == 128 + signal.SIGTERM
    assert "not all that was accepted could be finished" in output


def test_a_model_that_takes_long_to_load_does_not_keep_a_server_that_was_told_to_leave(
    start: Start, environment: dict[str, str]
) -> None:
    server = start(environment, "-c", HANGING.format(where="follower.Follower._take"))
    assert server.process.stdout is not None
    assert any("it hangs" in line for line in server.process.stdout)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/readyz").status_code == 503:
                break
        time.sleep(0.02)
    began = time.monotonic()
    code, output = server.end()
    assert time.monotonic() - began < 3
    assert code == 0, output
    assert "while a model was being loaded" in output


def test_requests_under_way_are_answered_before_the_server_leaves(start: Start, environment: dict[str, str]) -> None:
    server = start(environment)
    server.wait_until_ready()
    texts = ["film " * 30] * 6000
    statuses: list[int] = []

    clients = [httpx.Client(timeout=30) for _ in range(3)]  # made before the clock runs: that alone takes a while
    for client in clients:
        client.get(f"{server.url}/livez")

    def ask(client: httpx.Client) -> None:
        statuses.append(client.post(f"{server.url}/inference/batch", json={"texts": texts}).status_code)
        client.close()

    threads = [threading.Thread(target=ask, args=[client]) for client in clients]
    for thread in threads:
        thread.start()
    metrics, deadline = "", time.monotonic() + 20
    while "tuneserve_tokens_total" not in metrics or "tuneserve_tokens_total 0.0" in metrics:
        assert time.monotonic() < deadline
        metrics = httpx.get(f"{server.url}/metrics").text
    assert not statuses  # the first batch is in the engine, and hundreds wait
    code, output = server.end()
    for thread in threads:
        thread.join()
    assert statuses == [200, 200, 200], output
    assert code == 0


def test_a_client_that_hangs_up_is_not_counted_as_a_failure(start: Start, environment: dict[str, str]) -> None:
    server = start(environment)
    server.wait_until_ready()
    with socket.create_connection(("127.0.0.1", int(environment["PORT"]))) as client:
        client.sendall(b"POST /inference HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{")
        time.sleep(0.5)  # for the server to have read what there is
    deadline = time.monotonic() + 30
    while 'status="499"' not in (metrics := httpx.get(f"{server.url}/metrics", timeout=30).text):
        assert time.monotonic() < deadline, metrics
    assert 'status="500"' not in metrics


def test_an_empty_store_is_said_plainly(start: Start, environment: dict[str, str], tmp_path: Path) -> None:
    server = start(environment | {"MODEL_PATH": str(tmp_path / "nothing")})
    output, _ = server.process.communicate(timeout=30)
    assert server.process.returncode == 8
    assert "There is no model in MODEL_PATH=" in output
    assert "Train one first" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("file", ["model.safetensors", "engine/model.bin"])
def test_torn_weights_end_the_server_instead_of_leaving_a_zombie(
    start: Start, environment: dict[str, str], store: Path, tmp_path: Path, file: str
) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(store, torn)
    champion = (torn / "champion").read_text().strip()
    weights = torn / "versions" / champion / file
    weights.write_bytes(weights.read_bytes()[:1000])
    server = start(environment | {"MODEL_PATH": str(torn)})
    output, _ = server.process.communicate(timeout=60)
    assert server.process.returncode not in (0, -signal.SIGKILL), output
    assert "is damaged" in output


def test_weights_with_a_flipped_bit_are_found_out_by_the_golden_answers(
    start: Start, environment: dict[str, str], store: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(store, bad)
    champion = (bad / "champion").read_text().strip()
    weights = bad / "versions" / champion / "engine" / "model.bin"
    content = np.frombuffer(weights.read_bytes(), dtype=np.float32).copy()
    content[(abs(content) > 1e-4) & (abs(content) < 10)] *= -1  # the weights, and not the numbers of the shapes
    weights.write_bytes(content.tobytes())
    server = start(environment | {"MODEL_PATH": str(bad)})
    output, _ = server.process.communicate(timeout=60)
    assert server.process.returncode == 6, output
    assert "does not answer as it did" in output


def test_a_version_without_a_graph_is_served_by_torch(
    start: Start, environment: dict[str, str], store: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "without a graph"
    shutil.copytree(store, copy)
    [metadata_file] = copy.glob("versions/*/metadata.json")
    metadata = json.loads(metadata_file.read_text())
    shutil.rmtree(metadata_file.parent / "engine")
    metadata["files"] = {name: size for name, size in metadata["files"].items() if not name.startswith("engine/")}
    metadata_file.write_text(json.dumps(metadata | {"engine": None}))
    texts = ["a great film", "awful food", "the film was not bad and the food was very very warm"]
    answers = []
    for folder in (store, copy):
        server = start(environment | {"MODEL_PATH": str(folder)})
        server.wait_until_ready()
        batch = httpx.post(f"{server.url}/inference/batch", json={"texts": texts}).json()["predictions"]
        alone = [httpx.post(f"{server.url}/inference", json={"text": text}).json() for text in texts]
        assert [one["scores"]["good"] for one in batch] == pytest.approx(
            [one["scores"]["good"] for one in alone], abs=0.02
        )
        answers.append([one["scores"]["good"] for one in batch])
        code, output = server.end()
        assert code == 0
        assert ("torch on the CPU, without padding" in output) == (folder == copy)
    assert answers[1] == pytest.approx(answers[0], abs=0.02)


BUSY = """
import sys, time
import run
from tuneserve.serving.http import server

leave = server.Server.shutdown

async def leave_late(*about, **options):
    print("it is busy", flush=True)
    time.sleep(2)
    await leave(*about, **options)

server.Server.shutdown = leave_late
sys.exit(run.main(["serve"]))
"""
"""A server whose event loop is busy when it is told to leave, so that the system alone takes new connections."""


def test_who_has_connected_before_a_busy_server_leaves_is_answered(start: Start, environment: dict[str, str]) -> None:
    server = start(environment, "-c", BUSY)
    server.wait_until_ready()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.stdout is not None
    assert any("it is busy" in line for line in server.process.stdout)
    clients = [socket.create_connection(("127.0.0.1", int(environment["PORT"])), timeout=10) for _ in range(300)]
    for client in clients:
        client.sendall(b"POST /inference HTTP/1.1\r\nHost: a\r\nContent-Length: 16\r\n\r\n" + b'{"text": "film"}')
    answers = []
    for client in clients:
        with client:
            answers.append(client.recv(12))
    assert answers == [b"HTTP/1.1 200"] * 300
    server.process.communicate(timeout=15)
    assert server.process.returncode == 0


def test_a_port_that_is_taken_is_an_error(start: Start, environment: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(environment["PORT"])))
        taken.listen()
        server = start(environment)
        output, _ = server.process.communicate(timeout=60)
    assert server.process.returncode == 2, output
    assert f"PORT={environment['PORT']} cannot be listened on" in output
    assert "Traceback" not in output


def test_a_taken_port_is_found_before_the_training(start: Start, environment: dict[str, str], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(environment["PORT"])))
        taken.listen()
        server = start(environment | {"MODEL_PATH": str(tmp_path / "none")}, "run.py", "train-serve")
        output, _ = server.process.communicate(timeout=60)
    assert server.process.returncode == 2, output
    assert not (tmp_path / "none").exists()
    assert "cannot be listened on" in (tmp_path / "tuneserve.log").read_text()


def test_any_asgi_server_can_run_the_app(start: Start, environment: dict[str, str]) -> None:
    server = start(environment, "-m", "uvicorn", "app:app", "--host", "127.0.0.1", "--port", environment["PORT"])
    server.wait_until_ready()
    assert httpx.post(f"{server.url}/inference", json={"text": "a dull film"}).json()["label"] == "bad"


def test_the_log_never_holds_the_text(start: Start, environment: dict[str, str], tmp_path: Path) -> None:
    server = start(environment)
    server.wait_until_ready()
    httpx.post(f"{server.url}/inference", json={"text": "a very private film"})
    httpx.post(f"{server.url}/inference", json={"text": ["a very private film"]})
    _, output = server.end()
    assert "private" not in output + (tmp_path / "tuneserve.log").read_text()


def test_a_full_disk_under_the_log_does_not_touch_the_answers(
    start: Start, environment: dict[str, str], disk: Disk
) -> None:
    server = start(environment | {"LOG_PATH": str(disk.path), "ACCESS_LOG": "1"})
    server.wait_until_ready()
    disk.fill()
    with httpx.Client() as client:
        for number in range(200):
            answer = client.post(
                f"{server.url}/inference", json={"text": "film"}, headers={"X-Request-Id": f"n{number}"}
            )
            assert answer.status_code == 200
    code, output = server.end()
    assert code == 0
    assert output.count("No space left") == 1
    logged = [line.split()[-1] for line in output.splitlines() if " /inference 200 " in line]
    assert logged == [f"n{number}" for number in range(200)]
