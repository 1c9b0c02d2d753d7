"""CSV and TSV. Cells stay text as they are ("01", "null")."""

import csv
import io
import json
import re
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, TextIO

from tuneserve.errors import DataError
from tuneserve.tables import ANSWER_FIELDS, Answer, Chunk, Wanted, answer_names, cut, streams

QUOTED = re.compile(r'"[^"]*+(?:""[^"]*+)*+"')
"""A cell in quotes, those within doubled."""

MOST_LINES = 2
"""Line breaks of a cell beyond which its lines are compared with rows."""

SHOWN_CHARACTERS = 40
"""Of a column's name in messages."""


class Delimited:
    """Cells between separators, below a header; quoted cells may contain separators and line breaks."""

    def __init__(self, separator: str) -> None:
        self._separator = separator

    def read_columns(self, file: BinaryIO, where: str) -> list[tuple[str, str]]:
        """See `Format`."""
        header = next(self._rows(file, where), None)
        if header is None:
            raise DataError(f"{where} is empty.")
        names = _clean(header[1])
        if not any(names) or max(Counter(filter(None, names)).values()) > 1:
            shown = ", ".join(repr(name[:SHOWN_CHARACTERS]) for name in names[:6])
            raise DataError(f"{where}, row 1: the column names [{shown}] should be there, each once.")
        others = [mark for mark in ",;\t|" if mark != self._separator and any(mark in name for name in names)]
        if others and (len(names) == 1 or others[0] in ";\t"):
            way = ", or name the file .tsv" if others[0] == "\t" else ""
            raise DataError(
                f"{where}, row 1: columns are separated by {others[0]!r}; in this kind of file use "
                f"{self._separator!r}{way}."
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
        with streams.as_text(file, where, newline="") as text:
            lines, row, header = _Lines(text, where), 0, list[str]()
            try:
                for row, cells in enumerate(self._records(lines, where), start=1):
                    if row == 1:
                        header = _clean(cells)
                        names = set(header)
                    elif cells:
                        if len(cells) != len(header):
                            raise DataError(
                                f"{where}, row {row}: {len(cells)} fields where the header has {len(header)}."
                            )
                        if len(cells) > 1 and set(_clean(cells)) == names:
                            raise DataError(
                                f"{where}, row {row} repeats the column names, as when files are joined. Remove every "
                                "such row."
                            )
                        self._refuse_swallowed(cells, f"{where}, row {row}")
                    if cells or row == 1:  # not a blank line
                        yield row, cells
                    lines.begin_row(row + 1)
            except csv.Error as error:
                line = lines.last
                hint = "is a quote missing?"
                if '\\"' in line:
                    hint = 'in quotes write a quote as "" and not as \\"; Spark does so with option("escape", \'"\')'
                raise DataError(
                    f"{where}, line {lines.number}: {error} ({hint}) The fault is in row {row + 1}."
                ) from None

    def _records(self, lines: "_Lines", where: str) -> Iterator[list[str]]:
        return csv.reader(lines, delimiter=self._separator, strict=True)

    def _refuse_swallowed(self, cells: list[str], here: str) -> None:
        """A quote that opens by mistake makes one cell of all rows up to the next quote."""
        for cell in cells:
            inner = cell.splitlines()[1:-1] if cell.count("\n") > MOST_LINES else []
            if inner and all(self._looks_like_a_row(line, len(cells)) for line in inner):
                raise DataError(
                    f"{here}: a quote opens here and takes in {len(inner)} lines that look like rows. Close it, or "
                    'write a quote within quotes as "".'
                )

    def _looks_like_a_row(self, line: str, width: int) -> bool:
        cells = line.split(self._separator)
        return len(cells) == width > 1 and all(cell and cell == cell.strip() for cell in cells)

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


class Tabs(Delimited):
    """TSV: most programs write its cells without quotes, so that a quote is a character like any other.

    A cell that is quoted from end to end is still unquoted, and may then hold tabs and line breaks.
    """

    def __init__(self) -> None:
        super().__init__("\t")

    def _records(self, lines: "_Lines", where: str) -> Iterator[list[str]]:
        width = 0
        for line in lines:
            cells = line.rstrip("\r\n").split("\t")
            width = width or len(cells)
            quoted = cells[-1].startswith('"') and not QUOTED.fullmatch(cells[-1])
            if len(cells) == width and not (quoted and self._goes_on(lines, width, where)):
                yield [] if cells == [""] else [_unquote(cell) for cell in cells]
            elif '"' in line:
                lines.push_back()
                yield next(csv.reader(lines, delimiter="\t", strict=True))
            else:
                yield [] if cells == [""] else cells

    def _goes_on(self, lines: "_Lines", width: int, where: str) -> bool:
        """Whether the quoted cell at the end of a line goes on in the next, which then is no row of its own."""
        if width == 1:
            raise DataError(
                f"{where}, line {lines.number}: a quote opens here and does not close in its line. Remove it, or write "
                'the text with quotes around it and those within as "".'
            )
        following = lines.peek()
        return bool(following) and following.count("\t") != width - 1


def _unquote(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if QUOTED.fullmatch(cell) else cell


class _Lines(Iterator[str]):
    """The lines of a text, numbered from 1; the last one can be read again, and the next one looked at.

    The lines of a row, which quotes may hold together, are bounded in characters.
    """

    def __init__(self, text: TextIO, where: str) -> None:
        self._text, self._ahead, self.number, self.last = text, deque[str](), 0, ""
        self._where, self._row, self._characters = where, 1, 0

    def begin_row(self, row: int) -> None:
        self._row, self._characters = row, 0

    def __next__(self) -> str:
        self.last = self._ahead.popleft() if self._ahead else self._read()
        if not self.last:
            raise StopIteration
        self.number += 1
        self._characters += len(self.last)
        if self._characters > streams.MAX_ROW_CHARACTERS:
            raise streams.too_long(f"{self._where}, row {self._row}")
        return self.last

    def push_back(self) -> None:
        self._ahead.appendleft(self.last)
        self.number -= 1
        self._characters -= len(self.last)

    def peek(self) -> str:
        if not self._ahead and (line := self._read()):
            self._ahead.append(line)
        return self._ahead[0] if self._ahead else ""

    def _read(self) -> str:
        return streams.read_line(self._text, self._where, "row", self._row)


def _clean(names: list[str]) -> list[str]:
    return [name.strip().strip("\ufeff").strip() for name in names]


def _cells(answer: Answer) -> list[str]:
    """An answer as cells: empty for None, JSON for values that are not text."""
    values = [getattr(answer, field) for field in ANSWER_FIELDS]
    return [
        "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for value in values
    ]
