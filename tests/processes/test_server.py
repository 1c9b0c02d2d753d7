"""The real server as a real process on a real port."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import Disk
from loop import free_port
from wire import Client, wait_until, write

from tuneserve.artifact import sha256_of
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
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def status(self, path: str) -> int:
        """Of a page; 0 if nobody answers."""
        with suppress(httpx.TransportError):
            return httpx.get(self.url + path).status_code
        return 0

    def wait_for(self, status: int, path: str) -> None:
        wait_until(lambda: self.process.poll() is not None or self.status(path) == status)
        if self.process.poll() is not None:
            pytest.fail(self.output())

    def wait_until_ready(self) -> None:
        self.wait_for(200, "/readyz")

    def wait_for_line(self, words: str) -> None:
        assert self.process.stdout is not None
        assert any(words in line for line in self.process.stdout)

    def output(self) -> str:
        """What it says until it has ended."""
        return self.process.communicate(timeout=240)[0]

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        output = self.output()
        return self.process.returncode, output


@pytest.fixture
def environment(store: Path, tmp_path: Path) -> dict[str, str]:
    port = str(free_port())
    return {"MODEL_PATH": str(store), "LOG_PATH": str(tmp_path), "HOST": "127.0.0.1", "PORT": port}


@pytest.fixture
def copied(store: Path, tmp_path: Path, environment: dict[str, str]) -> Path:
    """The version's folder in a copy of the store, which is the one that is served."""
    environment["MODEL_PATH"] = str(shutil.copytree(store, tmp_path / "copy"))
    [folder] = (tmp_path / "copy").glob("versions/*")
    return folder


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
    code, output = server.end(number)
    assert code == 0, output
    assert "Traceback" not in output


def test_a_server_is_also_stopped_while_the_model_loads(start: Start, environment: dict[str, str]) -> None:
    server = start(environment)
    server.wait_for(200, "/livez")
    code, output = server.end()
    assert code in (0, 143), output
    assert UNFINISHED not in output


UNFINISHED = "not all that was accepted could be finished"
HANGING = """
import sys, time
import run
from tuneserve.serving import batcher, follower, slot
from tuneserve.serving.http import server

def hang(*about, **options):
    print("it hangs", flush=True)
    time.sleep(600)

server.LEAVE_S, server.DRAIN_S = 2, 0.5
{how}
sys.exit(run.main(["serve"]))
"""
"""A server in which something never ends; its 25 seconds are 2, which is all that is changed of its leaving."""

ENGINE_HANGS = """
take = slot.Slot.take

def take_then_hang(*about):
    take(*about)
    batcher.Batcher._finish = hang

slot.Slot.take = take_then_hang
"""


def test_an_engine_that_hangs_does_not_keep_a_server_that_was_told_to_leave(
    start: Start, environment: dict[str, str]
) -> None:
    server = start(environment, "-c", HANGING.format(how=ENGINE_HANGS))
    server.wait_until_ready()
    with socket.create_connection(("127.0.0.1", int(environment["PORT"]))) as client:
        client.sendall(write())
        server.wait_for_line("it hangs")
        code, output = server.end()
    assert code == 128 + signal.SIGTERM
    assert UNFINISHED in output


def test_a_model_that_takes_long_to_load_does_not_keep_a_server_that_was_told_to_leave(
    start: Start, environment: dict[str, str]
) -> None:
    server = start(environment, "-c", HANGING.format(how="follower.Follower._take = hang"))
    server.wait_for_line("it hangs")
    server.wait_for(503, "/readyz")
    code, output = server.end()
    assert code == 0, output
    assert "while a model was being loaded" in output


def test_requests_under_way_are_answered_before_the_server_leaves(start: Start, environment: dict[str, str]) -> None:
    server = start(environment | {"MAX_BATCH_TEXTS": "6000"})
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
    wait_until(lambda: re.search(r"^tuneserve_tokens_total [1-9]", httpx.get(f"{server.url}/metrics").text, re.M))
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
        client.sendall(b"POST /inference HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 1000\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 100")  # now it waits for the body
        client.sendall(b"{")
    wait_until(lambda: 'status="499"' in httpx.get(f"{server.url}/metrics").text)
    assert 'status="500"' not in httpx.get(f"{server.url}/metrics").text


def test_an_empty_store_is_said_plainly(start: Start, environment: dict[str, str], tmp_path: Path) -> None:
    server = start(environment | {"MODEL_PATH": str(tmp_path / "nothing")})
    output = server.output()
    assert server.process.returncode == 8
    assert "There is no model in MODEL_PATH=" in output
    assert "Train one first" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("file", ["model.safetensors", "engine/model.bin"])
