"""Parquet files as a format to be scored: columns keep their types, answers get types of their own."""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from tuneserve.errors import DataError
from tuneserve.serving.format import Answer, Chunk, answer_names

ANSWER_TYPES = {
    "label": pa.string(),
    "score": pa.float64(),
    "scores": pa.map_(pa.string(), pa.float64()),
    "tokens": pa.int32(),
    "truncated": pa.bool_(),
    "error": pa.string(),
    "model_version": pa.string(),
}

BLOCK_BYTES = 1 << 20
"""What is read of a Parquet column at once."""

GROUP_BYTES = 8 << 20
"""What the rows of a group take in memory when parts are joined; parts alone can make groups too small to read fast."""


class Parquet:
    """Columns with types. Row groups that hold no wanted row are not read."""

    def read_columns(self, file: BinaryIO, where: str) -> dict[str, str]:
        """See `Format`."""
        with _open_parquet(file, where) as table:
            columns = {str(field.name): str(field.type) for field in table.schema_arrow}
            if len(columns) < len(table.schema_arrow):
                raise DataError(f"{where}: the column names {table.schema_arrow.names} should each be there once.")
        return columns

    def read_chunks(
        self, file: BinaryIO, where: str, *, chunk_rows: int, n_bytes: int, wanted: Callable[[int], bool]
    ) -> Iterator[Chunk]:
        """See `Format`."""
        with _open_parquet(file, where) as table:
            total = table.metadata.num_rows
            batches = self._batches(table, chunk_rows, wanted)
            batch_row, batch = 0, pa.RecordBatch.from_pylist([], schema=table.schema_arrow)
            for number in range(max(1, math.ceil(total / chunk_rows))):
                row, end = number * chunk_rows, min((number + 1) * chunk_rows, total)
                share = end / total if total else 1.0
                if not wanted(number):
                    yield Chunk(None, share)
                    continue
                pieces = []
                while row < end:
                    while batch_row + batch.num_rows <= row:
                        batch_row, batch = next(batches)
                    pieces.append(batch.slice(row - batch_row, end - row))
                    row += pieces[-1].num_rows
                yield Chunk(pa.Table.from_batches(pieces, schema=table.schema_arrow), share)

    @staticmethod
    def _batches(
        table: pq.ParquetFile, chunk_rows: int, wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The rows of all groups in which a wanted chunk has a part, each batch with the number of its first row."""
        begin = 0
        for group in range(table.num_row_groups):
            row, end = begin, begin + table.metadata.row_group(group).num_rows
            if any(wanted(number) for number in range(row // chunk_rows, math.ceil(end / chunk_rows))):
                for batch in table.iter_batches(batch_size=chunk_rows, row_groups=[group]):
                    yield row, batch
                    row += batch.num_rows
            begin = end

    def texts(self, rows: pa.Table, columns: Sequence[str], text_column: str) -> list[Any]:
        """See `Format`."""
        return list(rows.column(text_column).to_pylist())

    def write(self, rows: pa.Table, columns: Sequence[str], answers: Sequence[Answer]) -> bytes:
        """See `Format`."""
        for field, name in answer_names(columns).items():
            values = [getattr(answer, field) for answer in answers]
            if field == "scores":
                values = [None if scores is None else list(scores.items()) for scores in values]
            rows = rows.append_column(name, pa.array(values, ANSWER_TYPES[field]))
        content = io.BytesIO()
        pq.write_table(rows, content)
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


@contextmanager
def _open_parquet(file: BinaryIO, where: str) -> Iterator[pq.ParquetFile]:
    try:
        # Read as it comes: by itself the library loads whole row groups, and one may be the whole file.
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=BLOCK_BYTES) as table:
            yield table
    except pa.ArrowException as error:
        raise DataError(f"{where} cannot be read: {' '.join(str(error).split())}") from error
