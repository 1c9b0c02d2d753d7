"""Files as other people leave them: what is read of each, or in which words it is refused, by training and `predict`.

Each case has the shape of a public bug report of a comparable tool. A refusal is one line of at most 600 characters.
"""

import gzip
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from tuneserve.errors import DataError
from tuneserve.scoring.input import Input
from tuneserve.tables.rows import Columns
from tuneserve.training import data
from tuneserve.training.checks import Splits, check, describe

Rows = Sequence[Sequence[Any]]
Write = Callable[[Path], None]

MOST_CHARACTERS = 600


def rows(count: int = 40, labels: Sequence[Any] = ("pos", "neg"), word: str = "film") -> list[tuple[str, Any]]:
    return [(f"the {word} number {number}", labels[number % len(labels)]) for number in range(count)]


def table(rows: Rows, header: Sequence[str] = ("text", "label"), separator: str = ",") -> str:
    return "".join(f"{separator.join(map(str, row))}\n" for row in [header, *rows])


def indexed(header: str) -> str:
    return f"{header}\n" + "".join(f"{number},{text},{label}\n" for number, (text, label) in enumerate(rows()))


def lines(records: Sequence[Any]) -> str:
    return "".join(f"{json.dumps(record)}\n" for record in records)


def records(rows: Rows) -> list[dict[str, Any]]:
    return [{"text": text, "label": label} for text, label in rows]


def parquet(rows: Rows, **schema: Any) -> Write:
    columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
    return lambda path: pq.write_table(pa.table(columns, **schema), path)


def classes(rows: Rows) -> Dataset:
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    return Dataset.from_dict({"sentence": [row[0] for row in rows], "label": [row[1] for row in rows]}, features)


def texts(count: int, *folders: str) -> dict[str, str]:
    return {f"{folder}/{number}_7.txt": f"{folder} text {number}\n" for folder in folders for number in range(count)}


