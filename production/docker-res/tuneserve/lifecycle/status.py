"""Which process trains for a store, and how far it is: an exclusive `flock`, and a small status file for others.

The lock's file names its owner. The kernel frees the lock when its owner ends, however it ends. The file stays, for
removing it would let two processes lock two files of one name. Machines that share a store exclude each other only
where the file system passes `flock` on, as NFSv4 does; where it refuses locks (some object-store mounts), training goes
on with a warning and nothing keeps two trainers apart.
"""

import errno
import fcntl
import json
import logging
import math
import os
import socket
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from tuneserve.errors import BusyError, StoreError, TuneserveError
from tuneserve.files import as_record, parse_json, read_record, replace_file
from tuneserve.lifecycle.decision import Decision

logger = logging.getLogger(__name__)

REFUSALS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What `flock` fails with on a file system that has no locks."""

MAX_BYTES = 64 << 10
"""Of the status file: servers read it on their event loop."""

ASKED_S, ASK_AGAIN_S = 5.0, 0.01
"""Seconds for which those are waited for who only ask whether the lock is held, and between two tries."""

EVERY_S = 1.0
"""Seconds between two writings."""

MOST_POINTS = 200
"""Of a curve; of a longer one every second point is left out, again and again."""

MOST_FINDINGS = 20
FINDING_CHARACTERS = 400

Phase = Literal["preparing", "training", "testing", "judging", "finished", "failed"]


class Lock:
    """A lock that is held; not `exclusive` where the file system has none."""

    def __init__(self, path: Path, descriptor: int, *, exclusive: bool = True) -> None:
        self._path, self._descriptor, self.exclusive = path, descriptor, exclusive

    def require(self) -> None:
        """Make sure that the locked file still has its name.

        Raises:
            StoreError: it was removed or replaced, so that another process may hold a lock of that name.
        """
        with suppress(OSError):
            if os.path.samestat(self._path.stat(), os.fstat(self._descriptor)):
                return
        raise StoreError(f"{self._path} was removed or replaced while this process held its lock.")


@contextmanager
def hold(path: Path) -> Iterator[Lock]:
    """Hold the lock at `path` during the block.

    Raises:
        BusyError: another process holds it; the message says which, and since when.
        StoreError: the file cannot be written.
    """
    try:
        # Close-on-exec: no program started here inherits it. A link would lock what it leads to, a pipe has no content.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        why = "it is a link; remove it" if error.errno == errno.ELOOP else error
        raise StoreError(f"{path} cannot be written: {why}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StoreError(f"{path} cannot be written: it is no regular file; remove it")
    try:
        yield Lock(path, descriptor, exclusive=_acquire(path, descriptor))
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone would leave it to a forked child
        os.close(descriptor)


def holder(path: Path) -> str | None:
    """Who holds the lock at `path`, as the start of a sentence; None if nobody does. Nothing is written.

    The kernel tells only by a lock that is taken: a shared one, for the moment in which it is asked. `/proc/locks` does
    not know those of other containers and machines. A training that starts in this moment waits for its end.

    Raises:
        StoreError: the file cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_owner(descriptor)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise StoreError(f"{path} cannot be locked: {error}") from error
    finally:
        os.close(descriptor)
    return None


def _lock(descriptor: int) -> None:
    """Take the lock. Who only asks for it (see `holder`) shares it for a moment, and is waited for.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the file system has no locks.
    """
    until = time.monotonic() + ASKED_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # which is refused if somebody trains
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            if time.monotonic() >= until:
                raise
        time.sleep(ASK_AGAIN_S)


def _acquire(path: Path, descriptor: int) -> bool:
    exclusive = True
    try:
        _lock(descriptor)
    except BlockingIOError:
        raise BusyError(f"{_read_owner(descriptor)} ({path}).") from None
    except OSError as error:
        if error.errno not in REFUSALS:
            raise StoreError(f"{path} cannot be locked: {error}") from error
        exclusive = False
        logger.warning("%s cannot be locked (%s): make sure that only one trainer uses this store", path, error)
    since = datetime.now(UTC).isoformat(timespec="seconds")
    owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}).encode()
    try:
        os.pwrite(descriptor, owner, 0)
        os.ftruncate(descriptor, len(owner))
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error}") from error
    return exclusive


class Owner(TypedDict):
    """What the lock's file says of who holds it."""

    host: str
    pid: int
    since: str


OWNER = TypeAdapter(Owner)


