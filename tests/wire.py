"""Requests as bytes, and the server that reads them from real sockets."""

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig

from tuneserve.lifecycle.feedback import Feedback
from tuneserve.lifecycle.trainer import Trainer
from tuneserve.serving.batcher import Batcher
from tuneserve.serving.http.app import Adapter, create_app
from tuneserve.serving.http.front import Drain
from tuneserve.serving.http.protocol import Protocol
from tuneserve.serving.http.request_log import RequestLog
from tuneserve.serving.http.server import Server, listen
from tuneserve.serving.http.traces import SILENT
from tuneserve.serving.service import Service
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings
from tuneserve.tasks.classification import CLASSIFICATION
from tuneserve.tasks.classifier import Classifier
from tuneserve.tasks.task import Task

BODY = b'{"text": "film"}'
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"


def write(body: bytes = BODY, *headers: str, path: str = "/inference", http: str = "1.1") -> bytes:
    lines = [f"POST {path} HTTP/{http}", "Host: a", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


def wait_until(condition: Callable[[], object], *, seconds: float = 300) -> None:
    """Wait until the condition holds; for other tests on the same cores the bound is far off."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


class Client:
    """A connection whose answers are read one after another."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=240)
        self._file = self.socket.makefile("rb")

    def send(self, request: bytes) -> None:
        self.socket.sendall(request)

    def read(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next answer; the status is 0 if the connection has ended."""
        first = self._file.readline()
        if not first:
            return 0, {}, b""
        headers = {}
        while line := self._file.readline().strip():
            name, _, value = line.decode().partition(": ")
            headers[name] = value
        return int(first.split()[1]), headers, self._file.read(int(headers.get("content-length", 0)))

    def is_answered(self) -> bool:
        return bool(select.select([self.socket], [], [], 0)[0])

    def ask(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        self.send(request)
        return self.read()

    def close(self) -> None:
        self._file.close()
        self.socket.close()


def app_of(
    settings: Settings,
    slot: Slot,
    trainer: Trainer | None = None,
    feedback: Feedback | None = None,
    task: Task = CLASSIFICATION,
    **options: Any,
) -> FastAPI:
    """The application over a slot, in which a model for the task is."""
    limits = {"timeout_s": settings.request_timeout_s, "max_inputs": settings.max_batch_texts}
    service = Service.of(slot, feedback, **limits)
    return create_app(settings, service, task, trainer, **options)


@contextmanager
def served(
    settings: Settings,
    slot: Slot,
    *,
    feedback: Feedback | None = None,
    trainer: Trainer | None = None,
    telemetry: TelemetryConfig = SILENT,
    adapters: Sequence[Adapter] = (),
    task: Task = CLASSIFICATION,
    port: int = 0,
    **options: Any,
) -> Iterator[int]:
    """The port of a server over the slot; any that is free, unless one is named."""
    with listen("127.0.0.1", port) as listener:
        drain = Drain()
        log = RequestLog(slot.metrics, logs=settings.access_log)
        protocol = partial(Protocol, request_log=log, timeout_s=settings.request_timeout_s)
        more = {"telemetry": telemetry, "adapters": adapters, "drain": drain, "listener": listener, "task": task}
        app = app_of(settings, slot, trainer, feedback, **more)
        options = {"http": protocol, "log_config": None, "timeout_graceful_shutdown": 5, **options}
        server = Server(uvicorn.Config(app, **options), drain)
        thread = threading.Thread(target=server.run, args=[[listener]])
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def batcher_of(slot: Slot) -> Batcher:
    """The queue of the classifier that answers."""
    model = slot.model()
    assert isinstance(model, Classifier)
    return model.batcher


def counts(slot: Slot) -> dict[tuple[str, str], float]:
    """Answers by route and status."""
    samples = [one for family in slot.metrics._registry.collect() for one in family.samples]
    found = [one for one in samples if one.name == "tuneserve_requests_total"]
    return {(one.labels["route"], one.labels["status"]): one.value for one in found}


def wait_until_it_computes(slot: Slot) -> None:
    """Wait until an echo has begun its first batch."""
    wait_until(lambda: hasattr(batcher_of(slot)._engine, "running"))


class Full:
    """A server whose queue is full until `go` is set."""

    def __init__(self, slot: Slot, go: threading.Event, port: int, *headers: str) -> None:
        self.slot, self.go = slot, go
        self._port = port
        self._clients: list[Client] = []
        self._waiting: list[Client] = []
        deadline = time.monotonic() + 30
        while len(self._waiting) < 4 or self.batcher.tokens_waiting < 6:  # the first are taken at once
            assert time.monotonic() < deadline
            self._waiting.append(self.connect())
            self._waiting[-1].send(write(BODY, *headers))
            time.sleep(0.05)

    @property
    def batcher(self) -> Batcher:
        """Of the model that answers."""
        return batcher_of(self.slot)

    def connect(self) -> Client:
        self._clients.append(Client(self._port))
        return self._clients[-1]

    def make_room(self) -> None:
        """Let what waits be answered."""
        self.go.set()
        wait_until(lambda: not self.batcher.tokens_waiting)

    def close(self) -> None:
        self.go.set()
        for client in self._clients:
            client.close()
