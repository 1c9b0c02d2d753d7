"""Texts tokenized once, and found again only when nothing about them changed."""

import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from tuneserve.errors import StoreError
from tuneserve.text import TextEncoder, Tokens
from tuneserve.training.checks import Split
from tuneserve.training.tokens import TokenizedSplit, tokenize

Python = Callable[..., "subprocess.CompletedProcess[str]"]
TEXTS = [" ".join(["good film"] * (number % 5) + ["the"]) for number in range(2500)]


def split(texts: Sequence[str], label_ids: Sequence[int] | None = None) -> Split:
    ids = np.arange(len(texts)) % 2 if label_ids is None else np.array(label_ids)
    return Split(Dataset.from_dict({"text": texts}), np.arange(len(texts)), ids.astype(np.int32))


class WatchedEncoder(TextEncoder):
    """Counts the texts it is given, and may die of one."""

    def __init__(self, folder: Path, *, max_tokens: int = 8, dies_at: int | None = None) -> None:
        encoder = TextEncoder.from_folder(folder, max_tokens=max_tokens)
        super().__init__(encoder._tokenizer, max_tokens=max_tokens)
        self.seen = 0
        self.dies_at = dies_at

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        self.seen += len(texts)
        if self.dies_at is not None and self.seen > self.dies_at:
            raise MemoryError
        return super().encode(texts)


def as_lists(tokens: TokenizedSplit) -> list[list[int]]:
    return [tokens.text_ids(row).tolist() for row in range(len(tokens))]


def test_each_text_has_the_ids_that_the_encoder_gives_it(tiny_bert: Path, tmp_path: Path) -> None:
    encoder = TextEncoder.from_folder(tiny_bert, max_tokens=8)
    tokens = tokenize(split(TEXTS), encoder, cache=tmp_path)
    expected = encoder.encode(TEXTS)
    assert as_lists(tokens) == [one.ids for one in expected]
    assert tokens.lengths.tolist() == [len(one.ids) for one in expected]
    assert tokens.truncated.tolist() == [one.truncated for one in expected]
    assert tokens.truncated.sum() == 1000  # those of 7 and 9 words
    assert tokens.label_ids.tolist() == [0, 1] * 1250
    assert (tokens.ids.dtype, tokens.starts.dtype, tokens.label_ids.dtype) == (np.int32, np.int64, np.int64)
    assert isinstance(tokens.ids, np.memmap)


def test_the_second_time_nothing_is_tokenized(tiny_bert: Path, tmp_path: Path) -> None:
    first = tokenize(split(TEXTS), WatchedEncoder(tiny_bert), cache=tmp_path)
    watched = WatchedEncoder(tiny_bert)
    again = tokenize(split(TEXTS), watched, cache=tmp_path)
    assert watched.seen == 0
    assert as_lists(again) == as_lists(first)
    assert again.truncated.tolist() == first.truncated.tolist()


def test_labels_do_not_come_from_the_cache(tiny_bert: Path, tmp_path: Path) -> None:
    tokenize(split(["good", "bad"], [0, 1]), WatchedEncoder(tiny_bert), cache=tmp_path)
    watched = WatchedEncoder(tiny_bert)
    assert tokenize(split(["good", "bad"], [1, 0]), watched, cache=tmp_path).label_ids.tolist() == [1, 0]
    assert watched.seen == 0


@pytest.mark.parametrize(
    ("texts", "max_tokens"),
    [
        ([*TEXTS[:-1], "bad"], 8),
        (TEXTS[:-1], 8),
        ([*TEXTS, "good"], 8),
        (TEXTS[::-1], 8),
        (TEXTS, 9),
    ],
    ids=["a text", "one text less", "one text more", "the order", "the limit"],
)
def test_what_changed_is_tokenized_anew(texts: list[str], max_tokens: int, tiny_bert: Path, tmp_path: Path) -> None:
    tokenize(split(TEXTS), WatchedEncoder(tiny_bert), cache=tmp_path)
    watched = WatchedEncoder(tiny_bert, max_tokens=max_tokens)
    tokens = tokenize(split(texts), watched, cache=tmp_path)
    assert watched.seen == len(texts)
    assert as_lists(tokens) == [one.ids for one in watched.encode(texts)]


