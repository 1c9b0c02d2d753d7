"""One trainer a store: a file that names its owner and is touched for as long as the owner lives.

Whether an owner still lives is asked of the kernel on the same machine, so that what a killed process left is taken
over at once. Of another machine's owner only the file's time can be seen: it must change while one looks. Clocks of two
machines are never compared, for they differ and jump.
"""

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from tuneserve.errors import BusyError, StoreError

BEAT_S = 3.0
"""Seconds between two touches."""
PATIENCE_S = 15.0
"""Seconds without a touch after which an owner elsewhere is taken for dead."""
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)


class Lock:
    """A lock that is held."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor
        self._inode = os.fstat(descriptor).st_ino
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def keep(self) -> None:
        """Begin to touch it."""
        self._thread.start()

    def require(self) -> None:
        """Make sure that it is still ours.

        Raises:
            StoreError: it was taken over while this process slept.
        """
        if not self._is_ours():
            raise StoreError(f"{self._path} was taken over by another process while this one did not move.")

    def release(self) -> None:
        """Give it up."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._is_ours():
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _is_ours(self) -> bool:
        try:
            return self._path.stat().st_ino == self._inode
        except OSError:
            return False

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                os.utime(self._descriptor)  # of the file that was opened: one that was taken over is not revived
            except OSError:
                return


@contextmanager
def hold(path: Path, *, patience_s: float = PATIENCE_S) -> Iterator[Lock]:
    """Be the only one in this block who holds the lock at `path`.

    Raises:
        BusyError: another process holds it; the message says which, and since when.
        StoreError: the file cannot be written.
    """
    try:
        lock = _acquire(path, patience_s)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error}") from error
    lock.keep()
    try:
        yield lock
    finally:
        lock.release()


def _acquire(path: Path, patience_s: float) -> Lock:
    while True:
        lock = _create(path)
        if lock is not None:
            return lock
        seen = _look(path)
        if seen is None:
            continue  # it was given up in this moment
        if _lives(seen, path, patience_s):
            owner = seen.owner
            who = f"process {owner.get('pid')} on {owner.get('host')}" if owner else "another process"
            raise BusyError(f"{who} has been training for this store since {owner.get('since', 'some time')} ({path}).")
        _set_aside(path, seen)


def _create(path: Path) -> Lock | None:
    """The lock, if nobody has it: the file comes into being whole, and only where there is none."""
    temporary = path.with_name(f".{path.name}-{uuid4().hex}")
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, json.dumps(_myself()).encode())
        os.fsync(descriptor)
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))  # an object store's mount, say
            temporary.replace(path)
    except FileExistsError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return Lock(path, descriptor)


@dataclass(frozen=True)
class _Seen:
    """The file as it was at one look: its owner (empty if the content says nothing), its number, its last touch."""

    owner: dict[str, Any]
    inode: int
    touched_ns: int


def _look(path: Path) -> _Seen | None:
    try:
        with path.open("rb") as file:  # opened each time: network file systems only then ask their server
            status, content = os.fstat(file.fileno()), file.read()
    except FileNotFoundError:
        return None
    try:
        owner = json.loads(content)
    except ValueError:
        owner = {}
    return _Seen(owner if isinstance(owner, dict) else {}, status.st_ino, status.st_mtime_ns)


def _lives(seen: _Seen, path: Path, patience_s: float) -> bool:
    """Whether the owner lives; not, too, if the file changes hands meanwhile, which the caller then finds."""
    me = _myself()
    if all(seen.owner.get(place) == me[place] for place in ("host", "boot", "pids")):
        return _started(seen.owner.get("pid")) == seen.owner.get("started")
    ends = time.monotonic() + patience_s
    while time.monotonic() < ends:
        time.sleep(min(0.2, patience_s))
        now = _look(path)
        if now is None or now.inode != seen.inode:
            return False
        if now.touched_ns != seen.touched_ns:
            return True
    return False


def _set_aside(path: Path, dead: _Seen) -> None:
    """Take a dead owner's file away; should it be a living one's by now, leave it, or put it back."""
    if not _is_same(_look(path), dead):
        return
    aside = path.with_name(f".{path.name}-{uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return  # somebody else was faster
    if not _is_same(_look(aside), dead):
        with suppress(OSError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)


def _is_same(now: _Seen | None, seen: _Seen) -> bool:
    """Whether it is the same owner's file: its number alone may be that of a new one, for numbers are used again."""
    return now is not None and (now.inode, now.owner) == (seen.inode, seen.owner)


def _myself() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
        "pids": str(Path("/proc/self/ns/pid").readlink()),  # containers of one machine may share all else
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _started(pid: object) -> int | None:
    """When a process of this machine was started, in the kernel's ticks: a number that is used again tells itself."""
    try:
        content = Path(f"/proc/{int(str(pid))}/stat").read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return None
    fields = content.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])
