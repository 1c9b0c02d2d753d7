"""Texts and labels: which columns hold them, how values become text, and the labelled rows of one local file.

Rows are numbered as their author counts them. Scoring finds columns and formats values by the same rules.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tuneserve.errors import DataError
from tuneserve.tables.formats import file_type
from tuneserve.text import has_surrogates

TEXT_NAMES = {"text", "sentence", "review", "content", "comment", "message", "document", "body", "tweet", "question"}
LABEL_NAMES = {"label", "labels", "sentiment", "category", "class", "target", "intent", "coarse_label"}

NOT_TEXT = ("binary", "large_binary", "fixed_size_binary", "list", "large_list", "fixed_size_list", "struct", "map")
"""Prefixes of the names of Parquet's types that cannot be read as text."""

BATCH_ROWS = 1000
BATCH_CHARACTERS = 1 << 20
"""Most rows in memory at once, and most characters of their texts."""

CHUNK_ROWS = 200
"""Rows that are read at once: few, since texts may be long."""


@dataclass(frozen=True)
class Columns:
    """The columns that hold the text and the label; an empty name is to be found."""

    text: str = ""
    label: str = ""


Row = tuple[int, str, str]
"""A row's number (the first line of a file is 1), its text, and its label, empty if it is missing."""

Find = Callable[[list[str]], Columns]
"""From a file's column names to the two to be read; raises DataError if they cannot be determined."""

Item = TypeVar("Item")


def in_batches(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """The items in order, as many at once as should be in memory; `size` gives an item's characters."""
    batch: list[Item] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += size(item)
        if len(batch) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def find_columns(names: Sequence[str], *, text: str = "", label: str = "") -> tuple[str, str]:
    """The names of the text's and the label's column; each is the one asked for, else the only candidate.

    A name that cannot be determined is empty; one that was asked for is returned even if no column has it.
    """
    label = label or _only([name for name in names if name.casefold() in LABEL_NAMES and name != text])
    text = text or _only([name for name in names if name.casefold() in TEXT_NAMES and name != label])
    if len(names) == 2 and (text in names) != (label in names):  # two columns, one of them known
        text = text or next(name for name in names if name != label)
        label = label or next(name for name in names if name != text)
    return text, label


def _only(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ""


def check_type(name: str, kind: str, where: str) -> None:
    """Check that a column holds one text or number a row.

    Raises:
        DataError: it does not.
    """
    if kind.startswith(NOT_TEXT):
        raise DataError(f"{where}: the column {name!r} holds {kind}, not one text or number a row.")


def format_value(value: Any) -> str:
    """A value as text; an empty text for a missing one."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    # A column with missing values turns integers into floats, which is undone.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def read_file(path: Path, where: str, find: Find) -> Iterator[Row]:
    """The rows of a file of any known format; `where` is its name in messages.

    Raises:
        DataError: naming the file, the line or row, and the fault.
    """
    kind = file_type(path.name, where)
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{where} is empty.")
        with path.open("rb") as raw, kind.reading(raw, where) as file:
            types = kind.format.read_columns(file, where)
        if not types:
            return
        names = [name for name, _ in types]
        columns = find(names)
        for name in (columns.text, columns.label):
            check_type(name, dict(types)[name], where)
        with path.open("rb") as raw, kind.reading(raw, where) as file:
            for chunk in kind.format.read_chunks(
                file, where, chunk_rows=CHUNK_ROWS, wanted=lambda _: True, columns=[columns.text, columns.label]
            ):
                texts, labels = (kind.format.values(chunk, names, name) for name in (columns.text, columns.label))
                for row, text, label in zip(chunk.numbers, texts, labels, strict=True):
                    here = f"{where}, row {row}"
                    yield row, _check(text, columns.text, here), _check(label, columns.label, here).strip()
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror or error}") from error


def _check(value: Any, name: str, here: str) -> str:
    """The value as text; raises DataError where it is not one value or not Unicode."""
    if isinstance(value, dict | list):
        raise DataError(f"{here}: the column {name!r} holds lists or records, not one value a row.")
    text = format_value(value)
    if has_surrogates(text):
        raise DataError(f"{here}: half a surrogate pair is not Unicode text.")
    return text
