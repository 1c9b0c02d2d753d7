"""Parquet: columns keep their types, answers get types of their own."""

import io
import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tuneserve.errors import DataError
from tuneserve.tables import Answer, Chunk, Wanted, answer_names, streams
from tuneserve.tables.streams import BLOCK_BYTES

ANSWER_TYPES = {
    "label": pa.string(),
    "score": pa.float64(),
    "scores": pa.map_(pa.string(), pa.float64()),
    "tokens": pa.int32(),
    "truncated": pa.bool_(),
    "error": pa.string(),
    "model_version": pa.string(),
    "abstain": pa.bool_(),
}

GROUP_BYTES = 8 << 20
"""Memory of a row group when parts are joined; one group a part could be too small to be read fast."""


class Parquet:
    """Columns with types."""

    def read_columns(self, file: BinaryIO, where: str) -> list[tuple[str, str]]:
        """See `Format`."""
        with _open_parquet(file, where) as table:
            return typed_columns(table.schema_arrow, where)

    def read_chunks(
        self, file: BinaryIO, where: str, *, chunk_rows: int, wanted: Wanted, columns: Sequence[str] | None = None
    ) -> Iterator[Chunk]:
        """See `Format`. Row groups without a wanted row, and other columns, are not read."""
        with _open_parquet(file, where) as table:
            schema = table.schema_arrow
            if columns is not None:
                schema = pa.schema([schema.field(name) for name in dict.fromkeys(columns)], metadata=schema.metadata)
            total = table.metadata.num_rows
            batches = self._batches(table, schema.names, chunk_rows, wanted)
            batch_row, batch = 0, pa.RecordBatch.from_pylist([], schema=schema)
            for number in range(max(1, math.ceil(total / chunk_rows))):
                begin, end = number * chunk_rows, min((number + 1) * chunk_rows, total)
                share = end / total if total else 1.0
                if not wanted(number):
                    yield Chunk(None, (), where, share)
                    continue
                row, pieces = begin, []
                while row < end:
                    while batch_row + batch.num_rows <= row:
                        batch_row, batch = next(batches)
                    pieces.append(batch.slice(row - batch_row, end - row))
                    row += pieces[-1].num_rows
                rows = pa.Table.from_batches(pieces, schema=schema)
                yield Chunk(rows, range(begin + 1, end + 1), where, share)

    @staticmethod
    def _batches(
        table: pq.ParquetFile, columns: list[str], chunk_rows: int, wanted: Wanted
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The rows of all groups that overlap a wanted chunk, each batch with the number of its first row."""
        begin = 0
        for group in range(table.num_row_groups):
            row, end = begin, begin + table.metadata.row_group(group).num_rows
            if any(wanted(number) for number in range(row // chunk_rows, math.ceil(end / chunk_rows))):
                for batch in table.iter_batches(batch_size=chunk_rows, row_groups=[group], columns=columns):
                    yield row, batch.select(columns)
                    row += batch.num_rows
            begin = end

    def values(self, chunk: Chunk, columns: Sequence[str], name: str) -> list[Any]:
        """See `Format`. Class ids become the names that the schema gives them, -1 becomes None."""
        return column_values(chunk, name)

    def write(self, chunk: Chunk, columns: Sequence[str], answers: Sequence[Answer]) -> bytes:
        """See `Format`."""
        content = io.BytesIO()
        pq.write_table(append_answers(chunk.rows, columns, answers), content)
        return content.getvalue()

    def join(self, parts: Iterable[bytes], columns: Sequence[str], file: BinaryIO) -> None:
        """See `Format`."""
        tables = (pq.read_table(io.BytesIO(part)) for part in parts)
        held = [next(tables)]
        with pq.ParquetWriter(file, held[0].schema) as writer:
            for table in tables:
                if sum(one.nbytes for one in held) >= GROUP_BYTES:
                    writer.write_table(pa.concat_tables(held))
                    held = []
                held.append(table)
            writer.write_table(pa.concat_tables(held))


def typed_columns(schema: pa.Schema, where: str) -> list[tuple[str, str]]:
    """The names and types of a schema's columns.

    Raises:
        DataError: two have the same name.
    """
    if len(set(schema.names)) < len(schema.names):
        raise DataError(f"{where}: the column names {str(schema.names)[:200]} should each be there once.")
    return [(str(field.name), str(field.type)) for field in schema]


def column_values(chunk: Chunk, name: str) -> list[Any]:
    """The values of one column of a chunk that is a `pyarrow.Table`: class ids become names, -1 becomes None.

    Raises:
        DataError: a text is not UTF-8 or longer than a row may be, or a class id has no name.
    """
    classes = _class_names(chunk.rows.schema, name)
    column = chunk.rows.column(name)
    _require_short(column, chunk)
    try:
        values = list(column.to_pylist())
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"{chunk.where}: the column {name!r} holds the byte 0x{byte:02x}, not UTF-8.") from None
    if classes is None:
        return values
    for number, value in zip(chunk.numbers, values, strict=True):
        if value is not None and not -1 <= value < len(classes):
            raise DataError(f"{chunk.where}, row {number}: class label {value} of {name!r} has no name.")
    return [None if value is None or value == -1 else classes[value] for value in values]


def _require_short(column: pa.ChunkedArray, chunk: Chunk) -> None:
    """Refuse a text that would fill the memory, before there is another copy of it."""
    if pa.types.is_dictionary(column.type):
        column = pa.chunked_array([one.dictionary for one in column.chunks], column.type.value_type)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return
    lengths = pc.utf8_length(column)
    longest = pc.max(lengths).as_py() or 0
    if longest > streams.MAX_ROW_CHARACTERS:
        row = pc.index(lengths, pa.scalar(longest, lengths.type)).as_py()
        numbered = len(column) == len(chunk.numbers)  # not those of a dictionary
        raise streams.too_long(f"{chunk.where}, row {chunk.numbers[row]}" if numbered else chunk.where)


def append_answers(rows: pa.Table, columns: Sequence[str], answers: Sequence[Answer]) -> pa.Table:
    """The rows with their answers in columns behind the others; `columns` are all that the input has."""
    for field, name in answer_names(columns).items():
        values = [getattr(answer, field) for answer in answers]
        if field == "scores":
            values = [None if scores is None else list(scores.items()) for scores in values]
        rows = rows.append_column(name, pa.array(values, ANSWER_TYPES[field]))
    return rows


def _class_names(schema: pa.Schema, name: str) -> list[str] | None:
    """The names of a column's classes, which the `datasets` library writes beside the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        feature = features[name]
        return [str(one) for one in feature["names"]] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None


@contextmanager
def _open_parquet(file: BinaryIO, where: str) -> Iterator[pq.ParquetFile]:
    pa.set_memory_pool(pa.system_memory_pool())  # the default pool keeps up to 70 MiB of freed memory
    with seekable(file) as whole:
        try:
            # Unbuffered: by default the library loads whole row groups, and one may be the whole file.
            with pq.ParquetFile(whole, pre_buffer=False, buffer_size=BLOCK_BYTES) as table:
                yield table
        except pa.ArrowException as error:
            raise DataError(f"{where} cannot be read: {' '.join(str(error).split())}") from error


@contextmanager
def seekable(file: BinaryIO) -> Iterator[BinaryIO]:
    """The file, or a copy on disk: a Parquet file is read from its end, and what is compressed cannot be."""
    if file.seekable():
        yield file
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(file, copy, BLOCK_BYTES)
        copy.seek(0)
        yield copy
