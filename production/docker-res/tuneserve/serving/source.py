"""The rows to be scored: a file or the files of a folder, cut into numbered chunks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from tuneserve.columns import find_columns
from tuneserve.errors import DataError
from tuneserve.serving.format import Format
from tuneserve.serving.places import Place, locate, refused_as, shown
from tuneserve.serving.tables import FORMATS

STAMPS = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "updated", "created")
"""What file systems call that which changes with a file's content; the first one found counts."""

NO_TEXTS = ("binary", "large_binary", "fixed_size_binary", "list", "large_list", "fixed_size_list", "struct", "map")
"""How the names of Parquet's types begin that cannot be read as a text."""


@dataclass(frozen=True, slots=True)
class SourceChunk:
    """A chunk by its number in the whole input; its rows are None where they were not wanted."""

    number: int
    rows: Any
    share_read: float


class Source:
    """What INPUT names.

    Raises:
        DataError: it cannot be reached or read, or does not say which column holds the text.
    """

    def __init__(self, place: str, *, text_column: str = "", label_column: str = "") -> None:
        self.where = f"INPUT={shown(place)}"
        with self._reading():
            self.place = locate(place)
            self.files, self.is_folder = self._find_files()
            infos = [file.files.info(file.path) for file in self.files]
            self._sizes = [int(info.get("size") or 0) for info in infos]
            self.identity = [
                [file.name, size, next((str(info[stamp]) for stamp in STAMPS if info.get(stamp)), "")]
                for file, size, info in zip(self.files, self._sizes, infos, strict=True)
            ]
            self.ending = self.files[0].ending
            self.format: Format = FORMATS[self.ending]
            self._types = self._read_columns()
        self.columns = list(self._types)
        self.text_column = self._find_text(text_column, label_column) if self.columns else ""

    def chunks(self, *, chunk_rows: int, wanted: Callable[[int], bool]) -> Iterator[SourceChunk]:
        """All chunks in order. One never holds rows of two files.

        Raises:
            DataError: naming the file and row that cannot be read.
        """
        number, before, total = 0, 0, sum(self._sizes) or 1
        for file, n_bytes in zip(self.files, self._sizes, strict=True):
            with self._reading(), file.open() as stream:
                for chunk in self.format.read_chunks(
                    stream,
                    self._name(file),
                    chunk_rows=chunk_rows,
                    n_bytes=n_bytes,
                    wanted=partial(_wants, wanted, number),
                ):
                    yield SourceChunk(number, chunk.rows, (before + chunk.share_read * n_bytes) / total)
                    number += 1
            before += n_bytes

    def texts(self, rows: Any) -> list[Any]:
        """The values of a chunk's text column, whatever they are."""
        return self.format.texts(rows, self.columns, self.text_column) if self.columns else []

    def _find_files(self) -> tuple[list[Place], bool]:
        known = ", ".join(FORMATS)
        if self.place.files.info(self.place.path)["type"] != "directory":
            if self.place.ending not in FORMATS:
                raise DataError(f"{self.where}: cannot read {self.place.ending or 'this'}; use {known}.")
            return [self.place], False
        names = [name for name in self.place.names() if not name.startswith((".", "_"))]
        files = [file for name in names if (file := self.place / name).ending in FORMATS]
        endings = {file.ending for file in files}
        if len(endings) != 1:
            found = (
                f"files of several kinds ({', '.join(sorted(endings))}); keep one" if endings else f"no {known} file"
            )
            raise DataError(f"{self.where} is a folder with {found}.")
        return files, True

    def _read_columns(self) -> dict[str, str]:
        """The columns of the first file that has any; tables must all have the same, records need not."""
        columns: dict[str, str] = {}
        for file in self.files:
            if columns and self.ending == ".jsonl":
                break
            with file.open() as stream:
                found = self.format.read_columns(stream, self._name(file))
            if columns and list(found.items()) != list(columns.items()):
                raise DataError(
                    f"{self._name(file)} has the columns {_list(found)}; {self._name(self.files[0])} has "
                    f"{_list(columns)}. All files must have the same."
                )
            columns = found
        return columns

    def _find_text(self, text_column: str, label_column: str) -> str:
        text, _ = find_columns(self.columns, text=text_column, label=label_column)
        text = text or (self.columns[0] if len(self.columns) == 1 else "")
        if text not in self.columns:
            missing = f"has no column {text!r}" if text else "does not say which column holds the text"
            raise DataError(f"{self.where} {missing}; its columns are {', '.join(self.columns)}. Set TEXT_COLUMN.")
        if self._types[text].startswith(NO_TEXTS):
            raise DataError(
                f"{self.where}: the column {text!r} holds {self._types[text]}, not one text or number a row."
            )
        return text

    def _name(self, file: Place) -> str:
        return f"{self.where}, {file.name}" if self.is_folder else self.where

    def _reading(self) -> Any:
        return refused_as(DataError, f"{self.where} cannot be read")


def _wants(wanted: Callable[[int], bool], first: int, place: int) -> bool:
    return wanted(first + place)


def _list(columns: dict[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in columns.items())
