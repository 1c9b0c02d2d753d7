"""Texts and labels: which columns hold them, how values become text, and the labelled rows of one local file.

Rows are numbered as their author counts them. Scoring finds columns and formats values by the same rules.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from tuneserve.errors import DataError
from tuneserve.tables.formats import FileType, file_type
from tuneserve.text import has_surrogates

TEXT_NAMES = {"text", "sentence", "review", "content", "comment", "message", "document", "body", "tweet", "question"}
LABEL_NAMES = {"label", "labels", "sentiment", "category", "class", "target", "intent", "coarse_label"}

NOT_TEXT = ("binary", "large_binary", "fixed_size_binary", "list", "large_list", "fixed_size_list", "struct", "map")
"""Prefixes of the names of Parquet's types that cannot be read as text."""

INDEX = re.compile(r"(unnamed: ?[0-9]+.*|(__)?(index|level_[0-9]+|index_level_[0-9]+)(__)?)?", re.IGNORECASE)
"""Names that pandas gives to an index; a cell without a name is one too."""

ID = re.compile(r"#|(.*[\W_])?([Ii][Dd]|idx|index|nr|row|key|uuid|guid)|.*[a-z]I[Dd]")
"""Names of columns that count or name rows."""

INTEGRAL = re.compile(r"(-?)(0|[1-9][0-9]*)\.0+")

MOST_NORMALIZED = 1000
"""Characters of a label beyond which it is left as it is: to order combining marks takes the square of their number."""

NESTED = {
    "messages": "chats; write what is asked as text and what is answered as label",
    "conversations": "chats; write what is asked as text and what is answered as label",
    "annotations": "tasks of Label Studio; export them as CSV or JSON-MIN",
    "predictions": "tasks of Label Studio; export them as CSV or JSON-MIN",
    "completions": "tasks of Label Studio; export them as CSV or JSON-MIN",
}
"""Fields of known exports whose records hold no text and label of their own, and how such a file is flattened."""

BATCH_ROWS = 1000
BATCH_CHARACTERS = 1 << 20
"""Most rows in memory at once, and most characters of their texts."""

SHOWN_CHARACTERS = 40
"""Of a name from the data in messages."""

NAME_CHARACTERS = 100
"""Beyond these a cell of the first row is no column's name."""

NAME_WORDS = 3
"""Beyond these the first row of a single column is no name either."""

MARKS = {"0", "1", "false", "true"}
"""Values of a column that says whether a text has one of several labels."""

CHUNK_ROWS = 200
"""Rows that are read at once: few, since texts may be long."""


@dataclass(frozen=True)
class Columns:
    """The columns that hold the text and the label; an empty name is to be found."""

    text: str = ""
    label: str = ""


Row = tuple[int, str, str]
"""A row's number (the first line of a file is 1), its text, and its label, empty if it is missing."""

Types = Sequence[tuple[str, str]]
"""The names of a table's columns and the types of their values."""

Find = Callable[[Types], Columns]
"""From a file's columns to the two to be read; raises DataError if they cannot be determined."""

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


def shorten(name: str) -> str:
    """A name from the data as a message may show it."""
    name = name or "(unnamed)"
    return name if len(name) <= SHOWN_CHARACTERS else f"{name[:SHOWN_CHARACTERS]}…"


def enumerate_some(names: Iterable[str], most: int = 12) -> str:
    """Names with commas, and how many more there are."""
    listed = list(names)
    more = [f"and {len(listed) - most} more"] if len(listed) > most else []
    return ", ".join([*listed[:most], *more])


def find_columns(names: Sequence[str], *, text: str = "", label: str = "") -> tuple[str, str]:
    """The names of the text's and the label's column; each is the one asked for, else the only candidate.

    A name that cannot be determined is empty; one that was asked for is returned even if no column has it. Of two
    columns the second is the other one, unless its name says that it counts the rows.
    """
    label = label or _only([name for name in names if name.casefold() in LABEL_NAMES and name != text])
    text = text or _only([name for name in names if name.casefold() in TEXT_NAMES and name != label])
    if len(names) == 2 and (text in names) != (label in names):
        other = next(name for name in names if name not in (text, label))
        if not counts_rows(other):
            text, label = text or other, label or other
    return text, label


def counts_rows(name: str) -> bool:
    """Whether the name of a column, perhaps an empty one, says that it numbers the rows."""
    return bool(INDEX.fullmatch(name) or ID.fullmatch(name))


