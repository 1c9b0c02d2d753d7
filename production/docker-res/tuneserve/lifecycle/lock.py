"""One trainer a store: an exclusive `flock` on a file whose content names the owner.

The kernel frees the lock when its owner ends, however it ends. The file stays, for removing it would let two processes
lock two files of one name. Machines that share a store exclude each other only where the file system passes `flock` on,
as NFSv4 does; where it refuses locks (some object-store mounts), training goes on with a warning and nothing keeps two
trainers apart.
"""

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from tuneserve.errors import BusyError, StoreError

logger = logging.getLogger(__name__)

REFUSALS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What `flock` fails with on a file system that has no locks."""


class Lock:
    """A lock that is held."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor

    def require(self) -> None:
        """Make sure that others still find the locked file under its name.

        Raises:
            StoreError: it was removed or replaced, so that another process may hold a lock of that name.
        """
        with suppress(OSError):
            if os.path.samestat(self._path.stat(), os.fstat(self._descriptor)):
                return
        raise StoreError(f"{self._path} was removed or replaced while this process held its lock.")


@contextmanager
def hold(path: Path) -> Iterator[Lock]:
    """Be the only process in this block that holds the lock at `path`.

    Raises:
        BusyError: another process holds it; the message says which, and since when.
        StoreError: the file cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # close-on-exec: no program started here inherits it
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error}") from error
    try:
        _acquire(path, descriptor)
        yield Lock(path, descriptor)
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone would leave it to a forked child
        os.close(descriptor)


def _acquire(path: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BusyError(f"{_read_owner(descriptor)} ({path}).") from None
    except OSError as error:
        if error.errno not in REFUSALS:
            raise StoreError(f"{path} cannot be locked: {error}") from error
        logger.warning("%s cannot be locked (%s): make sure that only one trainer uses this store", path, error)
    since = datetime.now(UTC).isoformat(timespec="seconds")
    owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}).encode()
    try:
        os.pwrite(descriptor, owner, 0)
        os.ftruncate(descriptor, len(owner))
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error}") from error


def _read_owner(descriptor: int) -> str:
    """Who holds the lock, as the start of a sentence; the content may be anything."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {owner['pid']} on {owner['host']} has been training for this store since {owner['since']}"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return "another process is training for this store"
