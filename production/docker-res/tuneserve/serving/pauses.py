"""Pauses of the event loop while more is asked than can be answered."""

import asyncio
import select
import socket
import time

from tuneserve.serving.admission import Admission

PAUSE_S = 0.05
"""Seconds after refusals in which the event loop looks at no connection. Clients that ask again at once would keep it
busy, on the processor that answers those who were accepted."""

WELCOMES = 128
"""Most connections that are accepted between two pauses; it takes the loop some 20 ms."""


class Pauses:
    """Pauses of the event loop, which let the engine have the processor: refusals cost less together.

    Nothing is urgent in a server whose queue is full, and no client gets more than one refusal in a pause.
    """

    def __init__(self, admission: Admission, listener: socket.socket) -> None:
        self._admission = admission
        self._newcomers = select.poll()
        self._newcomers.register(listener, select.POLLIN)
        self.is_due = False
        self._put_off = 0

    def ask(self, loop: asyncio.AbstractEventLoop) -> None:
        """Pause once, after what the loop has found on its connections."""
        if not self.is_due:
            self.is_due = True
            loop.call_soon(self._pause, loop)

    def _pause(self, loop: asyncio.AbstractEventLoop) -> None:
        # uvloop accepts a connection a turn. Those behind it must not wait a pause each.
        if self._put_off < WELCOMES and self._newcomers.poll(0):
            self._put_off += 1
            loop.call_soon(self._pause, loop)
            return
        time.sleep(min(PAUSE_S, self._admission.drain_s() / 2))  # a short queue must not run dry
        self.is_due = False
        self._put_off = 0
