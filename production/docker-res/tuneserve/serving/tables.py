"""CSV, TSV and JSON lines as formats to be scored, and the list of all formats.

What the input says is kept: a CSV's cells stay text ("01", "null"), a JSON record stays as it is spelled.
"""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from typing import Any, BinaryIO, TextIO, TypeVar

from tuneserve.errors import DataError
from tuneserve.serving.format import ANSWER_FIELDS, Answer, Chunk, Format, answer_names
from tuneserve.serving.parquet import Parquet

Item = TypeVar("Item")

FIRST_RECORDS = 1000
"""JSON records whose fields together are taken for the columns: a record may lack some."""


class Csv:
    """Comma- or tab-separated cells below a header. Line breaks and separators stand in quotes."""

    def __init__(self, separator: str) -> None:
        self._separator = separator

    def read_columns(self, file: BinaryIO, where: str) -> dict[str, str]:
        """See `Format`."""
        header = next(self._records(file, where), None)
        if header is None:
            raise DataError(f"{where} is empty.")
        names = [name.strip() for name in header]
        if not any(names) or len(set(names)) < len(names):
            raise DataError(f"{where}, row 1: the column names {names} should be there, each once.")
        return dict.fromkeys(names, "text")

    def read_chunks(
        self, file: BinaryIO, where: str, *, chunk_rows: int, n_bytes: int, wanted: Callable[[int], bool]
    ) -> Iterator[Chunk]:
        """See `Format`."""
        records = self._records(file, where)
        next(records)
        for rows in _cut(records, chunk_rows, wanted):
            yield Chunk(rows, _share(file, n_bytes))

    def _records(self, file: BinaryIO, where: str) -> Iterator[list[str]]:
        csv.field_size_limit(sys.maxsize)
        with _decoded(file, newline="") as text:
            reader = csv.reader(text, delimiter=self._separator, strict=True)
            width = 0
            try:
                for row, cells in enumerate(reader, start=1):
                    width = width or len(cells)
                    if cells and len(cells) != width:
                        raise DataError(f"{where}, row {row}: {len(cells)} fields where the header has {width}.")
                    if cells:  # not a blank line
                        yield cells
            except csv.Error as error:
                raise DataError(f"{where}, line {reader.line_num}: {error} (is a quote missing?)") from None
            except UnicodeDecodeError as error:
                raise _not_utf8(error, where, reader.line_num) from None

    def texts(self, rows: list[list[str]], columns: Sequence[str], text_column: str) -> list[str]:
        """See `Format`."""
        place = columns.index(text_column)
        return [cells[place] for cells in rows]

    def write(self, rows: list[list[str]], columns: Sequence[str], answers: Sequence[Answer]) -> bytes:
        """See `Format`."""
        cells = [row + _cells(answer) for row, answer in zip(rows, answers, strict=True)]
        return self._header(columns) + self._lines(cells)

    def join(self, parts: Iterable[bytes], columns: Sequence[str], file: BinaryIO) -> None:
        """See `Format`."""
        header = self._header(columns)
        file.write(header)
        for part in parts:
            file.write(part[len(header) :])

    def _header(self, columns: Sequence[str]) -> bytes:
        return self._lines([[*columns, *answer_names(columns).values()]])

    def _lines(self, rows: list[list[str]]) -> bytes:
        text = io.StringIO()
        csv.writer(text, delimiter=self._separator, lineterminator="\n").writerows(rows)
        return text.getvalue().encode()


class JsonLines:
    """One record a line; a record may lack fields that others have."""

    def read_columns(self, file: BinaryIO, where: str) -> dict[str, str]:
        """See `Format`."""
        first = [_parse(line, where) for line in islice(_numbered_lines(file, where), FIRST_RECORDS)]
        return {name: "JSON" for record in first for name in record}

    def read_chunks(
        self, file: BinaryIO, where: str, *, chunk_rows: int, n_bytes: int, wanted: Callable[[int], bool]
    ) -> Iterator[Chunk]:
        """See `Format`."""
        for lines in _cut(_numbered_lines(file, where), chunk_rows, wanted):
            rows = None if lines is None else [(where, *line, _parse(line, where)) for line in lines]
            yield Chunk(rows, _share(file, n_bytes))

    def texts(self, rows: list[Any], columns: Sequence[str], text_column: str) -> list[Any]:
        """See `Format`."""
        return [record.get(text_column) for *_, record in rows]

    def write(self, rows: list[Any], columns: Sequence[str], answers: Sequence[Answer]) -> bytes:
        """See `Format`."""
        names = answer_names(columns)
        lines = []
        for (where, number, line, record), answer in zip(rows, answers, strict=True):
            if taken := record.keys() & set(names.values()):
                raise DataError(
                    f"{where}, line {number}: here is a field {min(taken)!r}, which the first {FIRST_RECORDS} lines "
                    "lack; answers are written under that name."
                )
            # Added to the text of the record and not to what was read of it: 1.10 and 1e400 stay what they are.
            added = _json({name: getattr(answer, field) for field, name in names.items()})
            lines.append(f"{line[:-1].rstrip()}{', ' if record else ''}{added[1:]}\n")
        return "".join(lines).encode()

    def join(self, parts: Iterable[bytes], columns: Sequence[str], file: BinaryIO) -> None:
        """See `Format`."""
        for part in parts:
            file.write(part)


FORMATS: dict[str, Format] = {".csv": Csv(","), ".tsv": Csv("\t"), ".jsonl": JsonLines(), ".parquet": Parquet()}


def _cut(items: Iterator[Item], chunk_rows: int, wanted: Callable[[int], bool]) -> Iterator[list[Item] | None]:
    """The items in chunks, at least one even if it is empty; those that are not wanted are passed over."""
    for number in count():
        some = islice(items, chunk_rows)
        rows = list(some) if wanted(number) else None
        n_rows = sum(1 for _ in some) if rows is None else len(rows)
        if n_rows or not number:
            yield rows
        if n_rows < chunk_rows:
            return


def _share(file: BinaryIO, n_bytes: int) -> float:
    return min(1.0, file.tell() / n_bytes) if n_bytes else 0.0


def _cells(answer: Answer) -> list[str]:
    """An answer as a CSV's cells: nothing for what is missing, JSON for all that is no text."""
    values = [getattr(answer, field) for field in ANSWER_FIELDS]
    return ["" if value is None else value if isinstance(value, str) else _json(value) for value in values]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _numbered_lines(file: BinaryIO, where: str) -> Iterator[tuple[int, str]]:
    number = 0
    with _decoded(file, newline="\n") as text:
        try:
            for number, line in enumerate(text, start=1):
                if line.strip():
                    yield number, line.strip()
        except UnicodeDecodeError as error:
            raise _not_utf8(error, where, number) from None


@contextmanager
def _decoded(file: BinaryIO, *, newline: str) -> Iterator[TextIO]:
    """The file as text; it is left open to whoever opened it."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)
    try:
        yield text
    finally:
        if not file.closed:
            text.detach()


def _not_utf8(error: UnicodeDecodeError, where: str, line: int) -> DataError:
    byte = error.object[error.start]
    near = f"after line {line}" if line else "near its beginning"
    return DataError(f"{where}, {near}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8.")


def _parse(numbered: tuple[int, str], where: str) -> dict[str, Any]:
    number, line = numbered
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}, line {number}: {error.msg} (JSON lines have one record a line).") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}, line {number}: {line[:40]} is no record with named fields.")
    return record