@dataclass(frozen=True)
class Case:
    """Files and what becomes of them."""

    files: Mapping[str, str | bytes | Write]
    """By their paths; a single one is DATASET and INPUT itself, of several it is their folder."""

    train: str | Mapping[str, int]
    """A part of the refusal, or the rows of each split that is read."""

    predict: str | int | None = None
    """A part of the refusal, or the rows that are read; None for what it refuses in the same words as training."""

    says: tuple[str, ...] = ()
    """Parts of the log lines."""

    labels: tuple[str, ...] = ()
    columns: Columns = field(default_factory=Columns)
    how: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `check`."""


POS_NEG = tuple(rows())
INDEX = "does not say which column holds the text; its columns are (unnamed), Review Text, label. Set TEXT_COLUMN"
COLUMNS = {
    "an index without a name": Case({"a.csv": indexed(",Review Text,label")}, INDEX),
    "an index called Unnamed: 0": Case({"a.csv": indexed("Unnamed: 0,Review Text,label")}, "Set TEXT_COLUMN"),
    "an index beside the text": Case({"a.csv": indexed(",text,stars")}, "holds the label; its columns are", 40),
    "an index and no known name": Case(
        {"a.csv": indexed(",Review Text,stars")}, "Set TEXT_COLUMN and LABEL_COLUMN", ""
    ),
    "an index and two names given": Case(
        {"a.csv": indexed(",Review Text,stars")}, {"train": 40}, 40, columns=Columns("Review Text", "stars")
    ),
    "an index behind": Case(
        {"a.csv": table([(*row, n) for n, row in enumerate(POS_NEG)], ("Review Text", "label", ""))}, "Set TEXT_COLUMN"
    ),
    **{
        f"{name} and text": Case(
            {"a.csv": table([(n, text) for n, (text, _) in enumerate(POS_NEG)], (name, "text"))}, "Set LABEL_COLUMN", 40
        )
        for name in ("", "index", "Unnamed: 0", "id", "PhraseId", "tweet_id", "__index_level_0__", "#")
    },
    "an index and a label": Case(
        {"a.csv": table([(n, label) for n, (_, label) in enumerate(POS_NEG)], ("", "label"))}, "Set TEXT_COLUMN"
    ),
    "an index alone": Case({"a.csv": table([(n,) for n in range(9)], ("index",))}, "Set TEXT_COLUMN", ""),
    "no header": Case(
        {"a.csv": table(POS_NEG, ("1", "It was quite a film. " * 90))},
        "row 1 does not look like column names: '1', 'It was quite a film. It was quite a film…'. Put a line such as",
        "row 1 does not look like column names: '1'",
    ),
    "no header, one column": Case({"a.csv": table([(text,) for text, _ in POS_NEG], ("A film " * 20,))}, "row 1", ""),
    "no header, a text twice": Case({"a.csv": table(POS_NEG, ("very long " * 90,) * 2)}, "row 1: the column names ["),
    "semicolons": Case({"a.csv": table(POS_NEG, separator=";")}, "row 1: columns are separated by ';'"),
    "semicolons behind a mark": Case({"a.csv": "\ufeff" + table(POS_NEG, separator=";")}, "separated by ';'"),
    "semicolons and a comma": Case({"a.csv": "text, in full;label\n" + "a film, good;pos\n" * 9}, "separated by ';'"),
    "no header, short": Case(
        {"a.csv": table(POS_NEG[1:], POS_NEG[0])}, "If row 1 holds no names, put a line such as", ""
    ),
    "no header, one short column": Case(
        {"a.csv": table([(a,) for a, _ in POS_NEG], (POS_NEG[0][0],))}, "row 1 does", ""
    ),
    "tabs": Case(
        {"a.csv": table(POS_NEG, separator="\t")}, "separated by '\\t'; in this kind of file use ',', or name"
    ),
    "Latin-1": Case(
        {"a.csv": table([(f"{text} \u00a3100", label) for text, label in POS_NEG]).encode("latin-1")},
        "line 2: byte 0xa3 is not UTF-8; save the file as UTF-8 (iconv -f CP1252 -t UTF-8)",
    ),
    "UTF-16": Case({"a.csv": table(POS_NEG, separator="\t").encode("utf-16")}, "is UTF-16 text; save it as UTF-8"),
    "UTF-16 without a mark": Case({"a.csv": table(POS_NEG).encode("utf-16-le")}, "is UTF-16 text; save it as UTF-8"),
    "quotes behind a backslash": Case(
        {"a.csv": table([(f'"he said \\"{text}, so\\" to me"', label) for text, label in POS_NEG])},
        "The fault is in row 2",
    ),
    "files joined": Case({"a.csv": table(POS_NEG) + table(POS_NEG[:9])}, "row 42 repeats the column names, as when"),
    "files joined twice": Case({"a.csv": table(POS_NEG[:9]) * 3}, "row 11 repeats the column names"),
    "files joined with a mark": Case({"a.csv": ("\ufeff" + table(POS_NEG[:9])) * 2}, "row 11 repeats the column names"),
    "TSV files joined": Case({"a.tsv": table(POS_NEG[:9], separator="\t") * 2}, "row 11 repeats the column names"),
    "columns without names": Case(
        {"a.csv": table([(label, text, "", "") for text, label in POS_NEG], ("v1", "v2", "", ""))},
        {"train": 40},
        40,
        columns=Columns("v2", "v1"),
    ),
    "columns without names, not named": Case(
        {"a.csv": table([(label, text, "") for text, label in POS_NEG], ("v1", "v2", ""))}, "Set TEXT_COLUMN and", ""
    ),
    "a quote that swallows rows": Case(
        {"a.csv": table([*POS_NEG[:9], ('"a great film', "pos"), *POS_NEG[9:20], ('awful"', "neg"), *POS_NEG[20:]])},
        "row 11: a quote opens here and takes in 11 lines that look like rows. Close it, or write",
    ),
    "lines of a poem": Case(
        {"a.csv": table([('"Roses are red,\nViolets are blue,\nSugar is sweet,\nAnd so are you."', "pos"), *POS_NEG])},
        {"train": 41},
        41,
    ),
}
REVIEWS = [*POS_NEG[:9], ('"a great film', "pos"), *POS_NEG[9:30], ('and then: awful"', "neg"), *POS_NEG[30:]]
CHATS = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in POS_NEG]
TASKS = [
    {"id": 1, "data": {"text": text}, "annotations": [{"result": [{"value": {"choices": [label]}}]}]}
    for text, label in POS_NEG
]
WHOLE = "holds one object with the whole table in it"
TSV_JSON = {
    "quotes that do not close": Case({"a.tsv": table(REVIEWS, separator="\t")}, {"train": 42}, 42),
    "quotes that do not close, label first": Case(
        {"a.tsv": table([(label, text) for text, label in REVIEWS], ("label", "text"), separator="\t")},
        {"train": 42},
        42,
    ),
    "quotes within": Case(
        {"a.tsv": table([('a 5" and "great" film', "pos"), ('"great" it was', "neg"), *POS_NEG], separator="\t")},
        {"train": 42},
        42,
    ),
    "a quoted text in two lines": Case(
        {"a.tsv": table([('"one line\nand ""another"""', "pos"), *POS_NEG], separator="\t")}, {"train": 41}, 41
    ),
    "a quoted text in two lines, label first": Case(
        {"a.tsv": table([("pos", '"one line\nand another"'), *((b, a) for a, b in POS_NEG)], ("label", "text"), "\t")},
        {"train": 41},
        41,
    ),
    "a quote that opens in the only column": Case(
        {"a.tsv": table([("film",), ('"a great film',), ("film",), ('awful"',)], ("text",), "\t")},
        "line 3: a quote opens",
        "line 3: a quote opens here and does not close in its line",
    ),
    "an array behind a line break": Case({"a.json": "\n" + json.dumps(records(POS_NEG), indent=1)}, {"train": 40}, 40),
    "an array behind a mark, called JSON lines": Case(
        {"a.jsonl": "\ufeff\r\n " + json.dumps(records(POS_NEG))}, {"train": 40}, 40
    ),
    **{
        f"to_json(orient={orient!r})": Case({"a.json": json.dumps(content)}, words)
        for orient, content, words in [
            ("columns", {"text": {"0": "a", "1": "b"}, "label": {"0": "x", "1": "y"}}, f"{WHOLE} (text, label)"),
            ("split", {"columns": ["text", "label"], "index": [0], "data": [["a", "x"]]}, WHOLE),
            ("index", {"0": {"text": "a", "label": "x"}, "1": {"text": "b", "label": "y"}}, WHOLE),
            ("table", {"schema": {"fields": []}, "data": records(POS_NEG)}, WHOLE),
            ("list", {"text": ["a", "b"], "label": ["x", "y"]}, WHOLE),
            ("values", [["a", "x"], ["b", "y"]], 'pandas does with to_json(path, orient="records", lines=True)'),
        ]
    },
    "to_json(indent=2)": Case({"a.json": json.dumps({"text": {"0": "a"}}, indent=2)}, 'orient="records", lines=True'),
    "Label Studio": Case(
        {"a.json": json.dumps(TASKS)}, "It holds tasks of Label Studio; export them as CSV or JSON-MIN", ""
    ),
    "Label Studio's JSON-MIN": Case(
        {
            "a.json": json.dumps(
                [{"id": 1, "text": text, "sentiment": label, "annotator": 1} for text, label in POS_NEG]
            )
        },
        {"train": 40},
        40,
    ),
    "chats": Case(
        {"a.jsonl": lines(CHATS)}, "It holds chats; write what is asked as text and what is answered as label", ""
    ),
    "chats of ShareGPT": Case(
        {"a.json": json.dumps([{"id": "1", "conversations": [{"from": "human", "value": "a"}]}] * 2)},
        "It holds chats",
        "",
    ),
}
TEST, VALID = rows(12, word="test"), rows(12, word="valid")
BARE = table([(text,) for text, _ in TEST], ("text",))
SHARD = "-00000-of-00001.parquet"


