"""Models that write, served by the real command: real clients, streams, and clients that hang up."""

import json
import re
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
import writers
from huggingface_hub import InferenceClient
from processes.test_server import Server, Start, environment, start
from wire import wait_until

__all__ = ["environment", "start"]

LONG = 20_000
"""Tokens that take the tiny model so long that nobody waits for the end."""


@pytest.fixture
def served(start: Start, environment: dict[str, str], tmp_path: Path) -> Any:
    def begin(model: Path, **changed: str) -> Server:
        places = {"MODEL_PATH": str(tmp_path / "none"), "DATA_PATH": str(tmp_path / "data")}
        server = start(environment | places | {"MODEL": str(model)} | changed)
        server.wait_until_ready()
        return server

    return begin


def figure(server: Server, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", httpx.get(f"{server.url}/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_summaries_for_the_clients_there_are(served: Any, tmp_path: Path) -> None:
    server = served(writers.make_pair(tmp_path / "model", learned=True), TASK="summarization")
    text, summary = "the film was very good and the food was cold", "the film was very good"
    asked = {"text": text, "min_length": 2, "max_length": 20}
    assert httpx.post(f"{server.url}/summary", json=asked).json() == {"summary": summary, "Device": "cpu"}
    for url in (f"{server.url}/generate", server.url):
        client = InferenceClient(url)
        assert client.summarization(text).summary_text == summary
        assert client.summarization(text, generate_parameters={"max_new_tokens": 3}).summary_text == "the film"
    assert httpx.get(f"{server.url}/").status_code == 200
    assert server.end()[0] == 0


def test_generated_text_for_the_clients_there_are(served: Any, tmp_path: Path) -> None:
    server = served(writers.make_causal(tmp_path / "model"), TASK="text-generation", PRECISION="fp32")
    client = InferenceClient(f"{server.url}/generate")
    whole = client.text_generation("a great film", max_new_tokens=9)
    assert len(whole.split()) > 2
    assert client.text_generation("a great film", max_new_tokens=9, return_full_text=True) == "a great film" + whole
    assert "".join(client.text_generation("a great film", max_new_tokens=9, stream=True)) == whole
    at_the_root = InferenceClient(server.url)
    assert at_the_root.text_generation("a great film", max_new_tokens=9) == whole
    assert "".join(at_the_root.text_generation("a great film", max_new_tokens=9, stream=True)) == whole
    *_, last = client.text_generation("a great film", max_new_tokens=9, stream=True, details=True)
    assert last.generated_text == whole
    assert last.details is not None
    assert last.details.finish_reason in ("length", "eos_token")
    drawn = {client.text_generation("a great film", max_new_tokens=9, temperature=1.5, seed=seed) for seed in (3, 3, 4)}
    assert len(drawn) == 2
    with pytest.raises(Exception, match="at most 1024"):
        client.text_generation("a great film", max_new_tokens=1025)
    assert figure(server, "tuneserve_first_token_seconds_count") > 6
    assert server.end()[0] == 0


def test_a_client_that_hangs_up_or_waits_no_longer_frees_its_place(served: Any, tmp_path: Path) -> None:
    model = writers.make_causal(tmp_path / "model", positions=LONG + 100)
    server = served(model, TASK="text-generation", MAX_NEW_TOKENS=str(LONG))
    for stream in (False, True):
        hang_up(server, stream=stream)
        answer = httpx.post(f"{server.url}/generate", json={"inputs": "food", "parameters": {"max_new_tokens": 3}})
        assert answer.status_code == 200
    headers = {"X-Request-Timeout-S": "1"}
    with httpx.stream("POST", f"{server.url}/generate", json=asking(stream=True), headers=headers, timeout=60) as late:
        assert late.status_code == 200
        events = [json.loads(line.removeprefix("data:")) for line in late.iter_lines() if line]
    assert events[0]["token"]["text"]
    assert events[-1] == {"error": "There was no answer in time.", "error_type": "TimeoutExceededError"}
    seen = [0.0]

    def rests() -> bool:
        seen.append(figure(server, "tuneserve_written_tokens_total"))
        return seen[-1] == seen[-2]

    wait_until(rests)
    assert seen[-1] < LONG
    assert server.end()[0] == 0


def asking(*, stream: bool) -> dict[str, Any]:
    parameters = {"max_new_tokens": LONG, "min_new_tokens": LONG}
    return {"inputs": "a film", "stream": stream, "parameters": parameters}


def hang_up(server: Server, *, stream: bool) -> None:
    """Ask for a long text, and leave once it is being written."""
    body = json.dumps(asking(stream=stream)).encode()
    before = figure(server, "tuneserve_written_tokens_total")
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as client:
        client.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        if stream:
            assert b"data:" in client.recv(1 << 16) + client.recv(1 << 16)
        wait_until(lambda: figure(server, "tuneserve_written_tokens_total") > before + 10)
