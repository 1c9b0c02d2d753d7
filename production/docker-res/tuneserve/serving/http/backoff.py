"""A pause of the event loop while requests are being refused."""

import asyncio
import select
import socket
import time
from collections.abc import Callable

BACKOFF_S = 0.05
"""Seconds for which a full server reads no socket after refusals. Clients that ignore Retry-After and ask again at once
would otherwise take the processor from the engine, which answers those that were accepted."""

MAX_ACCEPTS = 128
"""Most connections that are accepted between two backoffs; that takes the event loop some 20 ms."""


class Backoff:
    """Puts the event loop to sleep for a moment while requests are being refused.

    A blocking sleep in an event loop is meant here: while the queue is full the engine has work for seconds, and no
    client gets more than one refusal a backoff.

    Args:
        drain_s: tells for how many seconds the queue lasts; a short one must not run dry meanwhile.
        listener: the listening socket, if it is known; connections that wait in it are accepted first.
    """

    def __init__(self, drain_s: Callable[[], float], listener: socket.socket | None = None) -> None:
        self._drain_s = drain_s
        self._connections = select.poll()
        if listener is not None:
            self._connections.register(listener, select.POLLIN)
        self._due = False
        self._accepted = 0

    def request(self) -> None:
        """Sleep once, after the events that the loop has found already."""
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._sleep)

    def _sleep(self) -> None:
        # uvloop accepts one connection a turn: those behind it must not wait a backoff each.
        if self._accepted < MAX_ACCEPTS and self._connections.poll(0):
            self._accepted += 1
            asyncio.get_running_loop().call_soon(self._sleep)
            return
        time.sleep(min(BACKOFF_S, self._drain_s() / 2))
        self._due = False
        self._accepted = 0
