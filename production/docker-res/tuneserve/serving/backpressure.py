"""Refusing before work is done: a request that finds the queue full gets its 429 before its body is read."""

import asyncio
import select
import socket
import time

from tuneserve.errors import NoModelError, OverloadedError
from tuneserve.serving.slot import Slot

BACKOFF_S = 0.05
"""Seconds for which a full server reads no socket after refusals. Clients that ignore Retry-After and ask again at once
would otherwise take the processor from the engine, which answers those that were accepted."""

MAX_ACCEPTS = 128
"""Most connections that are accepted between two backoffs; that takes the event loop some 20 ms."""


class Backpressure:
    """Whether the model that answers has room for one more request.

    Args:
        slot: whose model answers.
    """

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    def refusal(self) -> OverloadedError | None:
        """Why a request could not be answered soon; None if it may come in, or if there is no model to wait for.

        It is returned and not raised: its traceback would hold the caller's frames, and these the error, so that each
        refusal would leave a cycle for the garbage collector.
        """
        if self._slot.phase != "ready":
            return None
        try:
            return self._slot.model().batcher.refusal()
        except NoModelError:  # the engine has died since
            return None

    def drain_s(self) -> float:
        """Seconds until the queue is empty, by the engine's measured rate."""
        try:
            return self._slot.model().batcher.drain_s
        except NoModelError:
            return 0.0


class Backoff:
    """Puts the event loop to sleep for a moment while requests are being refused.

    A blocking sleep in an event loop is meant here: while the queue is full the engine has work for seconds, and no
    client gets more than one refusal a backoff.

    Args:
        backpressure: asked how long the queue lasts; a short one must not run dry meanwhile.
        listener: the listening socket, if it is known; connections that wait in it are accepted first.
    """

    def __init__(self, backpressure: Backpressure, listener: socket.socket | None = None) -> None:
        self._backpressure = backpressure
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
        time.sleep(min(BACKOFF_S, self._backpressure.drain_s() / 2))
        self._due = False
        self._accepted = 0
