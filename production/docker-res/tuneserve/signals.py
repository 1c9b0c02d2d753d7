"""SIGTERM and SIGINT: at once where nothing can be lost, at the next safe point where something can."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Remembers that the process was asked to end, and ends it with 128 + the signal's number (143, 130).

    Outside `deferred()` the signal raises SystemExit where it arrives. Inside, work goes on until it asks
    `requested`, saves what it has, and calls `exit()`; a second signal does not wait.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._deferring = False

    def listen(self) -> None:
        """Take over both signals; only the main thread may."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._receive)
            signal.signal(signal.SIGINT, self._receive)

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While the block runs, the first signal is only remembered."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self.requested:
            self.exit()

    def exit(self) -> None:
        """End the process with the code that names the signal."""
        raise SystemExit(128 + (self.signal or 0))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again, self.signal = self.requested, number
        if again or not self._deferring:
            self.exit()
