"""CSV and TSV. Cells stay text as they are ("01", "null")."""

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

from tuneserve.errors import DataError
from tuneserve.tables import ANSWER_FIELDS, Answer, Chunk, Wanted, answer_names, cut
from tuneserve.tables.streams import as_text


class Delimited:
    """Cells between separators, below a header; quoted cells may contain separators and line breaks."""

    def __init__(self, separator: str) -> None:
        self._separator = separator

    def read_columns(self, file: BinaryIO, where: str) -> list[tuple[str, str]]:
        """See `Format`."""
        header = next(self._rows(file, where), None)
        if header is None:
            raise DataError(f"{where} is empty.")
        names = [name.strip() for name in header[1]]
        if not any(names) or max(Counter(filter(None, names)).values()) > 1:
            raise DataError(f"{where}, row 1: the column names {names} should be there, each once.")
        others = [mark for mark in ",;\t|" if mark in names[0] and mark != self._separator]
        if len(names) == 1 and others:
            raise DataError(
                f"{where}, row 1: columns are separated by {others[0]!r}; in this kind of file use {self._separator!r}."
            )
        return [(name, "text") for name in names]

    def read_chunks(
        self, file: BinaryIO, where: str, *, chunk_rows: int, wanted: Wanted, columns: Sequence[str] | None = None
    ) -> Iterator[Chunk]:
        """See `Format`."""
        rows = self._rows(file, where)
        next(rows)
        return cut(rows, where, chunk_rows, wanted)

    def _rows(self, file: BinaryIO, where: str) -> Iterator[tuple[int, list[str]]]:
        csv.field_size_limit(sys.maxsize)
        with as_text(file, where, newline="") as text:
            reader = csv.reader(text, delimiter=self._separator, strict=True)
            width = 0
            try:
                for row, cells in enumerate(reader, start=1):
                    if row == 1:
                        width = len(cells)
                    elif cells and len(cells) != width:
                        raise DataError(f"{where}, row {row}: {len(cells)} fields where the header has {width}.")
                    if cells or row == 1:  # not a blank line
                        yield row, cells
            except csv.Error as error:
                raise DataError(f"{where}, line {reader.line_num}: {error} (is a quote missing?)") from None

    def values(self, chunk: Chunk, columns: Sequence[str], name: str) -> list[str]:
        """See `Format`."""
        index = columns.index(name)
        return [cells[index] for cells in chunk.rows]

    def write(self, chunk: Chunk, columns: Sequence[str], answers: Sequence[Answer]) -> bytes:
        """See `Format`."""
        cells = [row + _cells(answer) for row, answer in zip(chunk.rows, answers, strict=True)]
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


def _cells(answer: Answer) -> list[str]:
    """An answer as cells: empty for None, JSON for values that are not text."""
    values = [getattr(answer, field) for field in ANSWER_FIELDS]
    return [
        "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for value in values
    ]