def _read_owner(descriptor: int) -> str:
    """The owner of the lock, as the start of a sentence; the content may be damaged."""
    try:
        owner = as_record(parse_json(os.pread(descriptor, 4096, 0)), OWNER)
        return f"process {owner['pid']} on {owner['host']} has been training for this store since {owner['since']}"
    except (OSError, ValueError):
        return "another process is training for this store"


class Status:
    """The status file, written by the process that trains, as a context; a failure to write never stops a training.

    Args:
        path: of the file; with None nothing is written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._content: dict[str, Any] = {"phase": "preparing", "pid": os.getpid()}
        self._course: dict[str, Any] = {}
        self._steps, self._epochs = 1, 1
        self._first: int | None = None
        self._began = 0.0
        self._written = 0.0

    def phase(self, name: Phase) -> None:
        """Begin another phase of the job."""
        self._content = {"phase": name, "pid": os.getpid()}
        self._write()

    def found(self, sentences: Sequence[str]) -> None:
        """Report what was found in the data."""
        self._course["findings"] = [one[:FINDING_CHARACTERS] for one in sentences[:MOST_FINDINGS]]
        self._write()

    def training(self, *, steps: int, epochs: int) -> None:
        """Begin the optimizer's steps; `steps` counts those of all epochs."""
        self._steps, self._epochs, self._began = steps, epochs, time.monotonic()
        self._course |= {"steps": steps, "losses": [], "validation_losses": []}
        self.phase("training")

    @property
    def losses(self) -> list[tuple[int, float]]:
        """The loss of some of the steps since the process started, by their numbers."""
        return list(self._course.get("losses", []))

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """Report that `step` steps are done, with figures of the last one, or of the epoch that has just ended."""
        now = time.monotonic()
        if "validation_loss" in figures:
            self._point("validation_losses", step, figures["validation_loss"])  # it is written with the next step
        if self._first is None:
            self._first = step - 1  # not 0 if it goes on from a checkpoint
        if now - self._written < EVERY_S or "loss" not in figures:
            return
        pace_s = (now - self._began) / (step - self._first)
        self._content |= {
            "epoch": min(self._epochs, 1 + (step - 1) * self._epochs // self._steps),
            "epochs": self._epochs,
            "progress": round(min(1.0, step / self._steps), 4),
            "loss": round(figures["loss"], 4),
            "eta_s": round(max(0, self._steps - step) * pace_s, 1),
        }
        self._point("losses", step, figures["loss"])
        self._write()

    def decided(self, decision: Decision, *, before: Decision | None) -> None:
        """Report the decision about the version; `before` is the one it had already, if any."""
        said = decision.sentence if decision != before else "nothing to train: it has these settings and data"
        self._content = {"phase": "finished", "version": decision.version, "decision": said}
        self._write()

    def __enter__(self) -> "Status":
        self.phase("preparing")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            said = str(error) if isinstance(error, TuneserveError) else type(error).__name__
            self._content = {"phase": "failed", "reason": said}
            self._write()

    def _point(self, curve: str, step: int, value: float) -> None:
        if not math.isfinite(value):  # JSON has no such figure, and a curve no place for it
            return
        points: list[tuple[int, float]] = self._course.get(curve, [])
        if len(points) >= MOST_POINTS:
            points = points[::2]
        self._course[curve] = [*points, (step, round(value, 4))]

    def _write(self) -> None:
        if self._path is None:
            return
        self._written = time.monotonic()
        with suppress(OSError):  # not durable: of no use after a power cut
            content = json.dumps({**self._content, "course": self._course}, ensure_ascii=False)
            replace_file(self._path, content.encode(errors="replace"), durable=False)


class Course(TypedDict, total=False):
    """How a training has gone so far: losses by step, of `steps` in all, and what was found in its data."""

    steps: int
    losses: list[tuple[int, float]]
    validation_losses: list[tuple[int, float]]
    findings: list[str]


class Content(TypedDict, total=False):
    """What the status file holds."""

    phase: Phase
    pid: int
    epoch: int
    epochs: int
    progress: float
    loss: float
    eta_s: float
    version: str
    decision: str
    reason: str
    course: Course


SHAPE = TypeAdapter(Content)


def read_status(path: Path) -> dict[str, Any]:
    """The status of the newest training; empty if it cannot be read."""
    try:
        content = read_record(path, SHAPE, max_bytes=MAX_BYTES)
        return {**content}
    except (OSError, ValueError):
        return {}