def test_another_tokenizer_tokenizes_anew(tiny_bert: Path, tmp_path: Path) -> None:
    tokenize(split(TEXTS), WatchedEncoder(tiny_bert), cache=tmp_path)
    watched = WatchedEncoder(tiny_bert)
    watched._tokenizer.add_tokens(["film"])
    tokenize(split(TEXTS), watched, cache=tmp_path)
    assert watched.seen == len(TEXTS)


def test_texts_that_run_together_are_told_apart(tiny_bert: Path, tmp_path: Path) -> None:
    tokenize(split(["goodfilm", "bad"]), WatchedEncoder(tiny_bert), cache=tmp_path)
    watched = WatchedEncoder(tiny_bert)
    tokens = tokenize(split(["good", "filmbad"]), watched, cache=tmp_path)
    assert as_lists(tokens) == [one.ids for one in watched.encode(["good", "filmbad"])]


def test_a_tokenization_that_failed_leaves_nothing_that_is_taken_for_whole(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(MemoryError):
        tokenize(split(TEXTS), WatchedEncoder(tiny_bert, dies_at=1500), cache=tmp_path)
    assert list((tmp_path / "tokens").iterdir()) == []
    watched = WatchedEncoder(tiny_bert)
    assert len(as_lists(tokenize(split(TEXTS), watched, cache=tmp_path))) == watched.seen == len(TEXTS)


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from datasets import Dataset
from tuneserve.text import TextEncoder
from tuneserve.training.checks import Split
from tuneserve.training.tokens import tokenize

class Encoder(TextEncoder):
    seen = 0
    def encode(self, texts):
        self.seen += len(texts)
        if self.seen > 1500:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(texts)

texts = Path(sys.argv[1]).read_text().splitlines()
encoder = Encoder.from_folder(Path(sys.argv[2]), max_tokens=8)
rows = np.arange(len(texts))
tokenize(Split(Dataset.from_dict({"text": texts}), rows, rows), encoder, cache=Path(sys.argv[3]))
"""


def test_a_process_killed_while_it_tokenizes_leaves_nothing_that_is_taken_for_whole(
    tiny_bert: Path, tmp_path: Path, python: Python
) -> None:
    (tmp_path / "texts").write_text("\n".join(TEXTS))
    done = python("-c", KILLED, tmp_path / "texts", tiny_bert, tmp_path / "cache")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1  # what it left is there, under another name
    watched = WatchedEncoder(tiny_bert)
    tokens = tokenize(split(TEXTS), watched, cache=tmp_path / "cache")
    assert watched.seen == len(TEXTS)
    assert as_lists(tokens) == [one.ids for one in watched.encode(TEXTS)]


def test_a_file_that_lost_its_end_is_not_taken_for_whole(tiny_bert: Path, tmp_path: Path) -> None:
    """As after a power cut: the folder has its name, and not all of its content."""
    whole = as_lists(tokenize(split(TEXTS), WatchedEncoder(tiny_bert), cache=tmp_path))
    (ids,) = tmp_path.glob("tokens/*/ids.i32")
    content = ids.read_bytes()
    ids.write_bytes(content[: len(content) // 8 * 4])
    assert as_lists(tokenize(split(TEXTS), WatchedEncoder(tiny_bert), cache=tmp_path)) == whole


def test_a_cache_that_cannot_be_written_is_a_clear_error(tiny_bert: Path, tmp_path: Path, disk: Any) -> None:
    encoder = TextEncoder.from_folder(tiny_bert, max_tokens=8)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"DATA_PATH=.*file cannot be written to"):
        tokenize(split(["good"]), encoder, cache=tmp_path / "file")
    disk.fill()
    with pytest.raises(StoreError, match=r"DATA_PATH=.*No space left"):
        tokenize(split(TEXTS), encoder, cache=disk.path)
    (disk.path / "ballast").unlink()
    assert len(tokenize(split(TEXTS), encoder, cache=disk.path)) == len(TEXTS)
    disk.make_read_only()
    assert len(tokenize(split(TEXTS), encoder, cache=disk.path)) == len(TEXTS)
    with pytest.raises(StoreError, match="Read-only file system"):
        tokenize(split(["good"]), encoder, cache=disk.path)
