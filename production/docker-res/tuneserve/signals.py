"""SIGTERM and SIGINT: at once where nothing can be lost, at the next safe point where something can."""

import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Stop:
    """Remembers that the process was asked to end, and ends it with 128 + the signal's number (143, 130).

    Outside `deferred()` the signal raises SystemExit where it arrives. Inside, work continues until it checks
    `requested`, saves its state and calls `exit()`; a second signal ends the process at once.

    A child is different: one Ctrl+C may reach it twice, from the terminal and from its parent, and its parent's end
    sends one more. It takes the first signal and ignores the rest; a parent that cannot wait kills it.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.once = False
        """Whether this is such a child."""
        self._deferring = False

    def listen(self) -> None:
        """Install the handlers; only possible in the main thread."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._receive)
            signal.signal(signal.SIGINT, self._receive)

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.signal is not None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """During the block, the first signal is only remembered."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self.requested:
            self.exit()

    def exit(self) -> None:
        """End the process with the signal's exit code."""
        raise SystemExit(128 + (self.signal or 0))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested and self.once:
            return
        again, self.signal = self.requested, number
        if again or not self._deferring:
            self.exit()


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent dies, even by kill -9, so that a checkpoint is written."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == 1 and os.getpid() != 1 and _parent_died():
        raise SystemExit(128 + signal.SIGTERM)


def _parent_died() -> bool:
    """Whether the parent died before the request; in a container, process 1 may also be the server itself."""
    with open("/proc/1/cmdline", "rb") as file:  # noqa: PTH123
        return b"run.py" not in file.read()
