"""Every format with every compression, through training's reading and through scoring, and what is said of faults."""

import gzip
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tabular import COMPRESS, read, write

from tuneserve.errors import DataError, SettingsError
from tuneserve.scoring.input import Input
from tuneserve.scoring.job import score_rows
from tuneserve.scoring.output import Output
from tuneserve.tables import Answer, Chunk, cut, streams
from tuneserve.tables.formats import FORMATS
from tuneserve.tables.rows import Columns, read_file
from tuneserve.tasks.classifier import Prediction
from tuneserve.training import data

ROWS = [{"id": f"{number:02}", "text": f'"film" {number},\n\tü', "label": f"l{number % 2}"} for number in range(11)]


def score(source: Path, output: Path) -> None:
    rows = Input(str(source), text_column="text")
    parts = Output(str(output), rows, shard=0, shards=1)
    score_rows(rows, parts, predict, model_version="v", chunk_rows=4)


def predict(texts: Sequence[str]) -> list[Prediction]:
    fields = {"label": "good", "scores": {"bad": 0.25, "good": 0.75}, "truncated": False, "model_version": "v"}
    return [Prediction(tokens=len(text), **fields) for text in texts]


def labelled(path: Path, cache: Path) -> list[tuple[str, str]]:
    rows = data.read(str(path), Columns(), cache=cache)["train"].rows
    return list(zip(rows["text"], rows["label"], strict=True))


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_is_read_for_training_and_scored_whatever_its_compression(
    ending: str, compression: str, tmp_path: Path
) -> None:
    source = write(tmp_path / f"in{ending}{compression}", ROWS)
    assert labelled(source, tmp_path / "cache") == [(row["text"], row["label"]) for row in ROWS]
    output = tmp_path / f"out{ending}{compression}"
    score(source, output)
    found = read(output)
    assert [{name: row[name] for name in ROWS[0]} for row in found] == ROWS
    assert [(row["predicted_label"], int(row["tokens"])) for row in found] == [
        ("good", len(row["text"])) for row in ROWS
    ]
    score(source, tmp_path / "parts")
    parts = sorted((tmp_path / "parts").glob(f"part-*{ending}{compression}"))
    assert [row["id"] for part in parts for row in read(part)] == [row["id"] for row in ROWS]
    assert len(parts) == 3


@pytest.mark.parametrize("compression", [one for one in COMPRESS if one])
@pytest.mark.parametrize("ending", [".csv", ".parquet"])
@pytest.mark.parametrize("damage", ["ends too early", "is none"])
def test_a_damaged_archive_is_named(compression: str, ending: str, damage: str, tmp_path: Path) -> None:
    source = write(tmp_path / f"in{ending}{compression}", ROWS)
    source.write_bytes(source.read_bytes()[:-9] if damage == "ends too early" else b"words, and no archive")
    for use in (lambda: labelled(source, tmp_path / "cache"), lambda: score(source, tmp_path / "out")):
        with pytest.raises(DataError, match="the archive is damaged") as caught:
            use()
        assert str(source) in str(caught.value)


def test_an_archive_of_several_streams_is_read_to_its_end(tmp_path: Path) -> None:
    half, other = b"text,label\na,x\n", b"b,y\n"
    for compression in [one for one in COMPRESS if one]:
        source = tmp_path / f"in.csv{compression}"
        source.write_bytes(COMPRESS[compression](half) + COMPRESS[compression](other))
        assert labelled(source, tmp_path / "cache") == [("a", "x"), ("b", "y")]


