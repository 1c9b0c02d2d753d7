"""Where files are: a path or an fsspec URL, and errors of its file system in our own words."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from tuneserve.errors import TuneserveError
from tuneserve.files import replace_file
from tuneserve.logs import in_one_line
from tuneserve.redaction import redact_url


@dataclass(frozen=True)
class Location:
    """A file or folder of a file system; equal locations are the same file."""

    files: fsspec.AbstractFileSystem
    path: str

    @property
    def name(self) -> str:
        """The last part of the path, without a URL's query."""
        return PurePosixPath(self.path if self.is_local else self.path.partition("?")[0]).name

    @property
    def parent(self) -> "Location":
        """The folder it is in."""
        return Location(self.files, str(PurePosixPath(self.path).parent))

    @property
    def real(self) -> "Location":
        """The location with `..` and links resolved, for comparison."""
        return Location(self.files, os.path.realpath(self.path)) if self.is_local else self

    @property
    def is_local(self) -> bool:
        """Whether it is on a disk of this machine."""
        return isinstance(self.files, LocalFileSystem)

    def __truediv__(self, name: str) -> "Location":
        return Location(self.files, f"{self.path.rstrip('/')}/{name}")

    def open(self) -> BinaryIO:
        """Open the file for reading."""
        return cast(BinaryIO, self.files.open(self.path, "rb"))

    def put(self, content: bytes) -> None:
        """Replace the file's content atomically."""
        if self.is_local:
            replace_file(Path(self.path), content)
        else:
            self.files.pipe_file(self.path, content)

    def names(self) -> list[str]:
        """The names in the folder, sorted; empty if there is no such folder."""
        try:
            listed: list[Any] = self.files.ls(self.path, detail=False, refresh=True)
        except FileNotFoundError:
            return []
        return sorted(PurePosixPath(path).name for path in listed)


def locate(location: str) -> Location:
    """The location that a path or URL names; it need not exist.

    Raises:
        ValueError, ImportError: there is no such kind of URL, or its library is not installed.
    """
    url = location if "://" in location else str(Path(location).expanduser().absolute())
    files, path = fsspec.core.url_to_fs(url)
    return Location(files, path.rstrip("/") or "/")


def shown(location: str) -> str:
    """A path or URL for messages, without its secrets."""
    return redact_url(location) if "://" in location else location


@contextmanager
def refused_as(kind: type[TuneserveError], words: str) -> Iterator[None]:
    """Turn any error of a file system (each library raises its own) into one of ours that begins with `words`."""
    try:
        yield
    except TuneserveError:
        raise
    except Exception as error:
        raise kind(f"{words}: {in_one_line(error)}") from error
