"""What other columns say of the test's texts, and data that are no longer what they were when a training began."""

import gzip
import logging
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from tuneserve.tables.rows import Columns
from tuneserve.training import slices
from tuneserve.training.data import Source
from tuneserve.training.slices import read_slices

COLUMNS = {
    "text": ["a film", "the food", "two words", "it was cold"],
    "label": ["good", "bad", "good", "bad"],
    "channel": ["shop", "phone", "shop", "phone"],
}
CSV = "\n".join(",".join(row) for row in zip(*([name, *values] for name, values in COLUMNS.items()), strict=True))
Write = Callable[[Path], object]


def source(file: Path) -> Source:
    return Source(Dataset.from_dict({}), str(file), files=(file,), columns=Columns("text", "label"))


def write_parquet(path: Path) -> None:
    pq.write_table(pa.table(COLUMNS), path)


def write_broken_parquet(path: Path) -> None:
    write_parquet(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff" * 60 + whole[64:])


WRITTEN: dict[str, Write] = {
    "t.csv": lambda path: path.write_text(CSV),
    "t.csv.gz": lambda path: path.write_bytes(gzip.compress(CSV.encode())),
    "t.parquet": write_parquet,
    "t.jsonl": lambda path: path.write_text(
        "\n".join(f'{{"text": "{text}", "label": "x", "channel": "{where}"}}' for text, _, where in rows())
    ),
}


def rows() -> list[tuple[str, ...]]:
    return list(zip(*COLUMNS.values(), strict=True))


@pytest.mark.parametrize("name", WRITTEN)
def test_the_values_of_another_column_stand_beside_their_texts(name: str, tmp_path: Path) -> None:
    WRITTEN[name](tmp_path / name)
    assert read_slices(source(tmp_path / name), ["THE  food", "a film", "of no file"]) == {
        "channel": ["phone", "shop", ""]
    }


CHANGED: dict[str, tuple[str, Write]] = {
    "gone": ("t.csv", lambda path: path.unlink()),
    "of another form": ("t.csv", write_parquet),
    "in another encoding": ("t.csv", lambda path: path.write_bytes(CSV.replace("cold", "kühl").encode("utf-16-be"))),
    "without its text": ("t.csv", lambda path: path.write_text(CSV.replace("text", "note"))),
    "empty": ("t.csv", lambda path: path.write_text("")),
    "ragged": ("t.csv", lambda path: path.write_text(f"{CSV}\none,too,many,cells")),
    "cut archive": ("t.csv.gz", lambda path: path.write_bytes(gzip.compress(CSV.encode() * 99)[:90])),
    "no archive": ("t.csv.gz", lambda path: path.write_text(CSV)),
    "text, not Parquet": ("t.parquet", lambda path: path.write_text(CSV)),
    "broken Parquet": ("t.parquet", write_broken_parquet),
    "cut Parquet": ("t.parquet", lambda path: path.write_bytes(b"PAR1")),
    "numbers, not records": ("t.jsonl", lambda path: path.write_text("1\n2\n3")),
    "nested without end": ("t.jsonl", lambda path: path.write_text("[" * 99_999)),
}


@pytest.mark.parametrize("how", CHANGED)
def test_a_file_that_changed_meanwhile_is_a_warning(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name, change = CHANGED[how]
    (file := tmp_path / name).parent.mkdir(exist_ok=True)
    WRITTEN[name](file)
    change(file)
    with caplog.at_level(logging.WARNING):
        assert read_slices(source(file), COLUMNS["text"]) == {}
    assert "other columns of the data cannot be read" in caplog.text


@pytest.mark.parametrize(
    "error", [ValueError, UnicodeDecodeError, KeyError, MemoryError, RecursionError, pa.ArrowInvalid]
)
def test_whatever_a_reader_raises_is_a_warning(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*about: object) -> None:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "what") if error is UnicodeDecodeError else error("what")

    WRITTEN["t.csv"](tmp_path / "t.csv")
    monkeypatch.setattr(slices, "read_values", fail)
    assert read_slices(source(tmp_path / "t.csv"), COLUMNS["text"]) == {}
    assert "other columns of the data cannot be read" in caplog.text
