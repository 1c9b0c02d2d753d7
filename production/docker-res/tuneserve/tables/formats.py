"""The list of formats, and which of them a file name means."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import BinaryIO, cast

from tuneserve.errors import DataError
from tuneserve.tables import Format
from tuneserve.tables.arrow import Arrow
from tuneserve.tables.delimited import Delimited, Tabs
from tuneserve.tables.parquet import Parquet
from tuneserve.tables.records import Records
from tuneserve.tables.streams import WRITERS, Decompressed

FORMATS: dict[str, Format] = {
    ".csv": Delimited(","),
    ".tsv": Tabs(),
    ".jsonl": Records(is_array=False),
    ".json": Records(is_array=True),
    ".parquet": Parquet(),
    ".arrow": Arrow(),
}
"""The formats by their endings, in the order in which messages list them."""


DESCRIPTIONS = {"state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
"""Files that `datasets` writes beside the data."""

TEXT_ENDINGS = {".txt", ""}
"""Of the files of a folder that hold one text each."""

OTHERS = {
    ".zip": "unpack it first",
    ".tar": "unpack it first",
    ".tgz": "unpack it first",
    ".7z": "unpack it first",
    ".rar": "unpack it first",
    ".xlsx": "save the sheet as CSV UTF-8",
    ".xls": "save the sheet as CSV UTF-8",
}
"""What is to be done with files of other kinds."""


@dataclass(frozen=True, slots=True)
class FileType:
    """A format and a compression; both are known by the whole ending, such as `.csv.gz`."""

    format: Format
    ending: str
    compression: str = ""

    @contextmanager
    def reading(self, raw: BinaryIO, where: str) -> Iterator[BinaryIO]:
        """The table's bytes; raises DataError while they are read if the archive is damaged."""
        if self.compression:
            with Decompressed(raw, self.compression, where) as file:
                yield cast(BinaryIO, file)
        else:
            yield raw

    @contextmanager
    def writing(self, raw: BinaryIO) -> Iterator[BinaryIO]:
        """A file whose bytes are compressed into `raw`."""
        if self.compression:
            with WRITERS[self.compression](raw) as file:
                yield file
        else:
            yield raw


def is_known(name: str) -> bool:
    """Whether the name of a file ends as one of the formats does."""
    return _split(name)[0] in FORMATS


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the author's: `.DS_Store`, `__MACOSX`, `_SUCCESS`."""
    return name.startswith((".", "_"))


def is_data(name: str) -> bool:
    """Whether a file in a folder holds rows."""
    name = PurePath(name).name
    return is_known(name) and not is_hidden(name) and name.casefold() not in DESCRIPTIONS


def is_text(name: str) -> bool:
    """Whether a file in a folder may be one text."""
    return PurePath(name).suffix.lower() in TEXT_ENDINGS and not is_hidden(name)


def file_type(name: str, where: str) -> FileType:
    """The type of a file by its name.

    Raises:
        DataError: there is no such format.
    """
    ending, compression = _split(name)
    if ending not in FORMATS:
        found = ending + compression or "a file without an ending"
        way = OTHERS.get(ending, f"use {known_endings()}")
        raise DataError(f"{where}: cannot read {found}; {way}.")
    return FileType(FORMATS[ending], ending + compression, compression)


def known_endings() -> str:
    """The endings, as messages list them."""
    return f"{', '.join(FORMATS)} (or one of these with {', '.join(WRITERS)} behind it)"


def _split(name: str) -> tuple[str, str]:
    path = PurePath(name.lower())
    compression = path.suffix if path.suffix in WRITERS else ""
    return (PurePath(path.stem).suffix if compression else path.suffix), compression
