"""A client that costs little: HTTP/1.1 on connections that are kept, no library between, answers by callback."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

LOST = 0
"""The status of a request whose connection ended before it was answered."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, head in lower case and body."""

    status: int
    head: bytes = b""
    body: bytes = b""

    def header(self, name: str) -> str | None:
        """A header's value, the name in lower case."""
        _, found, behind = self.head.partition(f"\r\n{name}:".encode())
        return behind.partition(b"\r\n")[0].strip().decode() if found else None


class Connection(asyncio.Protocol):
    """One connection with one request under way at most; `ended` is called when it is gone."""

    def __init__(self, ended: Callable[["Connection"], None] = lambda connection: None) -> None:
        self._ended = ended
        self._received = bytearray()
        self._head = b""
        self._missing = 0
        self._done: Callable[[Answer], None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # noqa: D102
        self.transport = transport

    def ask(self, request: bytes, done: Callable[[Answer], None]) -> None:
        """Send a request; its answer goes to `done`."""
        self.expect(done)
        self.transport.write(request)

    def expect(self, done: Callable[[Answer], None]) -> None:
        """Let the next answer go to `done`; it may come before the whole request is sent."""
        self._done = done

    def data_received(self, data: bytes) -> None:  # noqa: D102
        self._received += data
        if not self._head:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            self._head = bytes(self._received[:end]).lower() + b"\r\n"
            del self._received[: end + 4]
            self._missing = int(Answer(0, self._head).header("content-length") or 0)
        if len(self._received) < self._missing:
            return
        answer = Answer(int(self._head[9:12]), self._head, bytes(self._received))
        self._received.clear()
        self._head = b""
        self._finish(answer)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: D102
        self._ended(self)
        self._finish(Answer(LOST))

    def _finish(self, answer: Answer) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(answer)


def write_request(path: str, body: bytes, *headers: str, method: str = "POST") -> bytes:
    """A request as it goes over the wire."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body
