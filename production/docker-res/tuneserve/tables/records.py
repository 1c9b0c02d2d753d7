"""JSON: one record a line, or one array of records. The source of a record is kept, and it may lack fields of others.

Either is read under both endings; the ending decides which is written.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, BinaryIO, TextIO

from tuneserve.errors import DataError
from tuneserve.tables import Answer, Chunk, Wanted, answer_names, cut, streams
from tuneserve.tables.streams import BLOCK_BYTES, as_text

FIRST_RECORDS = 1000
"""Records whose fields together are the columns, since a record may lack some."""

SPACE = re.compile(r"[ \t\n\r]*")
LINE_BREAK = re.compile(r"[\r\n]")
DECODER = json.JSONDecoder()

BEGIN, BETWEEN, END = b"[\n", b",\n", b"\n]\n"

WAY_OUT = (
    'Write one record a line or an array of records; pandas does with to_json(path, orient="records", lines=True).'
)

Record = tuple[str, dict[str, Any]]
"""The JSON source of a record, and its value."""


class Records:
    """JSON lines or, with `is_array`, a JSON array."""

    def __init__(self, *, is_array: bool) -> None:
        self._is_array = is_array

    def read_columns(self, file: BinaryIO, where: str) -> list[tuple[str, str]]:
        """See `Format`."""
        first = [record for _, (_, record) in islice(_read(file, where), FIRST_RECORDS)]
        if len(first) == 1 and first[0] and all(isinstance(value, dict | list) for value in first[0].values()):
            raise DataError(
                f"{where} holds one object with the whole table in it ({', '.join(list(first[0])[:3])[:60]}). {WAY_OUT}"
            )
        return [(name, "JSON") for name in dict.fromkeys(name for record in first for name in record)]

    def read_chunks(
        self, file: BinaryIO, where: str, *, chunk_rows: int, wanted: Wanted, columns: Sequence[str] | None = None
    ) -> Iterator[Chunk]:
        """See `Format`."""
        return cut(_read(file, where), where, chunk_rows, wanted)

    def values(self, chunk: Chunk, columns: Sequence[str], name: str) -> list[Any]:
        """See `Format`."""
        return [record.get(name) for _, record in chunk.rows]

    def write(self, chunk: Chunk, columns: Sequence[str], answers: Sequence[Answer]) -> bytes:
        """See `Format`."""
        names = answer_names(columns)
        lines = []
        for number, (source, record), answer in zip(chunk.numbers, chunk.rows, answers, strict=True):
            if taken := record.keys() & set(names.values()):
                raise DataError(
                    f"{chunk.where}, line {number}: here is a field {min(taken)!r}, which the first {FIRST_RECORDS} "
                    "records lack; answers are written under that name."
                )
            # Appended to the source and not to the parsed record: 1.10 and 1e400 stay as they are.
            added = json.dumps({name: getattr(answer, field) for field, name in names.items()}, ensure_ascii=False)
            line = LINE_BREAK.sub(" ", source[:-1]).rstrip()  # within a string a line break would be escaped
            lines.append(f"{line}{', ' if record else ''}{added[1:]}".encode())
        if self._is_array:
            return BEGIN + BETWEEN.join(lines) + END
        return b"".join(line + b"\n" for line in lines)

    def join(self, parts: Iterable[bytes], columns: Sequence[str], file: BinaryIO) -> None:
        """See `Format`."""
        if not self._is_array:
            for part in parts:
                file.write(part)
            return
        before = BEGIN
        for part in parts:
            if records := part[len(BEGIN) : -len(END)]:
                file.write(before + records)
                before = BETWEEN
        file.write(END if before == BETWEEN else BEGIN + END)


def _read(file: BinaryIO, where: str) -> Iterator[tuple[int, Record]]:
    """The records with their lines or, in an array, their numbers, from 1."""
    with as_text(file, where, newline=None) as text:
        begin, line = text.read(1), 1
        while begin.isspace():
            line += begin == "\n"
            begin = text.read(1)
        read = _read_array if begin == "[" else _read_lines
        number = 0
        try:
            for number, source, record in read(begin, text, line, where):
                if not isinstance(record, dict):
                    raise DataError(f"{where}, line {number}: {source[:40]} is no record with named fields. {WAY_OUT}")
                yield number, (source, record)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}, line {error.lineno}: {error.msg}. {WAY_OUT}") from None
        except (RecursionError, ValueError) as error:  # Python's bounds: depth, and digits of a whole number
            fault = "is nested too deeply" if isinstance(error, RecursionError) else "has a number of too many digits"
            raise DataError(f"{where}: the record behind line {number} {fault} to be read.") from None


def _read_lines(begin: str, file: TextIO, line: int, where: str) -> Iterator[tuple[int, str, Any]]:
    """The values of a file with one a line; `begin`, the first character of `line`, has been read."""
    source = (begin + streams.read_line(file, where, "line", line)).strip() if begin else ""
    while True:
        if source:
            try:
                yield line, source, json.loads(source)
            except json.JSONDecodeError as error:
                error.lineno += line - 1
                raise
        if not (following := streams.read_line(file, where, "line", line + 1)):
            return
        source, line = following.strip(), line + 1


def _read_array(begin: str, file: TextIO, line: int, where: str) -> Iterator[tuple[int, str, Any]]:
    """The values of one array, parsed one by one: the file may be larger than memory."""
    text, mark, lines, number = begin + file.read(BLOCK_BYTES), 0, line - 1, 0
    while text[mark] != "]":
        try:
            values, mark = _read_value(text, mark)
        except json.JSONDecodeError as error:  # perhaps only because the block ends here
            if len(text) - mark > streams.MAX_ROW_CHARACTERS:
                raise streams.too_long(f"{where}, record {number + 1}") from None
            more = file.read(max(BLOCK_BYTES, len(text) - mark))
            if not more:
                error.lineno += lines
                raise
            lines += text.count("\n", 0, mark)
            text, mark = text[mark:] + more, 0
        else:
            for source, value in values:
                number += 1
                yield number, source, value
    if (text[mark + 1 :] + file.read(BLOCK_BYTES)).strip():
        extra = json.JSONDecodeError("Extra data", text, mark + 1)
        extra.lineno += lines
        raise extra


def _read_value(text: str, mark: int) -> tuple[list[tuple[str, Any]], int]:
    """What follows the mark `[` or `,` at this index, if anything does; and the index of the next mark, `,` or `]`."""
    begin = _skip_space(text, mark + 1)
    if text[mark] == "[" and text[begin : begin + 1] == "]":
        return [], begin
    value, end = DECODER.raw_decode(text, begin)
    following = _skip_space(text, end)
    if text[following : following + 1] not in (",", "]"):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, following)
    return [(text[begin:end], value)], following


def _skip_space(text: str, index: int) -> int:
    found = SPACE.match(text, index)
    return found.end() if found else index
