"""The rows of one local file, one by one, each with the place where its author finds it.

CSV and JSON are read here and not by a data-frame library, because everything must stay as it was written (the review
"null", the label "01") and a bad row must be named by its number.
"""

import codecs
import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features

from tuneserve.columns import spell as spell_value
from tuneserve.errors import DataError

FIRST_RECORDS = 1000
"""JSON records whose fields together are taken for the columns: a record may lack some."""

BATCH_ROWS = 1000
BATCH_CHARACTERS = 1 << 20
"""Most rows that are in memory at once; and the size of their texts at which it is enough, however few they are."""

BLOCK_BYTES = 1 << 20
"""What is read of a file at once."""

ENDINGS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Columns:
    """Which columns hold the text and the label; an empty name is to be found."""

    text: str = ""
    label: str = ""


JSON_SPACE = re.compile(r"[ \t\n\r]*")
JSON_DECODER = json.JSONDecoder()

Row = tuple[int, str, str]
"""A row's number (the first line of a file is 1), its text, and its label; a label that is missing is empty."""

Find = Callable[[list[str]], Columns]
"""From a file's column names to the two that count; raises DataError when they cannot be told."""


Item = TypeVar("Item")


def in_batches(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """The items in order, as many at once as memory should hold; `size` is an item's number of characters."""
    batch: list[Item] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += size(item)
        if len(batch) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def read_file(path: Path, where: str, find: Find) -> Iterator[Row]:
    """The rows of a file of any kind that `ENDINGS` names; `where` is what messages call it.

    Raises:
        DataError: naming the file, the line or row, and what is wrong there.
    """
    try:
        if path.suffix.lower() not in ENDINGS:
            ending = path.suffix or "a file without an ending"
            raise DataError(f"{where}: cannot read {ending}; use {', '.join(ENDINGS)}.")
        if path.stat().st_size == 0:
            raise DataError(f"{where} is empty.")
        if path.suffix.lower() == ".parquet":
            yield from _read_parquet(path, where, find)
            return
        _check_utf8(path, where)
        if path.suffix.lower() in (".csv", ".tsv"):
            yield from _read_csv(path, where, find, separator="\t" if path.suffix.lower() == ".tsv" else ",")
        else:
            yield from _read_json(path, where, find)
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror or error}") from error


def _check_utf8(path: Path, where: str) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with path.open("rb") as file:
        while True:
            block = file.read(BLOCK_BYTES)
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                byte = error.object[error.start]
                raise DataError(
                    f"{where}, line {line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8."
                ) from None
            if not block:
                return
            line += block.count(b"\n")


def _read_csv(path: Path, where: str, find: Find, *, separator: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            if not any(header) or any(header.count(name) > 1 for name in header if name):
                raise DataError(f"{where}, row 1: the column names {header} should be there, each once.")
            if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0]), None)):
                raise DataError(
                    f"{where}, row 1: columns are separated by {other!r}; in a {path.suffix} use {separator!r}."
                )
            columns = find(header)
            text, label = header.index(columns.text), header.index(columns.label)
            for row, cells in enumerate(reader, start=2):
                if not cells:  # a blank line
                    continue
                if len(cells) != len(header):
                    raise DataError(f"{where}, row {row}: {len(cells)} fields where the header has {len(header)}.")
                yield row, cells[text], cells[label].strip()
        except csv.Error as error:
            raise DataError(f"{where}, line {reader.line_num}: {error} (is a quote missing?)") from None


def _read_json(path: Path, where: str, find: Find) -> Iterator[Row]:
    records = _read_records(path, where)
    first = list(islice(records, FIRST_RECORDS))
    if not first:
        return
    columns = find(list(dict.fromkeys(name for _, record in first for name in record)))
    for row, record in chain(first, records):
        for name in (columns.text, columns.label):
            if isinstance(record.get(name), dict | list):
                raise DataError(
                    f"{where}, line {row}: the column {name!r} holds lists or records, not one value a row."
                )
        text, label = spell(record.get(columns.text)), spell(record.get(columns.label)).strip()
        try:
            (text + label).encode()
        except UnicodeEncodeError:
            raise DataError(f"{where}, line {row}: half a surrogate pair is not Unicode text.") from None
        yield row, text, label


