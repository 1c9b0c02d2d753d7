"""Streams of a file's bytes, in constant memory: decompressed, compressed, and as UTF-8 text."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, BinaryIO, TextIO

import pyarrow as pa

from tuneserve.errors import DataError

BLOCK_BYTES = 1 << 20
"""Bytes that are read or decompressed at once."""

MAX_ROW_CHARACTERS = 8 << 20
"""Of a line, a row or a text, which are in memory whole: more than two long novels have."""

READERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw, mode="rb"),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda raw: pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"),
}
"""Streams that decompress a file, by its last ending."""


class Decompressed(io.RawIOBase):
    """The content of an archive, not seekable; closing it leaves the archive open."""

    def __init__(self, raw: BinaryIO, compression: str, where: str) -> None:
        self._stream, self._where = READERS[compression](raw), where

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; 0 at the end.

        Raises:
            DataError: the archive is damaged or ends too early.
        """
        try:
            content = self._stream.read(len(buffer))
        except (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk or network, not of the content
                raise
            reason = " ".join(str(error).split())
            raise DataError(f"{self._where}: the archive is damaged: {reason}") from error
        buffer[: len(content)] = content
        return len(content)


class ZstdWriter(io.RawIOBase):
    """Each write becomes one frame; a Zstandard file may hold any number of them."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._written = raw, 0

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, content: Any) -> int:
        """Compress and write all of the content."""
        content = bytes(content)
        if content:
            self._raw.write(pa.compress(content, "zstd", asbytes=True))
        self._written += len(content)
        return len(content)

    def tell(self) -> int:
        """The number of bytes written, before compression."""
        return self._written


WRITERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0),
    ".bz2": partial(bz2.BZ2File, mode="wb"),
    ".xz": partial(lzma.LZMAFile, mode="wb"),
    ".zst": ZstdWriter,
}
"""Files that compress into another one, by its last ending; the same content gives the same bytes."""


class CheckedUtf8(io.RawIOBase):
    """Bytes of a file, checked to be UTF-8 as they are read; closing this leaves the file open."""

    def __init__(self, file: BinaryIO, where: str) -> None:
        self._file, self._where, self._line = file, where, 1
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._begins = True

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; 0 at the end.

        Raises:
            DataError: a byte is not UTF-8; the message names its line.
        """
        block = self._file.read(len(buffer))
        if self._begins and (block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in block[:4]):
            raise DataError(f"{self._where} is UTF-16 text; save it as UTF-8 (in Excel: CSV UTF-8).")
        self._begins = False
        try:
            self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line = self._line + error.object[: error.start].count(b"\n")
            byte = error.object[error.start]
            raise DataError(
                f"{self._where}, line {line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8 "
                "(iconv -f CP1252 -t UTF-8)."
            ) from None
        self._line += block.count(b"\n")
        buffer[: len(block)] = block
        return len(block)


@contextmanager
def as_text(file: BinaryIO, where: str, *, newline: str | None) -> Iterator[TextIO]:
    """A file in UTF-8, with or without a byte order mark, as text; the file itself stays open."""
    with io.TextIOWrapper(
        io.BufferedReader(CheckedUtf8(file, where), BLOCK_BYTES), encoding="utf-8-sig", newline=newline
    ) as text:
        yield text


def read_text(file: BinaryIO, where: str) -> str:
    """All of a file in UTF-8.

    Raises:
        DataError: it is not UTF-8, or longer than a text may be.
    """
    with as_text(file, where, newline=None) as text:
        content = text.read(MAX_ROW_CHARACTERS + 1)
    if len(content) > MAX_ROW_CHARACTERS:
        raise too_long(where)
    return content.strip()


def read_line(text: TextIO, where: str, unit: str, number: int) -> str:
    """The next line, with its end; empty after the last. Messages name it as the line or row of this number.

    Raises:
        DataError: it is longer than a row may be.
    """
    line = text.readline(MAX_ROW_CHARACTERS + 1)
    if len(line) > MAX_ROW_CHARACTERS:
        raise too_long(f"{where}, {unit} {number}")
    return line


def too_long(here: str) -> DataError:
    """The refusal of a row, or a text in a file of its own, that would fill the memory."""
    return DataError(
        f"{here} has more than {MAX_ROW_CHARACTERS} characters, the most that is read of one. Is a quote or a line "
        "break missing? Otherwise cut the text."
    )
