"""Labelled texts from files, folders, URLs and a hub, and what is said of those that cannot be read."""

import csv
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from tuneserve.errors import DataError, StoreError
from tuneserve.tables.rows import Columns
from tuneserve.training.data import read

Rows = list[tuple[str, str]]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_lines(path: Path, *records: Any) -> Path:
    return write(path, "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records))


def write_parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def rows(dataset: Path | str, cache: Path, *, split: str = "train", text: str = "", label: str = "") -> Rows:
    source = read(str(dataset), Columns(text, label), cache=cache)[split]
    return [(text or "", label or "") for text, label in zip(source.rows["text"], source.rows["label"], strict=True)]


def refusal(dataset: Path | str, cache: Path, *, text: str = "", label: str = "") -> str:
    """The message of a data set that is refused: one line that names it."""
    with pytest.raises(DataError) as caught:
        read(str(dataset), Columns(text, label), cache=cache)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(dataset) in message
    return message


def test_the_sample_has_two_classes_and_a_test_of_its_own(cache: Path) -> None:
    assert set(read("sample", Columns(), cache=cache)) == {"train", "test"}
    assert {label for _, label in rows("sample", cache)} == {"negative", "positive"}


STRANGE = [
    'She said "never", twice.',
    "one line\nand another",
    "one line\r\nand another",
    "commas, and;semicolons\tand tabs",
    "a next line\u0085inside, and a line separator\u2028too",
    "naïve — 好 🙂",
    "  spaces around  ",
    "'single",
    "back\\slash",
    "NA",
    "null",
    "None",
    "NaN",
    "n/a",
    "1",
    "1.0",
    "007",
    "true",
    "",
    "long " * 40_000,
]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_every_text_comes_out_as_it_went_in(ending: str, tmp_path: Path, cache: Path) -> None:
    expected = [(text, f"label {number % 2}") for number, text in enumerate(STRANGE)]
    path = tmp_path / f"reviews{ending}"
    records = [{"text": text, "label": label} for text, label in expected]
    if ending == ".parquet":
        write_parquet(path, text=[text for text, _ in expected], label=[label for _, label in expected])
    elif ending == ".jsonl":
        write_lines(path, *records)
    elif ending == ".json":
        write(path, json.dumps(records))
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter="\t" if ending == ".tsv" else ",").writerows([("text", "label"), *expected])
    assert rows(path, cache) == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "\ufefftext,label,id\ngood,x,1\n"),
        ("a.csv", "text,label\r\ngood,x\r\n"),
        ("a.csv", "text,label\ngood,x"),
        ("a.csv", '"text","label"\n"good","x"\n'),
        ("a.csv", "label,text\nx,good\n"),
        ("a.csv", "text,label\n\ngood,x\n\n"),
        ("a.CSV", "text,label\ngood,x\n"),
        ("a.csv", ",text,label\n0,good,x\n"),  # as pandas writes its index
        ("a.jsonl", '\ufeff{"text": "good", "label": "x"}\n'),
        ("a.jsonl", '{"label": "x", "text": "good", "stars": [5]}\n'),
        ("a.csv", "text, label\ngood, x \n"),
        ("a.jsonl", '{"text": "good", "label": " x\\n"}\n'),
    ],
)
def test_files_as_other_programs_write_them_are_read(name: str, content: str, tmp_path: Path, cache: Path) -> None:
    assert rows(write(tmp_path / name, content), cache) == [("good", "x")]


