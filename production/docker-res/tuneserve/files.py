"""Files of the store: atomic writes, and reads that neither hang nor surprise.

Content is written under a temporary name in the same folder, beginning with a dot, and renamed when it is complete: a
reader sees the old or the new content, never a mixture, even after a crash.
"""

import errno
import fcntl
import json
import logging
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from pydantic import TypeAdapter, ValidationError

from tuneserve.text import has_surrogates

logger = logging.getLogger(__name__)

Record = TypeVar("Record")

MAX_JSON_BYTES = 256 << 20
"""More than the metadata of a thousand labels; a file beyond it is none of ours."""
MAX_DIGITS = 18
"""Of a whole number in JSON: more do not fit where such numbers go."""


@contextmanager
def new_file(path: Path, *, durable: bool = True, overwrite: bool = True) -> Iterator[Path]:
    """A temporary path for the block to write to, which then replaces the file at `path`.

    Args:
        path: of the file.
        durable: whether it must survive a power cut, which takes two waits for the disk.
        overwrite: whether to replace an existing file; otherwise that is a FileExistsError.

    Raises:
        OSError: the disk refuses (full, read-only, gone).
    """
    temporary = _temporary(path)
    try:
        yield temporary
        if durable:
            sync(temporary)
        if overwrite:
            temporary.replace(path)
        else:
            _take_name(temporary, path)
        if durable:
            sync(path.parent)
    finally:
        with suppress(OSError):  # a disk that became read-only refuses that too
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path, *, prefix: str = ".", overwrite: bool = False, parents: bool = True) -> Iterator[Path]:
    """A temporary folder for the block to fill, which is then synced and renamed to `folder`.

    Args:
        folder: its final path.
        prefix: of the temporary name, which stays if the process is killed.
        overwrite: whether to replace an existing folder; otherwise that is an OSError.
        parents: whether folders above it are created; otherwise it is an OSError that there are none.

    Raises:
        OSError: the disk refuses, or the name is taken.
    """
    temporary = _temporary(folder, prefix)
    try:
        temporary.mkdir(parents=parents)
        yield temporary
        sync_tree(temporary)
        if overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_file(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Replace the file at `path` atomically.

    Raises:
        OSError: as `new_file`.
    """
    with new_file(path, durable=durable) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON to `path` atomically, refusing NaN (it is not JSON).

    Raises:
        OSError: as `new_file`.
        ValueError: a number is not finite.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    replace_file(path, text.encode())


def _take_name(temporary: Path, path: Path) -> None:
    try:
        path.hardlink_to(temporary)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if path.exists():  # a file system without hard links: between this look and the next line another may come
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        temporary.rename(path)


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """A regular file to read; a pipe or a device of this name, which may never end, is refused.

    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: it is no regular file, or its name is none.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no regular file")
        yield file


def read_bytes(path: Path, *, max_bytes: int) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: it is no regular file, or larger than so many bytes.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes} bytes")
    return content


def read_json(path: Path) -> Any:
    """What a JSON file of the store holds, whose numbers are finite and whose strings are Unicode.

    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: it is something else, with what is wrong.
    """
    return parse_json(read_bytes(path, max_bytes=MAX_JSON_BYTES))


def read_record(path: Path, shape: TypeAdapter[Record], *, max_bytes: int = MAX_JSON_BYTES) -> Record:
    """What a JSON file of the store holds, if it has this shape and no more bytes.

    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: it is something else, with what is wrong and where.
    """
    return as_record(parse_json(read_bytes(path, max_bytes=max_bytes)), shape)


def as_record(content: Any, shape: TypeAdapter[Record]) -> Record:
    """See `read_record`.

    Raises:
        ValueError: it is something else, with what is wrong and where.
    """
    try:
        return shape.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))[:100]
        raise ValueError(f"{where or 'the whole'}: {first['msg']}") from None


def parse_json(content: bytes) -> Any:
    """See `read_json`.

    Raises:
        ValueError: it is something else, with what is wrong.
    """
    try:
        found = json.loads(content.decode(), parse_float=_float, parse_int=_int, parse_constant=_float)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if b"\\ud" in content.lower() and has_surrogates(json.dumps(found, ensure_ascii=False)):
        raise ValueError("a string holds half a surrogate pair")
    return found


def _float(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"{digits[:20]} is no finite number")
    return number


def _int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


TEMPORARY = re.compile(r"\..*-[0-9a-f]{8}|\.[0-9a-f]{32}")
"""Names of content that is being written, or was when its process was killed."""


def remove_leftovers(*folders: Path, older_than_s: float = 0) -> None:
    """Remove what killed processes left half written in these folders; of any age only where nobody else writes now."""
    for path in [path for folder in folders if folder.is_dir() for path in folder.iterdir()]:
        if TEMPORARY.fullmatch(path.name) and (not older_than_s or _age_s(path) >= older_than_s):
            logger.info("removing %s, which a process that was killed left half written", path)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink(missing_ok=True)


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.lstat().st_mtime
    except OSError:  # it is gone
        return -1.0


CACHE_PARTS = ("arrow", "downloads", "features", "launch", "tokens")
"""Folders of DATA_PATH that trainings write to; beside them `hub/` is the hub's library's, `served/` has models."""
CACHED = re.compile(r"[0-9a-f]{16,32}(?:\.arrow)?")
"""Names of what is cached there under the hash of what it was made from."""
MOST_CACHED = 24
"""Entries of a part that stay: a training uses five at most of each."""


@contextmanager
def in_use(folder: Path, *parts: str, most: int = MOST_CACHED) -> Iterator[None]:
    """Use a cache during the block; whoever is its only user first removes what need not stay.

    That is what killed ones left half written, and all but the entries used last. Without locks nothing is removed.

    Args:
        folder: of the cache, which several processes may share.
        parts: folders in it that are written to.
        most: entries of each that stay.
    """
    with ExitStack() as held:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY)
            held.callback(os.close, descriptor)
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_leftovers(*(folder / part for part in parts))
                for part in parts:
                    _remove_unused(folder / part, most)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield


def mark_used(path: Path) -> None:
    """Let an entry of a cache be the one that was used last."""
    with suppress(OSError):
        os.utime(path)


def _remove_unused(folder: Path, most: int) -> None:
    found = [path for path in folder.iterdir() if CACHED.fullmatch(path.name)] if folder.is_dir() else []
    for path in sorted(found, key=_age_s)[most:]:
        logger.info("removing %s from the cache: %d others have been used since", path, most)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def require_writable(folder: Path) -> None:
    """Write to a file without a name, which leaves nothing; where there are none, ask for the rights.

    Raises:
        OSError: this process cannot write there.
    """
    try:
        descriptor = os.open(folder, getattr(os, "O_TMPFILE", os.O_DIRECTORY) | os.O_WRONLY, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS):
            raise
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None
        return
    try:
        os.write(descriptor, b"\0")
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Force a folder's files, and the folders themselves, to disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Force one file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path, prefix: str = ".") -> Path:
    return path.with_name(f"{prefix}{path.name}-{uuid4().hex[:8]}")