def _read_records(path: Path, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of JSON lines, or of one array, with their lines or their places in the array."""
    with path.open(encoding="utf-8-sig") as file:
        is_array = file.read(1) == "["
        file.seek(0)
        try:
            for row, record in enumerate(_read_array(file), start=1) if is_array else _read_lines(file):
                if not isinstance(record, dict):
                    raise DataError(f"{where}, line {row}: {json.dumps(record)[:40]} is no record with named fields.")
                yield row, record
        except json.JSONDecodeError as error:
            raise DataError(f"{where}, line {error.lineno}: {error.msg}.") from None


def _read_lines(file: TextIO) -> Iterator[tuple[int, Any]]:
    for row, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield row, json.loads(line.strip())
            except json.JSONDecodeError as error:
                error.lineno += row - 1
                raise


def _read_array(file: TextIO) -> Iterator[Any]:
    """The values of one array, one by one: the file may be larger than memory."""
    text, mark, lines = file.read(BLOCK_BYTES), 0, 0
    while text[mark] != "]":
        try:
            values, mark = _read_value(text, mark)
        except json.JSONDecodeError as error:  # perhaps only because the block ends here
            more = file.read(max(BLOCK_BYTES, len(text) - mark))
            if not more:
                error.lineno += lines
                raise
            lines += text.count("\n", 0, mark)
            text, mark = text[mark:] + more, 0
        else:
            yield from values
    if (text[mark + 1 :] + file.read(BLOCK_BYTES)).strip():
        extra = json.JSONDecodeError("Extra data", text, mark + 1)
        extra.lineno += lines
        raise extra


def _read_value(text: str, mark: int) -> tuple[list[Any], int]:
    """What follows the mark `[` or `,` at this place, if anything does; and the place of the next mark, `,` or `]`."""
    begin = _skip_space(text, mark + 1)
    if text[mark] == "[" and text[begin : begin + 1] == "]":
        return [], begin
    value, end = JSON_DECODER.raw_decode(text, begin)
    end = _skip_space(text, end)
    if text[end : end + 1] not in (",", "]"):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
    return [value], end


def _skip_space(text: str, place: int) -> int:
    found = JSON_SPACE.match(text, place)
    assert found is not None  # no space at all is a match, too
    return found.end()


def _read_parquet(path: Path, where: str, find: Find) -> Iterator[Row]:
    pa.set_memory_pool(pa.system_memory_pool())  # the default one keeps up to 70 MiB of what was given back
    try:
        # Read as it comes: by itself the library loads whole row groups, and one may be the whole file.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=BLOCK_BYTES) as file:
            columns = find(file.schema_arrow.names)
            features = Features.from_arrow_schema(file.schema_arrow)
            for name in (columns.text, columns.label):
                kind = file.schema_arrow.field(name).type
                if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
                    raise DataError(f"{where}: the column {name!r} holds {kind}, not one text or number a row.")
            row = 0
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=[columns.text, columns.label]):
                texts, labels = batch.column(columns.text).to_pylist(), batch.column(columns.label).to_pylist()
                for text, label in zip(texts, labels, strict=True):
                    row += 1
                    yield row, spell(text), spell(label, features[columns.label]).strip()
    except (pa.ArrowException, ValueError) as error:  # ValueError: a ClassLabel's number without a name
        raise DataError(f"{where} cannot be read: {' '.join(str(error).split())}") from error


def spell(value: Any, feature: Any = None) -> str:
    """A text or label as words; a missing one as none. `feature` gives the names of a ClassLabel's numbers."""
    if isinstance(feature, ClassLabel) and value is not None:
        return "" if value == -1 else str(feature.int2str(value))
    return spell_value(value)