@pytest.mark.parametrize(
    ("label", "spelled"),
    [
        (pa.array([1, 0, 12]), ["1", "0", "12"]),
        (pa.array([1, None, 3]), ["1", "", "3"]),
        (pa.array([1.0, None, 3.0]), ["1", "", "3"]),
        (pa.array([1.0, float("nan"), 3.0]), ["1", "", "3"]),
        (pa.array([0.5, 1.0, -2.0]), ["0.5", "1", "-2"]),
        (pa.array([True, False, True]), ["True", "False", "True"]),
        (pa.array(["b", "a", None]), ["b", "a", ""]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), ["b", "a", "b"]),
        (pa.array(["b", "a", "b"], pa.large_string()), ["b", "a", "b"]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_labels_of_every_kind_become_words(label: Any, spelled: list[str], tmp_path: Path, cache: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=["one", "two", "three"], label=label)
    assert rows(path, cache) == list(zip(["one", "two", "three"], spelled, strict=True))


def test_gaps_do_not_turn_the_whole_numbers_of_a_jsonl_file_into_fractions(tmp_path: Path, cache: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "a", "label": 1}, {"text": "b"}, {"text": None, "label": 2})
    assert rows(path, cache) == [("a", "1"), ("b", ""), ("", "2")]


def test_a_field_that_the_first_record_of_a_jsonl_file_lacks_is_still_found(tmp_path: Path, cache: Path) -> None:
    records = [{"id": 1, "text": "a"}, {"id": 2, "text": "b", "label": "x"}]
    assert rows(write_lines(tmp_path / "a.jsonl", *records), cache) == [("a", ""), ("b", "x")]


def test_class_labels_are_read_by_their_names(tmp_path: Path, cache: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    path = tmp_path / "a.parquet"
    Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features).to_parquet(path)
    assert rows(path, cache) == [("a", "positive"), ("b", "negative"), ("c", "")]


@pytest.mark.parametrize(
    ("header", "text", "label", "found"),
    [
        ("id,text,label", "", "", ("B", "C")),
        ("Sentiment,extra,Review", "", "", ("C", "A")),
        ("intent,query", "", "", ("B", "A")),
        ("sentence,stars", "", "", ("A", "B")),
        ("text,label,sentiment", "", "sentiment", ("A", "C")),
        ("text,review,label", "review", "", ("B", "C")),
        ("a,b,c", "c", "a", ("C", "A")),
        ("a,b", "b", "", ("B", "A")),
        ("a,b", "", "b", ("A", "B")),
        ("text,label", "label", "text", ("B", "A")),
        ("sentiment,label", "sentiment", "", ("A", "B")),
        ("text,label,note", "note", "label", ("C", "B")),
    ],
)
def test_columns_are_found_or_named(
    header: str, text: str, label: str, found: tuple[str, str], tmp_path: Path, cache: Path
) -> None:
    cells = "ABC"[: header.count(",") + 1]
    path = write(tmp_path / "a.csv", f"{header}\n{','.join(cells)}\n")
    assert rows(path, cache, text=text, label=label) == [found]


@pytest.mark.parametrize(
    ("header", "text", "label", "words"),
    [
        ("id,note,label", "", "", "which column holds the text; its columns are id, note, label. Set TEXT_COLUMN"),
        ("text,review,label", "", "", "which column holds the text; its columns are text, review, label"),
        ("text,label,sentiment", "", "", "which column holds the label; its columns are text, label, sentiment"),
        ("a,b", "", "", "holds the text and does not say which column holds the label; its columns are a, b"),
        (
            "a,b",
            "c",
            "",
            "has no column 'c' and does not say which column holds the label; its columns are a, b. Set "
            "TEXT_COLUMN and LABEL_COLUMN",
        ),
        ("text", "", "", "which column holds the label; its columns are text. Set LABEL_COLUMN"),
        ("text,label", "texts", "", "has no column 'texts'; its columns are text, label. Set TEXT_COLUMN"),
        ("text,label", "", "lable", "has no column 'lable'; its columns are text, label. Set LABEL_COLUMN"),
        ("text,label", "text", "text", "the same column"),
    ],
)
def test_columns_that_cannot_be_told_are_refused_with_their_names(
    header: str, text: str, label: str, words: str, tmp_path: Path, cache: Path
) -> None:
    path = write(tmp_path / "a.csv", f"{header}\n{','.join('ABC'[: header.count(',') + 1])}\n")
    assert words in refusal(path, cache, text=text, label=label)


@pytest.mark.parametrize("kind", ["text", "label"])
def test_a_column_without_one_value_a_row_is_refused(kind: str, tmp_path: Path, cache: Path) -> None:
    record = {"text": "good", "label": "x"} | {kind: ["several", "values"]}
    message = refusal(write_lines(tmp_path / "a.jsonl", record, record), cache)
    assert f"the column '{kind}' holds lists or records" in message


def test_labels_of_several_kinds_in_one_column_become_words(tmp_path: Path, cache: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "a", "label": 1}, {"text": "b", "label": " unknown "})
    assert rows(path, cache) == [("a", "1"), ("b", "unknown")]


def test_bytes_are_not_taken_for_text(tmp_path: Path, cache: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=pa.array([b"good", b"bad"]), label=["x", "y"])
    assert "column 'text'" in refusal(path, cache)


