"""Arrow: the files that `datasets` writes with save_to_disk, as a stream, and those of `pyarrow.ipc.new_file`."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, BinaryIO

import pyarrow as pa

from tuneserve.errors import DataError
from tuneserve.tables import Answer, Chunk, Wanted
from tuneserve.tables.parquet import append_answers, column_values, seekable, typed_columns

FILE_MARK = b"ARROW1"
"""How a file begins that is no stream."""


class Arrow:
    """Columns with types, and in their schema the names of classes."""

    def read_columns(self, file: BinaryIO, where: str) -> list[tuple[str, str]]:
        """See `Format`."""
        with _open(file, where) as (schema, _):
            return typed_columns(schema, where)

    def read_chunks(
        self, file: BinaryIO, where: str, *, chunk_rows: int, wanted: Wanted, columns: Sequence[str] | None = None
    ) -> Iterator[Chunk]:
        """See `Format`."""
        with _open(file, where) as (schema, batches):
            names = schema.names if columns is None else list(dict.fromkeys(columns))
            kept = pa.schema([schema.field(name) for name in names], metadata=schema.metadata)
            pieces, row = _cut(batches, chunk_rows), 0
            for number in count():
                batch = next(pieces, [])
                if number and not batch:
                    return
                rows = pa.Table.from_batches([one.select(names) for one in batch], schema=kept)
                numbers = range(row + 1, row + rows.num_rows + 1)
                row += rows.num_rows
                yield Chunk(rows, numbers, where) if wanted(number) else Chunk(None, (), where)

    def values(self, chunk: Chunk, columns: Sequence[str], name: str) -> list[Any]:
        """See `Format`."""
        return column_values(chunk, name)

    def write(self, chunk: Chunk, columns: Sequence[str], answers: Sequence[Answer]) -> bytes:
        """See `Format`."""
        table = append_answers(chunk.rows, columns, answers)
        content = pa.BufferOutputStream()
        with pa.ipc.new_stream(content, table.schema) as writer:
            writer.write_table(table)
        return bytes(content.getvalue())

    def join(self, parts: Iterable[bytes], columns: Sequence[str], file: BinaryIO) -> None:
        """See `Format`."""
        tables = (pa.ipc.open_stream(part).read_all() for part in parts)
        first = next(tables)
        with pa.ipc.new_stream(file, first.schema) as writer:
            writer.write_table(first)
            for table in tables:
                writer.write_table(table)


def _cut(batches: Iterator[pa.RecordBatch], chunk_rows: int) -> Iterator[list[pa.RecordBatch]]:
    """The rows of all batches, so many at once."""
    held: list[pa.RecordBatch] = []
    room = chunk_rows
    for batch in batches:
        begin = 0
        while begin < batch.num_rows:
            held.append(batch.slice(begin, room))
            begin, room = begin + held[-1].num_rows, room - held[-1].num_rows
            if not room:
                yield held
                held, room = [], chunk_rows
    if held:
        yield held


@contextmanager
def _open(file: BinaryIO, where: str) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    with seekable(file) as whole:
        begin = whole.read(len(FILE_MARK))
        whole.seek(0)
        try:
            if begin == FILE_MARK:
                table = pa.ipc.open_file(whole)
                yield table.schema, (table.get_batch(number) for number in range(table.num_record_batches))
            else:
                stream = pa.ipc.open_stream(whole)
                yield stream.schema, iter(stream)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the content
                raise
            raise DataError(f"{where} cannot be read: {' '.join(str(error).split())}") from error