def test_torn_weights_end_the_server_instead_of_leaving_a_zombie(
    start: Start, environment: dict[str, str], copied: Path, file: str
) -> None:
    weights = copied / file
    weights.write_bytes(weights.read_bytes()[:1000])
    server = start(environment)
    output = server.output()
    assert server.process.returncode not in (0, -signal.SIGKILL), output
    assert "is damaged" in output


@pytest.mark.parametrize("damage", ["a bit", "zeroes"])
def test_weights_that_are_not_those_that_were_saved_never_answer(
    start: Start, environment: dict[str, str], copied: Path, damage: str
) -> None:
    weights = copied / "engine" / "model.bin"
    content = bytearray(weights.read_bytes())
    middle = len(content) // 2
    content[middle:] = bytes([content[middle] ^ 1]) + content[middle + 1 :] if damage == "a bit" else bytes(middle)
    weights.write_bytes(content)
    server = start(environment)
    output = server.output()
    assert server.process.returncode == 6, output
    assert "engine/model.bin is not" in output


def test_weights_that_compute_something_else_are_found_out_by_the_golden_answers(
    start: Start, environment: dict[str, str], copied: Path
) -> None:
    weights = copied / "engine" / "model.bin"
    content = np.frombuffer(weights.read_bytes(), dtype=np.float32).copy()
    content[(abs(content) > 1e-4) & (abs(content) < 10)] *= -1  # the weights, and not the numbers of the shapes
    weights.write_bytes(content.tobytes())
    metadata = json.loads((copied / "metadata.json").read_text())
    metadata["sha256"]["engine/model.bin"] = sha256_of(weights)
    (copied / "metadata.json").write_text(json.dumps(metadata))
    server = start(environment)
    output = server.output()
    assert server.process.returncode == 6, output
    assert "does not answer as it did" in output


def test_a_version_without_a_graph_is_served_by_torch(
    start: Start, environment: dict[str, str], store: Path, copied: Path
) -> None:
    metadata_file = copied / "metadata.json"
    metadata = json.loads(metadata_file.read_text())
    shutil.rmtree(copied / "engine")
    for kept in ("files", "sha256"):
        metadata[kept] = {name: one for name, one in metadata[kept].items() if not name.startswith("engine/")}
    metadata_file.write_text(json.dumps(metadata | {"engine": None}))
    texts = ["a great film", "awful food", "the film was not bad and the food was very very warm"]
    answers = []
    for changed in ({"MODEL_PATH": str(store)}, {}):
        server = start(environment | changed)
        server.wait_until_ready()
        batch = httpx.post(f"{server.url}/inference/batch", json={"texts": texts}).json()["predictions"]
        alone = [httpx.post(f"{server.url}/inference", json={"text": text}).json() for text in texts]
        assert [one["scores"]["good"] for one in batch] == pytest.approx(
            [one["scores"]["good"] for one in alone], abs=0.02
        )
        answers.append([one["scores"]["good"] for one in batch])
        code, output = server.end()
        assert code == 0
        assert ("torch on the CPU, without padding" in output) == (not changed)
    assert answers[1] == pytest.approx(answers[0], abs=0.02)


BUSY = """
import sys
import run
from tuneserve.serving.http import server

leave = server.Server.shutdown

async def leave_late(*about, **options):
    print("it is busy", flush=True)
    sys.stdin.readline()
    await leave(*about, **options)

server.Server.shutdown = leave_late
server.ACCEPT_S, server.READ_S = 60, 0.5
sys.exit(run.main(["serve"]))
"""
"""A server whose event loop is busy when it is told to leave, so that the system alone takes new connections. It has as
long as it takes to accept and to read them, for other tests may run on the same cores."""


def test_who_has_connected_before_a_busy_server_leaves_is_answered(start: Start, environment: dict[str, str]) -> None:
    server = start(environment, "-c", BUSY)
    server.wait_until_ready()
    server.process.send_signal(signal.SIGTERM)
    server.wait_for_line("it is busy")
    with ExitStack() as stack:
        clients = [stack.enter_context(closing(Client(int(environment["PORT"])))) for _ in range(300)]
        for client in clients:
            client.send(write())
        assert server.process.stdin is not None
        server.process.stdin.write("\n")
        server.process.stdin.flush()
        assert [client.read()[0] for client in clients] == [200] * 300
    server.output()
    assert server.process.returncode == 0


def test_a_port_that_is_taken_is_an_error(start: Start, environment: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(environment["PORT"])))
        taken.listen()
        server = start(environment)
        output = server.output()
    assert server.process.returncode == 2, output
    assert f"PORT={environment['PORT']} cannot be listened on" in output
    assert "Traceback" not in output


def test_a_taken_port_is_found_before_the_training(start: Start, environment: dict[str, str], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(environment["PORT"])))
        taken.listen()
        server = start(environment | {"MODEL_PATH": str(tmp_path / "none")}, "run.py", "train-serve")
        output = server.output()
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