# Each: a file's name, its content, and what the message must say beside the path.
UNREADABLE = {
    "no content": ("a.csv", "", "is empty"),
    "no content, JSONL": ("a.jsonl", "", "is empty"),
    "blank lines": ("a.csv", "\n\n", "row 1"),
    "blank lines, JSONL": ("a.jsonl", "\n\n", "no rows"),
    "header only": ("a.csv", "text,label\n", "no rows"),
    "a name twice": ("a.csv", "text,text,label\na,b,c\n", "row 1: the column names ['text', 'text', 'label']"),
    "a row too long": ("a.csv", "text,label\na,x\nb,y,z\n", "row 3: 3 fields where the header has 2"),
    "a row too short": ("a.csv", "text,label\na,x\nb\n", "row 3: 1 fields where the header has 2"),
    "every row too long": ("a.csv", "text,label\na,x,1\nb,y,2\n", "row 2"),
    "a comma behind every row": ("a.csv", "text,label\na,x,\nb,y,\n", "row 2"),
    "a quote that never closes": (
        "a.csv",
        'text,label\na,x\n"b,y\n',
        "line 3: unexpected end of data (is a quote missing?)",
    ),
    "Latin-1": ("a.csv", b"text,label\na,x\ncaf\xe9,y\n", "line 3: byte 0xe9 is not UTF-8; save the file as UTF-8"),
    "Latin-1, JSONL": ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "\xe9"}\n', "line 2: byte 0xe9"),
    "half a character": ("a.csv", b"text,label\na,x\nb\xc3", "line 3: byte 0xc3"),
    "half a character far in": ("a.csv", b"text,label\n" + b"a,x\n" * 400_000 + b"\xff", "line 400002: byte 0xff"),
    "UTF-16": ("a.csv", "text,label\na,x\n".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
    "half a record": ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label":\n', "line 2: Expecting value"),
    "no record": ("a.jsonl", '{"text": "a", "label": 1}\nwords\n{"text": "b", "label": 2}\n', "line 2"),
    "no record in an array": ("a.json", '[\n{"text": "a", "label": 1},\nwords\n]', "line 3"),
    "half a surrogate pair": ("a.jsonl", '{"text": "\\ud800", "label": 1}\n', "row 1: half a surrogate pair"),
    "numbers": ("a.jsonl", "1\n2\n", "line 1: 1 is no record with named fields"),
    "no Parquet": ("a.parquet", "words, and no table", "not a parquet file"),
    "another kind of file": ("a.txt", "words", "cannot read .txt; use .csv, .tsv, .jsonl, .json, .parquet"),
    "no ending": ("reviews", "words", "cannot read a file without an ending; use .csv"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_file_that_cannot_be_read_is_refused_with_its_row(kind: str, tmp_path: Path, cache: Path) -> None:
    name, content, words = UNREADABLE[kind]
    assert words in refusal(write(tmp_path / name, content), cache)


def test_a_parquet_file_without_rows_is_refused(tmp_path: Path, cache: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=pa.array([], pa.string()), label=pa.array([], pa.string()))
    assert "no rows" in refusal(path, cache)


def test_rows_are_numbered_as_their_author_counts(tmp_path: Path, cache: Path) -> None:
    table = write(tmp_path / "a.csv", 'text,label\n"one\ntext",x\nanother,y\n')
    lines = write_lines(tmp_path / "a.jsonl", {"text": "one", "label": "x"})
    assert read(str(table), Columns(), cache=cache)["train"].locate(1) == f"{table}, row 3"  # row 1 is the header
    assert read(str(lines), Columns(), cache=cache)["train"].locate(0) == f"{lines}, row 1"


@pytest.mark.parametrize("valid", ["valid.csv", "validation.csv", "dev.tsv", "dev.jsonl"])
def test_a_folder_gives_its_splits(valid: str, tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "reviews"
    write(folder / "README.md", "not data")
    write(folder / "other.csv", "not,a,split\n")
    write(folder / "train.csv", "text,label\ntrain,x\n")
    write_parquet(folder / "test.parquet", text=["test"], label=["x"])
    separator = "\t" if valid.endswith(".tsv") else ","
    record = {"text": "valid", "label": "x"}
    write(folder / valid, json.dumps(record) if valid.endswith("l") else f"text{separator}label\nvalid{separator}x\n")
    sources = read(str(folder), Columns(), cache=cache)
    assert {split: source.rows["text"][:] for split, source in sources.items()} == {
        "train": ["train"],
        "valid": ["valid"],
        "test": ["test"],
    }
    assert sources["test"].where == str(folder / "test.parquet")


def test_a_folder_with_training_texts_alone_will_do(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "reviews" / "train.csv", "text,label\na,x\n")
    assert set(read(str(path.parent), Columns(), cache=cache)) == {"train"}


@pytest.mark.parametrize("pair", [("valid.csv", "dev.csv"), ("test.csv", "test.jsonl"), ("train.csv", "train.tsv")])
def test_two_files_for_one_split_are_refused(pair: tuple[str, str], tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "reviews"
    for name in {"train.csv", *pair}:
        write(folder / name, "text,label\na,x\n")
    message = refusal(folder, cache)
    assert all(name in message for name in pair)


def test_splits_in_the_folder_of_one_are_the_data_set_or_refused(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "channels"
    for name in ("train", "validation", "test"):
        write(folder / "train" / f"{name}.csv", f"text,label\n{name},x\n")
    write(folder / "train-manifest", "[]")
    sources = read(str(folder), Columns(), cache=cache)
    assert {split: source.rows["text"][:] for split, source in sources.items()} == {
        "train": ["train"],
        "valid": ["validation"],
        "test": ["test"],
    }
    write(folder / "test" / "part-0.csv", "text,label\na,x\n")
    assert "train/test.csv is named as another split's" in refusal(folder, cache)
    write(tmp_path / "other" / "train" / "part-0.csv", "text,label\na,x\n")
    write(tmp_path / "other" / "train" / "part-1.csv", "text,label\nb,x\n")
    assert read(str(tmp_path / "other"), Columns(), cache=cache)["train"].rows["text"][:] == ["a", "b"]


def test_parts_of_a_split_are_read_together_and_each_row_keeps_its_number(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "reviews"
    write(folder / "train.csv", "text,label\na,x\nb,y\n")
    write(folder / "train-2026-11.jsonl", json.dumps({"text": "c", "label": "x"}))
    source = read(str(folder), Columns(), cache=cache)["train"]
    assert sorted(source.rows["text"][:]) == ["a", "b", "c"]
    places = {source.rows[index]["text"]: source.locate(index) for index in range(3)}
    assert places["b"] == f"{folder / 'train.csv'}, row 3"
    assert places["c"] == f"{folder / 'train-2026-11.jsonl'}, row 1"


def test_a_folder_without_a_training_file_is_refused(tmp_path: Path, cache: Path) -> None:
    write(tmp_path / "reviews" / "test.csv", "text,label\na,x\n")
    assert "without a train file" in refusal(tmp_path / "reviews", cache)


def test_a_parquet_file_that_breaks_its_own_rules_is_refused(tmp_path: Path, cache: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    schema = features.arrow_schema
    pq.write_table(pa.table({"text": ["a", "b"], "label": [0, 7]}, schema=schema), tmp_path / "label.parquet")
    assert "class label 7" in refusal(tmp_path / "label.parquet", cache)
    offsets = pa.array([0, 1], pa.int32()).buffers()[1]
    latin_1 = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xe9")])
    assert "0xe9" in refusal(write_parquet(tmp_path / "text.parquet", text=latin_1, label=["x"]), cache)


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "/no/such.csv", "./reviews", "../reviews.csv", "~/x", "x.jsonl", f"/{'x' * 300}"]
)
def test_a_path_to_nothing_is_refused(name: str, cache: Path) -> None:
    assert "there is no such file or folder" in refusal(name, cache)


def test_a_file_that_changed_is_read_anew(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\none,x\n")
    assert rows(path, cache) == [("one", "x")]
    write(path, "text,label\ntwo,x\n")
    assert rows(path, cache) == [("two", "x")]


def test_a_file_replaced_by_one_of_the_same_age_is_read_anew(tmp_path: Path, cache: Path) -> None:
    """As `cp -p`, `rsync -t` and archives do, whose files all carry one date."""
    path = write(tmp_path / "a.csv", "text,label\none,x\n")
    date = path.stat().st_mtime_ns
    assert rows(path, cache) == [("one", "x")]
    write(path, "text,label\ntwo,x\n")
    os.utime(path, ns=(date, date))
    assert rows(path, cache) == [("two", "x")]


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,label\none,x\n")
    for dataset in (str(path), f"file://{path}"):
        with pytest.raises(StoreError, match=r"DATA_PATH=.*: .*Not a directory"):
            read(dataset, Columns(), cache=write(tmp_path / "file", ""))


@pytest.fixture
def memory() -> Any:
    files = fsspec.filesystem("memory")
    files.store.clear()
    return files


def test_a_url_of_any_file_system_is_read_and_read_anew(memory: Any, cache: Path) -> None:
    for text in ("one", "two"):
        memory.pipe("/bucket/reviews.csv", f"text,label\n{text},x\n".encode())
        assert rows("memory://bucket/reviews.csv", cache) == [(text, "x")]
        memory.pipe("/bucket/folder/train.csv", f"text,label\n{text},x\n".encode())
        memory.pipe("/bucket/folder/test.jsonl", b'{"text": "test", "label": "x"}')
        memory.pipe("/bucket/folder/notes.txt", b"none of ours")
        assert rows("memory://bucket/folder", cache) == [(text, "x")]
        assert rows("memory://bucket/folder", cache, split="test") == [("test", "x")]


def test_a_file_url_is_read(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "reviews" / "train.csv", "text,label\none,x\n")
    assert rows(f"file://{path}", cache) == [("one", "x")]
    assert rows(f"file://{path.parent}", cache) == [("one", "x")]


def test_an_http_url_is_read_and_read_anew(web: tuple[str, Path], cache: Path) -> None:
    address, folder = web
    for text in ("one", "two"):
        write(folder / "reviews.csv", f"text,label\n{text},x\n")
        assert rows(f"{address}/reviews.csv", cache) == [(text, "x")]
        assert rows(f"{address}/reviews.csv?download=1", cache) == [(text, "x")]


def test_a_url_to_nothing_is_refused(web: tuple[str, Path], memory: Any, tmp_path: Path, cache: Path) -> None:
    address, _ = web
    for url in (f"{address}/no.csv", "memory://no.csv", f"file://{tmp_path}/no.csv"):
        message = refusal(url, cache)
        assert "cannot be fetched" in message
        assert "install" not in message
    assert "Protocol not known: odd" in refusal("odd://bucket/a.csv", cache)
    assert list((cache / "downloads").iterdir()) == []


def test_a_web_server_that_is_not_there_is_refused(cache: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert "onnect" in refusal(f"http://127.0.0.1:{closed.getsockname()[1]}/a.csv", cache)


def test_what_is_wrong_with_a_file_behind_a_url_is_told_with_the_url(memory: Any, cache: Path) -> None:
    memory.pipe("/bucket/reviews.csv", b"id,note\n1,a\n")
    assert "its columns are id, note" in refusal("memory://bucket/reviews.csv", cache)
    memory.pipe("/bucket/reviews.csv", b"text,label\na,x\nb\n")
    assert "row 3" in refusal("memory://bucket/reviews.csv", cache)


def test_a_url_to_another_kind_of_file_is_refused_by_its_own_name(memory: Any, cache: Path) -> None:
    memory.pipe("/bucket/reviews.txt", b"words")
    assert "cannot read .txt" in refusal("memory://bucket/reviews.txt", cache)
    memory.pipe("/bucket/folder/test.csv", b"text,label\na,x\n")
    assert "without a train file" in refusal("memory://bucket/folder", cache)


def test_a_file_is_read_without_a_word_to_the_network(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise AssertionError("the network is asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "socket", refuse)
    path = write(tmp_path / "a.csv", "text,label\none,x\n")
    assert rows(path, cache) == [("one", "x")]


def test_a_hub_name_gives_the_splits_that_are_labelled(
    hub: tuple[str, Path], ask_hub: Callable[..., None], cache: Path
) -> None:
    address, folder = hub
    ask_hub(address)
    repository = folder / "datasets" / "owner" / "reviews"
    repository.mkdir(parents=True)
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    for split, labels in (("train", [1, 0]), ("validation", [0]), ("test", [-1])):
        texts = {"sentence": [split] * len(labels), "label": labels}
        Dataset.from_dict(texts, features=features).to_parquet(repository / f"{split}-00000-of-00001.parquet")
    found = read("owner/reviews", Columns(), cache=cache)
    assert {split: [source.where, *source.rows] for split, source in found.items()} == {
        "train": [
            "owner/reviews, split train",
            {"row": 1, "text": "train", "label": "positive"},
            {"row": 2, "text": "train", "label": "negative"},
        ],
        "valid": ["owner/reviews, split validation", {"row": 1, "text": "validation", "label": "negative"}],
    }
    unknown = "is not a file or folder here, and the hub has no data set of this name (a private one needs HF_TOKEN)."
    for name in ("owner/none", "none"):
        assert refusal(name, cache) == f"DATASET={name} {unknown}"
    no_configuration = refusal("owner/reviews:large", cache)
    assert no_configuration.startswith("DATASET=owner/reviews:large is not a file or folder here")
    assert "'large' not found. Available: ['default']" in no_configuration
    assert refusal("a/b/c", cache).startswith("DATASET=a/b/c is not a file or folder here")


def test_a_hub_out_of_reach_is_a_clear_error(unreachable: str, ask_hub: Callable[..., None], cache: Path) -> None:
    ask_hub(unreachable, patience_s=0.1)
    assert refusal("owner/reviews", cache) == (
        "DATASET=owner/reviews is not a file or folder here, and the hub cannot be reached."
    )
