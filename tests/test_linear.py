"""No text, however it was made, takes more than linear time: each reader of other people's text is fed a mebibyte."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tuneserve.errors import TuneserveError
from tuneserve.lifecycle.evidence import key_of
from tuneserve.serving.http.front import has_key
from tuneserve.serving.http.protocol import head_without_offer
from tuneserve.serving.http.request_log import request_id_of
from tuneserve.serving.http.routes import read_body, wanted_s
from tuneserve.serving.http.schemas import FeedbackRequest
from tuneserve.settings import Settings
from tuneserve.tables.rows import Columns, find_columns, read_file
from tuneserve.tasks.classification import BatchRequest, InferenceRequest
from tuneserve.text import TextEncoder, is_blank, plain
from tuneserve.training.checks import check
from tuneserve.training.data import Source, memory_map

CPU_S = 4.0
"""Of the processor for one text; what is linear takes a tenth of it, what is quadratic minutes."""
SIZES = [1 << 14, 1 << 16, 1 << 18, 1 << 20]
"""The longest last, so that the test of something quadratic fails before it has taken an hour."""

PIECES = {
    "a break that does not end": "<br" + " " * (1 << 20),
    "many breaks that do not end": "<br" + " " * 60,
    "breaks": "<br/>",
    "tags": "<",
    "spaces": " ",
    "line breaks": "\n",
    "carriage returns": "\r",
    "quotes": '"',
    "backslashes": "\\",
    "arrays": "[",
    "objects": '{"a":',
    "commas": ",",
    "tabs": "\t",
    "digits": "7",
    "one word": "a",
    "words": "ab ",
    "combining marks in no order": "\u0315\u0300",
    "zero widths": "\u200b",
    "capitals that grow": "\u0130",
    "surrogate pairs, escaped": r"\ud83d\ude00",
    "halves of them": r"\ud83d",
    "NUL": "\0",
    "addresses": "s3://a:b?c",
    "columns": "a,b;c\t",
    "columns of different names": ",".join(map(str, range(200_000))),
}


def slowness(reader: Callable[[str], Any], piece: str) -> str:
    """What is to be said of a reader that takes too long for a text of these pieces; nothing if it does not."""
    for size in SIZES:
        text = (piece * (size // len(piece) + 1))[:size]
        began = time.process_time()
        with suppress(TuneserveError):
            reader(text)
        if (spent := time.process_time() - began) >= CPU_S:
            return f"{size} characters took {spent:.1f} s"
    return ""


def encoder_of(model: Any, pre_tokenizer: Any, *, windows: bool = False) -> TextEncoder:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    return TextEncoder(tokenizer, max_tokens=256, windows=windows)


VOCABULARY = {"[UNK]": 0, "a": 1, "##a": 2, "aa": 3, "aaaa": 4, "7": 5, "ab": 6}


def body(schema: Any, field: str, text: str) -> None:
    """The text as JSON's string, as it stands between quotes, and as the whole body."""
    value: Any = [text] if field == "texts" else text
    read_body(schema, json.dumps({field: value, "label": "good"}).encode())
    for raw in (f'{{"{field}": "{text}"}}', text):
        with suppress(TuneserveError):
            read_body(schema, raw.encode())


def headers(text: str) -> None:
    value = text.encode()
    pairs = [(b"x-request-id", value), (b"authorization", b"Bearer " + value), (b"connection", value)]
    request_id_of(pairs)
    has_key(pairs, b"secret")
    head_without_offer(b"GET", b"/", b"1.1", pairs)
    wanted_s([(b"x-request-timeout-s", value)], 30)


def file(folder: Path, ending: str, before: str, after: str, text: str) -> None:
    path = folder / f"rows{ending}"
    path.write_text(f"{before}{text}{after}", encoding="utf-8", newline="")
    for _ in read_file(path, "rows", lambda names: Columns(*find_columns(names, text="text", label="label"))):
        pass


def checks(folder: Path, text: str) -> None:
    check_rows(folder, [(number, f"{text}{number}", "bad" if number % 2 else "good") for number in range(4)])


def labels(folder: Path, text: str) -> None:
    check_rows(folder, [(number, f"film {number}", text + "ab"[number % 2]) for number in range(20)])


def check_rows(folder: Path, rows: list[tuple[int, str, str]]) -> None:
    source = Source(memory_map(rows, "rows", folder), "rows")
    check({"train": source}, num_train=0, num_test=0, valid_fraction=0.1, test_fraction=0.1, seed=1)


def settings(text: str) -> None:
    if len(text) not in (SIZES[0], SIZES[2]):
        return
    text = text[: 1 << 17]  # Linux takes no longer variables
    for name in Settings.model_fields:
        with suppress(TuneserveError):
            Settings.from_environ({name.upper(): text}).public()


READERS: dict[str, Callable[[Path], Callable[[str], Any]]] = {
    "cleaning": lambda _: plain,
    "blank texts": lambda _: is_blank,
    "keys of texts": lambda _: key_of,
    "WordPiece": lambda _: partial(
        _encode, encoder_of(models.WordPiece(VOCABULARY, unk_token="[UNK]"), pre_tokenizers.BertPreTokenizer())
    ),
    "BPE": lambda _: partial(
        _encode,
        encoder_of(models.BPE(VOCABULARY, [("a", "a"), ("aa", "aa")], unk_token="[UNK]"), pre_tokenizers.ByteLevel()),
    ),
    "windows": lambda _: partial(
        _encode, encoder_of(models.WordLevel(VOCABULARY, "[UNK]"), pre_tokenizers.Whitespace(), windows=True)
    ),
    "inference": lambda _: partial(body, InferenceRequest, "text"),
    "batch": lambda _: partial(body, BatchRequest, "texts"),
    "feedback": lambda _: partial(body, FeedbackRequest, "text"),
    "headers": lambda _: headers,
    "settings": lambda _: settings,
    "checks": lambda folder: partial(checks, folder),
    "checks of labels": lambda folder: partial(labels, folder),
    ".csv, a cell": lambda folder: partial(file, folder, ".csv", "text,label\n", ",good\n"),
    ".csv, a quoted cell": lambda folder: partial(file, folder, ".csv", 'text,label\n"', '",good\n'),
    ".csv, a label": lambda folder: partial(file, folder, ".csv", "text,label\nfilm,", "\n"),
    ".csv, the header": lambda folder: partial(file, folder, ".csv", "", ",text,label\nfilm,good\n"),
    ".tsv, a cell": lambda folder: partial(file, folder, ".tsv", "text\tlabel\n", "\tgood\n"),
    ".json, a text": lambda folder: partial(file, folder, ".json", '[{"label": "good", "text": "', '"}]'),
    ".json, an array": lambda folder: partial(file, folder, ".json", "[", "]"),
    ".jsonl, a text": lambda folder: partial(file, folder, ".jsonl", '{"label": "good", "text": "', '"}'),
    ".jsonl, a line": lambda folder: partial(file, folder, ".jsonl", "", ""),
}


def _encode(encoder: TextEncoder, text: str) -> None:
    [tokens] = encoder.encode([text])
    assert tokens.truncated or len(text) <= encoder.max_characters


@pytest.mark.parametrize("reader", READERS)
def test_a_mebibyte_of_any_kind_takes_seconds_at_most(reader: str, tmp_path: Path) -> None:
    read = READERS[reader](tmp_path)
    slow = {kind: words for kind, piece in PIECES.items() if (words := slowness(read, piece))}
    assert not slow
