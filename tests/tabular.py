"""Tables in every format and compression, written and read by other code than what is tested."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}
EXPAND: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": lambda content: pa.CompressedInputStream(pa.BufferReader(content), "zstd").read(),
}


def write(path: Path, rows: Sequence[Row]) -> Path:
    """Rows as a file of the kind that its name says, with folders above it."""
    ending, compression = [*path.suffixes, ""][:2]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(COMPRESS[compression](_content(rows, ending)))
    return path


def _content(rows: Sequence[Row], ending: str) -> bytes:
    if ending == ".parquet":
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(list(rows)), file, row_group_size=7)
        return file.getvalue()
    if ending == ".arrow":
        file, table = io.BytesIO(), pa.Table.from_pylist(list(rows))
        with pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=7)
        return file.getvalue()
    if ending == ".json":
        return json.dumps(list(rows), indent=1).encode()
    if ending == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), delimiter="\t" if ending == ".tsv" else ",")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode()


def read(path: Path) -> list[Row]:
    """The rows of a file, with the answers' types undone where the format has none."""
    ending, compression = [*path.suffixes, ""][:2]
    return parse(EXPAND[compression](path.read_bytes()), ending)


def parse(content: bytes, ending: str) -> list[Row]:
    """The rows of a file's content, not compressed."""
    if ending in (".parquet", ".arrow"):
        table = pq.read_table(io.BytesIO(content)) if ending == ".parquet" else pa.ipc.open_stream(content).read_all()
        rows = table.to_pylist()
        return [row | {"scores": dict(row["scores"]) if row["scores"] is not None else None} for row in rows]
    if ending == ".json":
        return list(json.loads(content))
    if ending == ".jsonl":
        return [json.loads(line) for line in content.decode().split("\n") if line]
    table = csv.DictReader(
        io.StringIO(content.decode(), newline=""), delimiter="\t" if ending == ".tsv" else ",", strict=True
    )
    typed = ("score", "scores", "tokens", "truncated", "abstain")
    empty = ("label", "error", *typed)
    return [
        {
            name: None if name in empty and not cell else json.loads(cell) if name in typed else cell
            for name, cell in row.items()
        }
        for row in table
    ]