def _only(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ""


def require_columns(types: Types, wanted: Columns, where: str, *, labelled: bool = True) -> Columns:
    """The columns of a table's text and, if it should be `labelled`, of its label.

    Raises:
        DataError: saying which cannot be determined, and how to name it.
    """
    names = [name for name, _ in types]
    text, label = find_columns(names, text=wanted.text, label=wanted.label)
    if not labelled and not text and len(names) == 1 and not counts_rows(names[0]) and not set(names) & set(NESTED):
        text = "" if _is_headless(types) else names[0]
    columns = {"text": text, "label": label} if labelled else {"text": text}
    unknown = {kind: name for kind, name in columns.items() if name not in names or not name}
    if unknown:
        missing = " and ".join(
            f"has no column {shorten(name)!r}" if name else f"does not say which column holds the {kind}"
            for kind, name in unknown.items()
        )
        needed = " and ".join(f"{kind.upper()}_COLUMN" for kind in unknown)
        if _is_headless(types):
            cells = ", ".join(repr(shorten(name)) for name in names[:4])
            raise DataError(
                f"{where}, row 1 does not look like column names: {cells}. Put a line such as text,label in front of "
                f"it, or set {needed} if these are names."
            )
        nested = (f"It holds {words}, one record a line" for name, words in NESTED.items() if name in names)
        way = next(nested, f"Set {needed}")
        if types[0][1] == "text" and not (text or label):  # no name is known
            way += ". If row 1 holds no names, put a line such as text,label in front of it"
        raise DataError(f"{where} {missing}; its columns are {enumerate_some(map(shorten, names))}. {way}.")
    if labelled and text == label:
        raise DataError(f"{where}: text and label cannot be the same column, {text!r}.")
    for name in columns.values():
        check_type(name, dict(types)[name], where)
    return Columns(text, label)


def _is_headless(types: Types) -> bool:
    """Whether the first row of a file with cells holds values: a number, a long text."""
    return any(
        kind == "text" and (len(name) > NAME_CHARACTERS or "\n" in name or _is_number(name)) for name, kind in types
    ) or (len(types) == 1 and types[0][1] == "text" and len(types[0][0].split()) > NAME_WORDS)


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


def check_type(name: str, kind: str, where: str) -> None:
    """Check that a column holds one text or number a row.

    Raises:
        DataError: it does not.
    """
    if kind.startswith(NOT_TEXT):
        raise DataError(f"{where}: the column {name!r} holds {shorten(kind)}, not one text or number a row.")


def format_value(value: Any) -> str:
    """A value as text; an empty text for a missing one."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    # A column with missing values turns integers into floats, which is undone.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def format_label(value: Any) -> str:
    """A label as it is stored and compared, whatever the format: NFC, no spaces around it, and `1.0` is `1`."""
    label = format_value(value).strip()
    if len(label) <= MOST_NORMALIZED:
        label = unicodedata.normalize("NFC", label).strip()
    whole = INTEGRAL.fullmatch(label)
    if whole is None:
        return label
    sign, digits = whole.groups()
    return digits if digits == "0" else sign + digits


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
        try:
            columns = find(types)
        except DataError as error:
            with path.open("rb") as raw, kind.reading(raw, where) as file:
                raise DataError(f"{error}{_name_indicators(kind, file, where, types)}") from None
        with path.open("rb") as raw, kind.reading(raw, where) as file:
            for chunk in kind.format.read_chunks(
                file, where, chunk_rows=CHUNK_ROWS, wanted=lambda _: True, columns=[columns.text, columns.label]
            ):
                texts, labels = (kind.format.values(chunk, names, name) for name in (columns.text, columns.label))
                for row, text, label in zip(chunk.numbers, texts, labels, strict=True):
                    here = f"{where}, row {row}"
                    yield row, _check(text, columns.text, here), format_label(_check(label, columns.label, here))
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror or error}") from error


def read_types(path: Path, where: str) -> Types:
    """A file's columns; see `read_file`."""
    kind = file_type(path.name, where)
    with path.open("rb") as raw, kind.reading(raw, where) as file:
        return kind.format.read_columns(file, where)


def read_values(path: Path, where: str, types: Types, wanted: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The values of some columns as text, row by row; see `read_file`.

    Args:
        path: of the file.
        where: its name in messages.
        types: all its columns.
        wanted: names of those to be read.
    """
    kind = file_type(path.name, where)
    names = [name for name, _ in types]
    with path.open("rb") as raw, kind.reading(raw, where) as file:
        for chunk in kind.format.read_chunks(
            file, where, chunk_rows=CHUNK_ROWS, wanted=lambda _: True, columns=list(wanted)
        ):
            columns = [map(format_value, kind.format.values(chunk, names, name)) for name in wanted]
            yield from zip(*columns, strict=True)


def _name_indicators(kind: FileType, file: BinaryIO, where: str, types: Types) -> str:
    """A sentence about the columns that hold only 0 and 1, if there are several: each could be a label."""
    chunk = next(kind.format.read_chunks(file, where, chunk_rows=CHUNK_ROWS, wanted=lambda number: number == 0))
    names = [name for name, _ in types]
    single = [name for name, one in types if not one.startswith(NOT_TEXT) and not counts_rows(name)]
    marks = [
        name
        for name in single
        if {format_label(value).casefold() for value in kind.format.values(chunk, names, name)} <= MARKS
    ]
    if len(marks) < 2:
        return ""
    return (
        f" {enumerate_some(map(shorten, marks), 5)} hold only 0 and 1. A text with several labels is not supported, "
        "but LABEL_COLUMN may name one of them."
    )


def _check(value: Any, name: str, here: str) -> str:
    """The value as text; raises DataError where it is not one value or not Unicode."""
    if isinstance(value, dict | list):
        raise DataError(
            f"{here}: the column {name!r} holds lists or records, not one value a row; a text with several labels is "
            "not supported."
        )
    text = format_value(value)
    if has_surrogates(text):
        raise DataError(f"{here}: half a surrogate pair is not Unicode text.")
    return text
