"""The process of a handler: started, spoken to, ended with all its children, and what it prints put into the log."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from tuneserve.redaction import without_secrets
from tuneserve.tasks.handler_worker import FRAME

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

WORKER = Path(__file__).with_name("handler_worker.py")
NO_PIP = Path(__file__).with_name("no_pip")
"""A folder with a `pip` that installs nothing: code that calls it goes on with what is installed."""
MAX_HEAD = 64 << 10
"""Bytes of an answer's JSON."""
LOOK_S = 0.2
"""Seconds between looks at a process that computes: whether it lives, and may go on."""
MAX_LINES, PER_S = 1000, 60.0
"""Lines of one process that are logged in so many seconds; the rest is counted."""


class Process:
    """A worker: its process group, the socket to it, and the thread that logs what it prints."""

    def __init__(
        self,
        config: Mapping[str, Any],
        environ: Mapping[str, str],
        *,
        clock: Callable[[], float],
        aborted: threading.Event,
    ) -> None:
        self._name, self._clock, self._aborted = config["name"], clock, aborted
        self._socket, theirs = socket.socketpair()
        try:
            asked = {**config, "descriptor": theirs.fileno(), "parent": os.getpid()}
            self._child = subprocess.Popen(
                [sys.executable, "-PBu", "-X", "faulthandler", WORKER, json.dumps(asked)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                env=environ,
                cwd=config["folder"],
                start_new_session=True,
            )
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()
        self.pid = self._child.pid
        self._socket.settimeout(LOOK_S)
        self._log = threading.Thread(target=self._log_lines, args=[self._child.stdout], daemon=True)
        self._log.start()

    def has_ended(self) -> bool:
        """Whether the process has ended; its number stays taken until `stop`."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def send(self, head: Mapping[str, Any], body: bytes, until: float) -> None:
        """Write a frame.

        Raises:
            EOFError: the process has ended, or is to end.
            TimeoutError: it does not read until then, by the clock.
        """
        raw = json.dumps(head).encode()
        for part in (FRAME.pack(len(raw), len(body)) + raw, body):
            view = memoryview(part)
            while view:
                view = view[self._patiently(partial(self._socket.send, view), until) :]

    def receive(self, until: float, max_bytes: int) -> tuple[dict[str, Any], bytes]:
        """Read a frame.

        Raises:
            EOFError, TimeoutError: as `send`.
            ValueError: it is none of the worker's: the code has written to its socket.
        """
        head_bytes, body_bytes = FRAME.unpack(self._read(FRAME.size, until))
        if head_bytes > MAX_HEAD or body_bytes > max_bytes:
            raise ValueError("a frame beyond the bounds")
        head = json.loads(self._read(head_bytes, until))
        if not isinstance(head, dict):
            raise ValueError("a frame without an object")
        return head, self._read(body_bytes, until)

    def _read(self, count: int, until: float) -> bytes:
        found = bytearray()
        while left := min(count - len(found), 1 << 20):
            chunk = self._patiently(partial(self._socket.recv, left), until)
            if not chunk:
                raise EOFError
            found += chunk
        return bytes(found)

    def _patiently(self, attempt: Callable[[], Result], until: float) -> Result:
        while True:
            try:
                return attempt()
            except TimeoutError:
                if self._aborted.is_set() or self.has_ended():
                    raise EOFError from None
                if self._clock() >= until:
                    raise
            except OSError:  # the other end is closed
                raise EOFError from None

    def stop(self) -> str:
        """End the process and its children, wait until they are gone, and say how it ended."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # before it is reaped: the number is still its own
        code = self._child.wait()
        self._socket.close()
        end = time.monotonic() + 10
        with suppress(ProcessLookupError):
            while time.monotonic() < end:
                with suppress(ChildProcessError):  # orphans come to us if we are process 1
                    os.waitpid(-self.pid, os.WNOHANG)
                os.killpg(self.pid, 0)
                time.sleep(0.005)
        self._log.join(1)
        return (
            f"Its process ended by {signal.Signals(-code).name}"
            if code < 0
            else f"Its process ended with exit code {code}"
        )

    def _log_lines(self, output: IO[bytes]) -> None:
        """Log what the process prints, within bounds."""
        began, count = self._clock(), 0
        with output:
            while line := output.readline(1000):
                if self._clock() - began >= PER_S:
                    if count > MAX_LINES:
                        logger.warning("model %s: %d more lines were not logged", self._name, count - MAX_LINES)
                    began, count = self._clock(), 0
                count += 1
                if count <= MAX_LINES and (words := line.decode(errors="replace").rstrip()):
                    said = "".join(one if one.isprintable() or one == "\t" else "�" for one in words)
                    logger.info("model %s: %s", self._name, said)
                elif count == MAX_LINES + 1:
                    logger.warning("model %s prints more than %d lines in %g s", self._name, MAX_LINES, PER_S)


def environment_of(environ: Mapping[str, str], threads: int) -> dict[str, str]:
    """The worker's variables: the server's without its secrets, and a `pip` that installs nothing."""
    found = {"PATH": os.defpath, **without_secrets(environ), "OMP_NUM_THREADS": str(threads)}
    return found | {name: ":".join(filter(None, [str(NO_PIP), found.get(name)])) for name in ("PATH", "PYTHONPATH")}


def resident_bytes(pid: int) -> int:
    """Memory of a process and all below it; 0 when it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
        children = Path(f"/proc/{pid}/task").glob("*/children")
        below = [int(one) for path in children for one in path.read_text(encoding="ascii").split()]
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident_bytes(one) for one in below)