def saved(path: Path) -> None:
    """As `DatasetDict.save_to_disk` leaves it, one split in several shards."""
    numbered = [(text, number % 2) for number, (text, _) in enumerate(POS_NEG)]
    splits = {"train": classes(numbered), "validation": classes(numbered[:9]), "test": classes([("test", -1)] * 5)}
    DatasetDict(splits).save_to_disk(path, num_shards={"train": 3, "validation": 1, "test": 1})


def arrow_file(path: Path) -> None:
    content = pa.table({"text": [text for text, _ in POS_NEG], "label": [label for _, label in POS_NEG]})
    with pa.ipc.new_file(path, content.schema) as file:
        file.write_table(content, max_chunksize=7)


def saved_alone(path: Path) -> None:
    classes([(text, number % 2) for number, (text, _) in enumerate(POS_NEG)]).save_to_disk(path)


def hub(rows: Rows) -> Write:
    return lambda path: classes([(text, {"pos": 1, "neg": 0}.get(label, -1)) for text, label in rows]).to_parquet(path)


SPLITS = {
    "a contest": Case(
        {
            "train.csv": table([(n, *row) for n, row in enumerate(POS_NEG)], ("id", "text", "label")),
            "test.csv": table([(n, text) for n, (text, _) in enumerate(TEST)], ("id", "text")),
            "sample_submission.csv": "id,label\n0,pos\n",
        },
        {"train": 40},
        "All files must have the same; or name one in INPUT",
        says=("left out: sample_submission.csv, .*test.csv .no column 'label'.", "text from column 'text', label from"),
    ),
    "a contest's test is texts alone": Case(
        {"train.csv": table(POS_NEG), "test.csv": BARE},
        {"train": 40},
        "must have the same",
        says=("test.csv .no column",),
    ),
    "a contest's labels are withheld": Case(
        {f"train{SHARD}": hub(POS_NEG), f"validation{SHARD}": hub(VALID), f"test{SHARD}": hub([("a", "")] * 9)},
        {"train": 40, "valid": 12},
        61,
        says=(rf"left out: .*test{SHARD} .no labels.",),
        labels=("negative", "positive"),
    ),
    "a test of empty labels": Case(
        {"train.csv": table(POS_NEG), "test.csv": table([(text, "") for text, _ in TEST])},
        {"train": 40},
        52,
        says=("test.csv .no labels.",),
    ),
    "a test of -1": Case(
        {"train.csv": table(POS_NEG), "test.csv": table([(text, -1) for text, _ in TEST])},
        {"train": 40},
        52,
        says=("test.csv .no labels.",),
    ),
    "-1 is a class": Case(
        {"train.csv": table(rows(labels=(-1, 1))), "test.csv": table(rows(9, (-1,), "test"))},
        {"train": 40, "test": 9},
        49,
    ),
    "one missing label in a test": Case(
        {"train.csv": table(POS_NEG), "test.csv": table([*TEST, ("a", "")])},
        "test.csv, row 14: the label is missing",
        53,
    ),
    "a part without the label": Case(
        {
            "train.csv": table(POS_NEG),
            "train-2.csv": BARE.replace("text\n", "text,stars\n", 1).replace("\n", ",1\n").replace("stars,1", "stars"),
        },
        "",
        "",
    ),
    "a test without the text": Case(
        {"train.csv": table(POS_NEG), "test.csv": table(TEST, ("review", "label"))},
        "test.csv has no column 'text', which",
        "",
    ),
    **{
        f"{name} and Test.csv": Case(
            {"TRAIN.CSV": table(POS_NEG), f"{name}.csv": table(VALID), "Test.csv": table(TEST)},
            {"train": 40, "valid": 12, "test": 12},
            64,
        )
        for name in ("val", "valid", "Validation", "dev", "eval")
    },
    "two validations": Case(
        {"train.csv": "", "val.csv": "", "dev.csv": ""}, "dev.csv and val.csv are both the valid split", ""
    ),
    "two tests by case": Case(
        {"train.csv": "", "Test.csv": "", "test.csv": ""}, "Test.csv and test.csv are both the test", ""
    ),
    "another file of data": Case(
        {"train.csv": table(POS_NEG), "extra.csv": table(TEST)}, {"train": 40}, 52, says=("left out: extra.csv",)
    ),
    "what lies beside": Case(
        {
            "train.csv": table(POS_NEG),
            "train.csv.dvc": "outs:",
            "train.py": "",
            "test.md": "",
            ".DS_Store": "",
            "._train.csv": "",
            "__MACOSX/train.csv": "",
        },
        {"train": 40},
        40,
        says=("left out: test.md, train.csv.dvc, train.py$",),
    ),
    "shards": Case(
        {"train-00000-of-00002.parquet": hub(POS_NEG[:20]), "train-00001-of-00002.parquet": hub(POS_NEG[20:])},
        {"train": 40},
        40,
    ),
    "a hub's repository": Case(
        {"README.md": "", "data/train-00000-of-00001.parquet": hub(POS_NEG), f"data/test{SHARD}": hub(TEST)},
        {"train": 40, "test": 12},
        52,
        says=("left out: README.md",),
    ),
    "a hub's converted branch": Case(
        {"default/train/0000.parquet": hub(POS_NEG), "default/test/0000.parquet": hub(TEST)},
        {"train": 40, "test": 12},
        52,
    ),
    "parts in folders, as Spark writes": Case(
        {
            "train/part-0.csv": table(POS_NEG[:20]),
            "train/part-1.csv": table(POS_NEG[20:]),
            "train/_SUCCESS": "",
            "test/part-0.csv": table(TEST),
        },
        {"train": 40, "test": 12},
        52,
    ),
    "one file of another name": Case(
        {"reviews.csv": table(POS_NEG), "README.md": ""}, {"train": 40}, 40, says=("left out: README.md",)
    ),
    "two files of other names": Case(
        {"a.csv": table(POS_NEG), "b.csv": table(TEST)}, "it holds a.csv, b.csv. Rename", 52
    ),
    "a zip in a folder": Case({"train.zip": b"PK", "test.csv": table(TEST)}, "train.zip: unpack it first", 12),
    "configurations in folders": Case(
        {"cola/train-0.parquet": hub(POS_NEG), "sst2/train-0.parquet": hub(TEST)}, "it holds cola, sst2. Rename", 52
    ),
    "a single class": Case(texts(9, "train/pos"), "it holds train", 9),
    "an archive with a folder in it": Case(
        {f"aclImdb/{name}": text for name, text in texts(9, "train/pos", "train/neg", "test/pos", "test/neg").items()},
        {"train": 18, "test": 18},
        36,
    ),
    "a folder and a file": Case(
        {"train/a.csv": table(POS_NEG), "train.csv": table(POS_NEG)}, "both the train split", 40
    ),
    "save_to_disk": Case(
        {"saved": saved},
        {"train": 40, "valid": 9},
        54,
        labels=("negative", "positive"),
        says=("test/data-00000-of-00001.arrow .no labels.",),
    ),
    "save_to_disk of one split": Case({"saved": saved_alone}, {"train": 40}, 40, labels=("negative", "positive")),
    "an Arrow file": Case({"a.arrow": arrow_file}, {"train": 40}, 40, labels=("neg", "pos")),
    "an Arrow file cut short": Case({"a.arrow": b"ARROW1\0\0 and no more"}, "a.arrow cannot be read: "),
    "an Arrow stream of something else": Case({"a.arrow": b"no stream, but words"}, "a.arrow cannot be read: "),
    "aclImdb": Case(
        texts(9, "train/pos", "train/neg", "train/unsup", "test/pos", "test/neg")
        | {"train/urls_pos.txt": "", "imdb.vocab": ""},
        {"train": 18, "test": 18},
        46,
        labels=("neg", "pos"),
        says=("left out: imdb.vocab, train/unsup, train/urls_pos.txt",),
    ),
    "load_files": Case(
        texts(9, "pos", "neg") | {"README.md": ""},
        {"train": 18},
        18,
        labels=("neg", "pos"),
        says=("left out: README.md",),
    ),
    "a text that is not UTF-8": Case(
        texts(9, "pos", "neg") | {"neg/3_1.txt": b"caf\xe9"}, "neg/3_1.txt, line 1: byte 0xe9", "neg/3_1.txt, line 1"
    ),
    "a compressed file": Case({"reviews.csv.gz": gzip.compress(table(POS_NEG).encode())}, {"train": 40}, 40),
    "a zip": Case({"reviews.zip": b"PK"}, "cannot read .zip; unpack it first"),
    "a tar": Case({"reviews.tar.gz": b""}, "cannot read .tar.gz; unpack it first"),
    "a sheet": Case({"reviews.xlsx": b"PK"}, "cannot read .xlsx; save the sheet as CSV UTF-8"),
}
RARE = [
    *rows(120),
    *((f"an odd text {number}", f"rare category with a long name {number}") for number in range(400)),
]
SCORES = [(f"a text {number}", f"{number / 1000:.3f}") for number in range(1500)]
ALIKE = "labels differ only in case, spaces, Unicode form or number format: "
LABELS = {
    "case": Case(
        {"a.csv": table(rows(labels=("Positive", "negative", "positive", "negative")))},
        {"train": 40},
        labels=("Positive", "negative", "positive"),
        says=(f"{ALIKE}'Positive' .10. and 'positive' .10.; LABELS=merge joins them",),
    ),
    "case, joined": Case(
        {"a.csv": table([*rows(labels=("Positive", "bad", "positive", "bad")), ("more", "positive")])},
        {"train": 41},
        labels=("bad", "positive"),
        says=("they are joined",),
        how={"merge_labels": True},
    ),
    "case in the test": Case(
        {"train.csv": table(POS_NEG), "test.csv": table(rows(9, ("Pos",), "test"))},
        "test.csv, row 2: no training text has the label 'Pos'; LABELS=merge joins it with 'pos'",
        49,
    ),
    "case in the test, joined": Case(
        {"train.csv": table(POS_NEG), "test.csv": table(rows(9, ("Pos",), "test"))},
        {"train": 40, "test": 9},
        49,
        labels=("neg", "pos"),
        how={"merge_labels": True},
    ),
    "spaces": Case(
        {"a.csv": table(rows(labels=("good", " good", "good\u00a0", "bad")))}, {"train": 40}, labels=("bad", "good")
    ),
    "spaces within": Case(
        {"a.csv": table(rows(labels=("very good", "very  good", "very\u00a0good", "bad")))},
        {"train": 40},
        says=(ALIKE,),
        labels=("bad", "very  good", "very good", "very\u00a0good"),
    ),
    "composed and not": Case(
        {"a.csv": table(rows(labels=("caf\u00e9", "bar", "cafe\u0301", "bar")))},
        {"train": 40},
        labels=("bar", "caf\u00e9"),
    ),
    "a space without width": Case(
        {"a.csv": table(rows(labels=("good", "good\u200b", "bad")))},
        {"train": 40},
        labels=("bad", "good", "good\u200b"),
        says=(ALIKE,),
    ),
    "floats in the training file": Case(
        {"train.csv": table(rows(labels=("0.0", "1.0"))), "test.csv": table(rows(9, ("0", "1"), "test"))},
        {"train": 40, "test": 9},
        49,
        labels=("0", "1"),
    ),
    "floats in a part, whatever the format": Case(
        {
            "train.csv": table(rows(20, ("0", "1"), "csv")),
            "train-2.jsonl": lines(records(rows(20, (0.0, 1.0), "json"))),
            "train-3.parquet": parquet(rows(20, (0.0, 1.0), "parquet")),
            "train-4.json": json.dumps(records(rows(20, ("0.0", 1), "list"))),
        },
        {"train": 80},
        "files of several kinds",
        labels=("0", "1"),
    ),
    "leading zeroes": Case(
        {"a.csv": table(rows(labels=("1", "01", "2")))}, {"train": 40}, labels=("01", "1", "2"), says=(ALIKE,)
    ),
    "booleans": Case(
        {
            "train.csv": table(rows(20, ("True", "False"), "csv")),
            "train-2.jsonl": lines(records(rows(20, (True, False)))),
        },
        {"train": 40},
        "several kinds",
        labels=("False", "True"),
    ),
    "booleans in small letters": Case(
        {"train.csv": table(rows(labels=("True", "false", "true", "False")))},
        {"train": 40},
        labels=("False", "True"),
        how={"merge_labels": True},
    ),
    "scores": Case(
        {"a.csv": table(SCORES)},
        "looks like a number to predict ('0', '0.001', '0.002', '0.003', '0.004', and 1495 more); this job classifies",
        1500,
    ),
    "scores of many texts": Case(
        {"a.csv": table([(f"a text {n}", f"0.{n % 50:02}") for n in range(500)])}, "looks like a number to predict", 500
    ),
    "whole scores": Case(
        {"a.csv": table([(f"a text {n}", n % 300) for n in range(1500)])}, "looks like a number to predict", 1500
    ),
    "scores with gaps": Case({"a.csv": table([*SCORES, ("a", "NaN")])}, "looks like a number to predict", 1501),
    "percentages": Case({"a.csv": table([(f"a text {n}", f"{n}.5%") for n in range(50)])}, "looks like a number", 50),
    "hundreds of numbers of classes": Case(
        {"a.csv": table([(f"a text {n}", n % 150) for n in range(3000)])},
        {"train": 3000},
        says=("labels are 150 different numbers; if they measure something",),
    ),
    "numbers with commas": Case(
        {"a.csv": table([(f"a text {n}", f'"{n},5"') for n in range(50)])}, "looks like a number to predict", 50
    ),
    "half stars": Case({"a.csv": table(rows(labels=(1.0, 1.5, 2.0)))}, {"train": 40}, labels=("1", "1.5", "2")),
    "numbers of classes": Case({"a.csv": table([(f"a text {n}", n % 77) for n in range(770)])}, {"train": 770}),
    "rare labels": Case(
        {"a.csv": table(RARE)},
        ", and 395 more; 2 of each class are the least. Most texts",
        520,
    ),
    "rare labels, left out": Case(
        {"a.csv": table(RARE)},
        {"train": 520},
        labels=("neg", "pos"),
        how={"rare_labels": "drop"},
        says=("400 rare labels with 400 train texts left out, such as 'rare",),
    ),
    "rare labels, joined": Case(
        {"a.csv": table(RARE)},
        {"train": 520},
        labels=("neg", "other", "pos"),
        how={"rare_labels": "other"},
        says=("400 rare labels with 400 train texts joined as 'other'",),
    ),
    "a larger bound": Case(
        {
            "train.csv": table([*POS_NEG, *rows(6, ("odd",), "odd")]),
            "test.csv": table([*TEST, ("a", "odd"), ("b", "new")]),
        },
        {"train": 46, "test": 14},
        60,
        labels=("neg", "pos"),
        how={"rare_labels": "drop", "min_class_size": 10},
        says=("2 rare labels with 6 train texts, 2 test texts left out",),
    ),
    "rare labels, too few to be joined": Case(
        {"a.csv": table([*POS_NEG, ("an odd text", "odd")])},
        {"train": 41},
        labels=("neg", "pos"),
        how={"rare_labels": "other"},
        says=("1 rare labels with 1 train texts left out, such as 'odd'",),
    ),
    "none is left": Case(
        {"a.csv": table(RARE[120:])},
        "only 0 of 400 labels have 2 usable training texts",
        400,
        how={"rare_labels": "drop"},
    ),
    "indicators": Case(
        {
            "a.csv": table(
                [(text, n % 2, n % 3 == 0, 0) for n, (text, _) in enumerate(POS_NEG)],
                ("comment_text", "toxic", "threat", "insult"),
            )
        },
        "toxic, threat, insult hold only 0 and 1. A text with several labels is not supported",
        "Set TEXT_COLUMN",
    ),
    "one of the indicators": Case(
        {
            "a.csv": table(
                [(text, n % 2, 0) for n, (text, _) in enumerate(POS_NEG)], ("comment_text", "toxic", "threat")
            )
        },
        {"train": 40},
        40,
        columns=Columns("comment_text", "toxic"),
    ),
    **{
        f"several labels with {name}": Case(
            {"a.csv": table(rows(labels=labels))}, {"train": 40}, says=("labels look like several in one",)
        )
        for name, labels in {
            "bars": ("billing", "bug", "billing|bug", "bug|ui"),
            "commas": ('"a, b"', "a", "b"),
            "semicolons": ("a;b", "b;c", "a;c"),
            "brackets": ("\"['a']\"", "\"['a', 'b']\""),
        }.items()
    },
    "several labels in a list": Case(
        {"a.jsonl": lines(records(rows(labels=(["a"], ["a", "b"]))))}, "a text with several labels is not supported", 40
    ),
    "names with commas": Case({"a.csv": table(rows(labels=('"Paris, France"', '"Lyon, France"')))}, {"train": 40}),
    "words for nothing": Case(
        {"a.csv": table(rows(labels=("NaN", "None", "pos", "null")))},
        {"train": 40},
        says=("labels may mean that the label is missing: 'NaN', 'None', 'null'",),
    ),
    "nothing": Case(
        {"a.jsonl": lines([*records(POS_NEG), {"text": "a", "label": None}])}, "row 41: the label is missing", 41
    ),
    "not a number": Case(
        {"a.jsonl": lines([*records(POS_NEG), {"text": "a", "label": float("nan")}])},
        "row 41: the label is missing",
        41,
    ),
    "odd characters": Case(
        {"a.jsonl": lines(records(rows(60, ("a/b", 'he said "hi"', "line\nbreak", "\U0001f600", "x" * 300, "a\tb"))))},
        {"train": 60},
    ),
}
CASES = {
    f"{section}: {name}": case
    for section, cases in {"columns": COLUMNS, "splits": SPLITS, "TSV, JSON": TSV_JSON, "labels": LABELS}.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_other_peoples_files_are_read_or_refused_in_words(
    case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tuneserve")
    names = list(case.files)
    folder = tmp_path / "reviews"
    for name, content in case.files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(file)
        else:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
    path = folder / names[0] if len(names) == 1 else folder

    if isinstance(case.train, str):
        refused = refusal(lambda: train(case, path, tmp_path / "cache"), path)
        assert case.train in refused
    else:
        sources, splits = train(case, path, tmp_path / "cache")
        assert {split: len(source.rows) for split, source in sources.items()} == case.train
        assert not case.labels or splits.labels == list(case.labels)
    said = [record.getMessage().replace(str(path), "") for record in caplog.records]
    assert all(len(line) < MOST_CHARACTERS for line in said)
    for words in case.says:
        assert any(re.search(words, line) for line in said), said

    if case.predict is None and isinstance(case.train, str):
        assert refusal(lambda: count_rows(path, case.columns), path) == refused
    elif isinstance(case.predict, str):
        assert case.predict in refusal(lambda: count_rows(path, case.columns), path)
    elif case.predict is not None:
        assert count_rows(path, case.columns) == case.predict


def train(case: Case, path: Path, cache: Path) -> tuple[dict[str, data.Source], Splits]:
    """The data as a job reads and checks them; what it says goes to the log."""
    sources = data.read(str(path), case.columns, cache=cache)
    options = {"num_train": 0, "num_test": 0, "valid_fraction": 0.1, "test_fraction": 0.1, "seed": 1}
    splits = check(sources, **options | dict(case.how))
    for line in describe(splits.findings):
        logging.getLogger("tuneserve").info("%s", line)
    return sources, splits


def count_rows(path: Path, columns: Columns) -> int:
    """The rows that `predict` would score."""
    source = Input(str(path), text_column=columns.text, label_column=columns.label)
    chunks = [chunk.rows for chunk in source.chunks(chunk_rows=9, wanted=lambda _: True)]
    return sum(len(source.texts(rows)) for rows in chunks if rows)


def refusal(use: Callable[[], Any], path: Path) -> str:
    """The message of a DataError, without the folder and the setting, which differ."""
    with pytest.raises(DataError) as caught:
        use()
    message = str(caught.value)
    assert path.name in message
    assert len(message.splitlines()) == 1
    assert len(message.replace(str(path.parent), "")) <= MOST_CHARACTERS
    return message.removeprefix("INPUT=")