def test_the_output_is_compressed_as_the_input_or_a_folder(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv.gz", ROWS)
    for name in ("out.csv", "out.csv.xz", "out.json.gz"):
        with pytest.raises(SettingsError, match=r"should end with \.csv\.gz"):
            score(source, tmp_path / name)


def test_a_folder_with_compressed_splits_is_read(tmp_path: Path) -> None:
    (tmp_path / "reviews").mkdir()
    write(tmp_path / "reviews" / "train.csv.gz", ROWS)
    write(tmp_path / "reviews" / "test.json.zst", ROWS[:2])
    found = data.read(str(tmp_path / "reviews"), Columns(), cache=tmp_path / "cache")
    assert {split: len(source.rows) for split, source in found.items()} == {"train": 11, "test": 2}


@pytest.mark.parametrize(
    ("name", "plain", "words"),
    [
        ("a.csv", b"text,label\na,x\nb\n", "row 3: 1 fields where the header has 2."),
        ("a.tsv", b"text\tlabel\na\tx\nb\n", "row 3: 1 fields where the header has 2."),
        ("a.csv", b"text;label\na;x\n", "row 1: columns are separated by ';'"),
        ("a.csv", b"text,text\na,x\n", "row 1: the column names ['text', 'text']"),
        ("a.csv", b'text,label\na,x\n"b,y\n', "line 3: unexpected end of data (is a quote missing?)"),
        ("a.csv", b"text,label\na,x\n\xe9,y\n", "line 3: byte 0xe9 is not UTF-8"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "\xe9"}\n', "line 2: byte 0xe9 is not UTF-8"),
        ("a.json", b'[{"text": "a", "label": 1},\n{"text": "\xe9"}]\n', "line 2: byte 0xe9 is not UTF-8"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text":\n', "line 2: Expecting value."),
        ("a.json", b'[{"text": "a", "label": 1},\n{"text":}]\n', "line 2: Expecting value."),
        ("a.json", b'\n [{"text": "a", "label": 1},\n\n7]', "line 2: 7 is no record with named fields."),
        ("a.jsonl", b'{"text": "a", "label": 1}\n7', "line 2: 7 is no record with named fields."),
    ],
)
@pytest.mark.parametrize("compression", COMPRESS)
def test_a_fault_is_told_in_the_same_words_for_training_and_scoring(
    name: str, plain: bytes, words: str, compression: str, tmp_path: Path
) -> None:
    source = tmp_path / f"{name}{compression}"
    source.write_bytes(COMPRESS[compression](plain))
    messages = []
    for use in (lambda: labelled(source, tmp_path / "cache"), lambda: score(source, tmp_path / "out")):
        with pytest.raises(DataError) as caught:
            use()
        messages.append(str(caught.value).removeprefix("INPUT="))
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"{source}, {words}")


def test_an_array_without_records_is_an_array_when_scored(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text("[]")
    score(tmp_path / "in.json", tmp_path / "out.json")
    assert read(tmp_path / "out.json") == []


class Words:
    """A format of one module: a text and its label a line, with a bar between them."""

    def read_columns(self, file: BinaryIO, where: str) -> list[tuple[str, str]]:
        return [("text", "text"), ("label", "text")]

    def read_chunks(self, file: BinaryIO, where: str, *, chunk_rows: int, wanted: Any, columns: Any = None) -> Any:
        lines: Iterator[tuple[int, str]] = enumerate((line.decode().strip() for line in file), start=1)
        return cut(lines, where, chunk_rows, wanted)

    def values(self, chunk: Chunk, columns: Sequence[str], name: str) -> list[str]:
        return [line.split("|")[columns.index(name)] for line in chunk.rows]

    def write(self, chunk: Chunk, columns: Sequence[str], answers: Sequence[Answer]) -> bytes:
        return "".join(f"{row}|{one.label}\n" for row, one in zip(chunk.rows, answers, strict=True)).encode()

    def join(self, parts: Any, columns: Sequence[str], file: BinaryIO) -> None:
        for part in parts:
            file.write(part)


def test_a_new_format_is_a_class_and_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(FORMATS, ".words", Words())
    source = tmp_path / "in.words.gz"
    source.write_bytes(gzip.compress(b"a film|x\nanother|y\n"))
    assert labelled(source, tmp_path / "cache") == [("a film", "x"), ("another", "y")]
    score(source, tmp_path / "out.words.gz")
    assert gzip.decompress((tmp_path / "out.words.gz").read_bytes()) == b"a film|x|good\nanother|y|good\n"


LONG = {
    "a.csv": (b"text,label\nfine,good\n", b",good\n", "row 3"),
    "b.csv": (b'text,label\n"', b'",good\n', "row 2"),
    "c.csv": (b"", b"", "row 1"),
    "a.tsv": (b"text\tlabel\n", b"\tgood\n", "row 2"),
    "b.tsv": (b'text\tlabel\n"', b'"\tgood\n', "row 2"),
    "a.jsonl": (b'{"text": "fine", "label": "good"}\n{"text": "', b'", "label": "good"}\n', "line 2"),
    "a.json": (b'[{"text": "fine", "label": "good"}, {"text": "', b'", "label": "good"}]', "record 2"),
    "b.json": (b"[", b"]", "record 1"),
}
FILLINGS = {"b.csv": b"a" * 63 + b"\n", "b.tsv": b"a" * 63 + b"\n", "b.json": b" "}


@pytest.mark.parametrize("name", LONG)
def test_a_row_that_does_not_end_is_refused_in_little_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MAX_ROW_CHARACTERS", 1 << 20)
    begin, end, where = LONG[name]
    path = tmp_path / f"{name}.gz"
    filling = (FILLINGS.get(name, b"a") * (1 << 19))[: 1 << 19]
    with gzip.open(path, "wb", 1) as file:
        file.write(begin + b"".join([filling] * 64) + end)
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            list(read_file(path, "f", lambda _: Columns("text", "label")))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"f, {where} has more than 1048576 characters")
    assert most < 24 << 20


@pytest.mark.parametrize(("name", "count"), [("a.csv", 999), ("b.csv", 15), ("a.tsv", 999), ("a.jsonl", 970)])
def test_rows_are_bounded_one_by_one_and_a_long_one_below_the_bound_is_read(
    name: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MAX_ROW_CHARACTERS", 1020)
    begin, end, _ = LONG[name]
    filling = FILLINGS.get(name, b"a")
    row = begin.splitlines(keepends=True)[-1] if name[0] == "b" or "json" in name else b""
    (tmp_path / name).write_bytes(begin[: len(begin) - len(row)] + (row + filling * count + end) * 20)
    rows = list(read_file(tmp_path / name, "f", lambda _: Columns("text", "label")))
    assert [len(text) for _, text, _ in rows][-20:] == [len(filling) * count] * 20


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize(
    ("kind", "where"),
    [
        (pa.string(), "f, row 3 has"),
        (pa.large_string(), "f, row 3 has"),
        (pa.dictionary(pa.int8(), pa.string()), "f has"),
    ],
)
def test_a_text_among_columns_with_types_is_bounded_too(
    name: str, kind: pa.DataType, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MAX_ROW_CHARACTERS", 100)

    def read(longest: str) -> list[str]:
        texts = ["a film", None, longest, "another"]
        table = pa.table({"text": pa.array(texts, kind), "label": ["good", "bad", "good", "bad"]})
        if name == "a.parquet":
            pq.write_table(table, tmp_path / name)
        else:
            with pa.OSFile(str(tmp_path / name), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
        return [text for _, text, _ in read_file(tmp_path / name, "f", lambda _: Columns("text", "label"))]

    assert "é" * 100 in read("é" * 100)
    with pytest.raises(DataError, match=f"^{where} more than 100 characters"):
        read("é" * 101)


def test_a_text_in_a_file_of_its_own_is_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_ROW_CHARACTERS", 100)
    for label in ("good", "bad"):
        write_text = (tmp_path / "train" / label / "1.txt").write_text
        (tmp_path / "train" / label).mkdir(parents=True)
        write_text("a" * 101)
    with pytest.raises(DataError, match=r"bad/1\.txt has more than 100 characters"):
        labelled(tmp_path, tmp_path / "cache")


@pytest.mark.parametrize(("name", "begin"), [("a.csv", "text,label\n"), ("a.tsv", "text\tlabel\n"), ("a.jsonl", "")])
def test_blank_lines_are_not_kept(name: str, begin: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(f"{begin}{chr(10) * (1 << 17)}")
    tracemalloc.start()
    try:
        assert not list(read_file(tmp_path / name, "f", lambda _: Columns("text", "label")))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 6 << 20  # blocks of the file; lists for the lines alone would take 7 MiB
