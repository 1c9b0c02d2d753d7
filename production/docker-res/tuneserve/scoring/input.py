"""The rows to be scored: a file or the files of a folder, cut into numbered chunks.

A folder of texts, one a file, is scored like a CSV file with the columns `file` and `text`.
"""

import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

from tuneserve.errors import DataError
from tuneserve.scoring.locations import Location, locate, refused_as, shown
from tuneserve.tables import Answer, Chunk
from tuneserve.tables.formats import DESCRIPTIONS, file_type, is_data, is_hidden, is_text, known_endings
from tuneserve.tables.rows import Columns, enumerate_some, require_columns, shorten
from tuneserve.tables.streams import read_text

logger = logging.getLogger(__name__)

TEXT_COLUMNS = [("file", "text"), ("text", "text")]
"""Of the table that a folder of texts is scored as."""

STAMPS = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "updated", "created")
"""File systems' names of a stamp that changes with a file's content; the first one found counts."""


@dataclass(frozen=True, slots=True)
class InputChunk:
    """A chunk by its number in the whole input; its rows are None if they were not wanted."""

    number: int
    rows: Chunk | None
    share_read: float


class Input:
    """The file or folder that INPUT names.

    Raises:
        DataError: it cannot be reached or read, or the column of the text cannot be determined.
    """

    def __init__(self, location: str, *, text_column: str = "", label_column: str = "") -> None:
        self.where = f"INPUT={shown(location)}"
        with self._reading():
            self.location = locate(location)
            self.is_folder = self.location.files.info(self.location.path)["type"] == "directory"
            self.files = self._find_files() if self.is_folder else [self.location]
            self._are_texts = self.is_folder and not is_data(self.files[0].name)
            infos = [file.files.info(file.path) for file in self.files]
            self._sizes = [int(info.get("size") or 0) for info in infos]
            self.identity = [
                [self._inner(file), size, next((str(info[stamp]) for stamp in STAMPS if info.get(stamp)), "")]
                for file, size, info in zip(self.files, self._sizes, infos, strict=True)
            ]
            self.type = file_type("texts.csv" if self._are_texts else self.files[0].name, self.where)
            self._types = TEXT_COLUMNS if self._are_texts else self._read_columns()
        self.columns = [name for name, _ in self._types]
        self.text_column = ""
        if self.columns:
            wanted = Columns(text_column, label_column)
            self.text_column = require_columns(self._types, wanted, self._name(self.files[0]), labelled=False).text
            others = [shorten(name) for name in self.columns if name != self.text_column]
            more = f" ({len(self.files)} files)" if self.is_folder else ""
            kept = f"; other columns are kept: {enumerate_some(others, 6)}" if others else ""
            logger.info("%s%s: text from column %r%s", self.where, more, self.text_column, kept)

    def chunks(self, *, chunk_rows: int, wanted: Callable[[int], bool]) -> Iterator[InputChunk]:
        """All chunks in order. None holds rows of two files.

        Raises:
            DataError: naming the file and row that cannot be read.
        """
        if self._are_texts:
            yield from self._text_chunks(chunk_rows, wanted)
            return
        number, before, total = 0, 0, sum(self._sizes) or 1
        for file, n_bytes in zip(self.files, self._sizes, strict=True):
            name = self._name(file)
            with self._reading(), file.open() as raw, self.type.reading(raw, name) as stream:
                for chunk in self.type.format.read_chunks(
                    stream, name, chunk_rows=chunk_rows, wanted=partial(_wants, wanted, number)
                ):
                    here = raw.tell() if chunk.share_read is None else chunk.share_read * n_bytes
                    share = min(1.0, (before + here) / total)
                    yield InputChunk(number, None if chunk.rows is None else chunk, share)
                    number += 1
            before += n_bytes

    def _text_chunks(self, chunk_rows: int, wanted: Callable[[int], bool]) -> Iterator[InputChunk]:
        for number, begin in enumerate(range(0, len(self.files), chunk_rows)):
            files, chunk = self.files[begin : begin + chunk_rows], None
            if wanted(number):
                rows = [[self._inner(file), self._read_text(file)] for file in files]
                chunk = Chunk(rows, range(begin + 1, begin + len(rows) + 1), self.where)
            yield InputChunk(number, chunk, (begin + len(files)) / len(self.files))

    def _read_text(self, file: Location) -> str:
        with self._reading(), file.open() as raw:
            return read_text(raw, self._name(file))

    def texts(self, chunk: Chunk) -> list[Any]:
        """The values of a chunk's text column, of any type."""
        return self.type.format.values(chunk, self.columns, self.text_column) if self.columns else []

    def write(self, chunk: Chunk, answers: Sequence[Answer]) -> bytes:
        """A file like those of the input, with these rows and their answers."""
        content = io.BytesIO()
        with self.type.writing(content) as file:
            file.write(self.type.format.write(chunk, self.columns, answers))
        return content.getvalue()

    def join(self, parts: Iterable[BinaryIO], file: BinaryIO) -> None:
        """Write the rows of such files as one file."""
        with self.type.writing(file) as whole:
            self.type.format.join(map(self._content, parts), self.columns, whole)

    def _content(self, part: BinaryIO) -> bytes:
        with part, self.type.reading(part, self.where) as file:
            return file.read()

    def _find_files(self) -> list[Location]:
        """The folder's files of data; if it has none, those of the folders in it, or their texts."""
        names = [name for name in self.location.names() if not is_hidden(name)]
        chosen = [name for name in names if is_data(name)]
        if not chosen and self.location.is_local:
            names = self._inner_names()
            chosen = [name for name in names if is_data(name)] or [
                name for name in names if "/" in name and is_text(name.rpartition("/")[2])
            ]
        if left_out := [name for name in names if name not in {*chosen, *DESCRIPTIONS}]:
            logger.info("%s: left out: %s", self.where, enumerate_some(left_out, 8))
        endings = {file_type(name, self.where).ending for name in chosen if is_data(name)}
        if not chosen or len(endings) > 1:
            found = (
                f"files of several kinds ({', '.join(sorted(endings))}); keep one"
                if endings
                else f"no {known_endings()} file"
            )
            raise DataError(f"{self.where} is a folder with {found}.")
        return [self.location / name for name in chosen]

    def _inner_names(self) -> list[str]:
        """The files in the folder's folders, by their paths in it."""
        found = self.location.files.find(self.location.path)
        inner = [path.removeprefix(self.location.path).strip("/").split("/") for path in found]
        return sorted(
            "/".join(path) for path in inner if path[-1] not in DESCRIPTIONS and not any(map(is_hidden, path))
        )

    def _inner(self, file: Location) -> str:
        """A file's path in the folder, or its name."""
        return file.path.removeprefix(self.location.path).strip("/") if self.is_folder and file.is_local else file.name

    def _read_columns(self) -> list[tuple[str, str]]:
        """The columns of the first file that has any; tables must all have the same, records need not."""
        columns: list[tuple[str, str]] = []
        for file in self.files:
            if columns and columns[0][1] == "JSON":
                break
            with file.open() as raw, self.type.reading(raw, self._name(file)) as stream:
                found = self.type.format.read_columns(stream, self._name(file))
            if columns and found != columns:
                raise DataError(
                    f"{self._name(file)} has the columns {_list(found)}; {self._name(self.files[0])} has "
                    f"{_list(columns)}. All files must have the same; or name one in INPUT."
                )
            columns = found
        return columns

    def _name(self, file: Location) -> str:
        return f"{self.where}, {self._inner(file)}" if self.is_folder else self.where

    def _reading(self) -> Any:
        return refused_as(DataError, f"{self.where} cannot be read")


def _wants(wanted: Callable[[int], bool], first: int, index: int) -> bool:
    return wanted(first + index)


def _list(columns: list[tuple[str, str]]) -> str:
    return enumerate_some(f"{shorten(name)} ({kind})" for name, kind in columns)
