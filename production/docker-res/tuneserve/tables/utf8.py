"""Text files: UTF-8, with or without a byte order mark."""

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, TextIO

from tuneserve.errors import DataError
from tuneserve.tables.compression import BLOCK_BYTES


class Checked(io.RawIOBase):
    """Bytes that are UTF-8 so far; closing this leaves the file open."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._file, self._where, self._line = file, where, 1
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; 0 at the end.

        Raises:
            DataError: a byte is not UTF-8; the message names its line.
        """
        block = self._file.read(len(buffer))
        try:
            self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line = self._line + error.object[: error.start].count(b"\n")
            byte = error.object[error.start]
            raise DataError(
                f"{self._where}, line {line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8."
            ) from None
        self._line += block.count(b"\n")
        buffer[: len(block)] = block
        return len(block)


@contextmanager
def as_text(file: BinaryIO, where: str, *, newline: str | None) -> Iterator[TextIO]:
    """The file as text; it is left open to whoever opened it."""
    with io.TextIOWrapper(
        io.BufferedReader(Checked(file, where), BLOCK_BYTES), encoding="utf-8-sig", newline=newline
    ) as text:
        yield text
