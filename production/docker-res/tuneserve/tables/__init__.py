"""Tables of texts: read for training and scoring, and written with answers, by the same code.

`formats.py` lists the formats by file ending. A new one is a module with a class that has the methods of `Format`,
and a line in that list. Compression (`streams.py`) is independent of the format.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import count, islice
from typing import Any, BinaryIO, Protocol, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Answer:
    """What is written behind a row. A row that cannot be answered has an error and no label."""

    label: str | None
    score: float | None
    scores: dict[str, float] | None
    tokens: int | None
    truncated: bool | None
    error: str | None
    model_version: str


ANSWER_FIELDS = tuple(field.name for field in fields(Answer))


def answer_names(columns: Sequence[str]) -> dict[str, str]:
    """What each field of an answer is called in the output: `predicted_…`, where the input has a column of its name."""
    names = {}
    for field in ANSWER_FIELDS:
        name = field
        while name in columns:
            name = f"predicted_{name}"
        names[field] = name
    return names


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of a file, as its format holds them, or None where they were not wanted."""

    rows: Any
    numbers: Sequence[int]
    """The rows' numbers, as their author counts: the first line of a CSV is its header and has number 1."""

    where: str
    """What messages call the file."""

    share_read: float | None = None
    """The share of the file that ends with this chunk; None if the file's position says it."""


Wanted = Callable[[int], bool]
"""Whether a chunk is wanted; chunks are counted from 0."""


class Format(Protocol):
    """One kind of file. Files are given at their beginning; `where` is what messages call them.

    All methods raise DataError, which names the row, where a file is not what its ending says.
    """

    def read_columns(self, file: BinaryIO, where: str) -> list[tuple[str, str]]:
        """The columns' names, with the types of their values; none, when there is nothing to tell them from."""
        ...

    def read_chunks(
        self, file: BinaryIO, where: str, *, chunk_rows: int, wanted: Wanted, columns: Sequence[str] | None = None
    ) -> Iterator[Chunk]:
        """All chunks in order, at least one; a format that can read single columns reads `columns` alone."""
        ...

    def values(self, chunk: Chunk, columns: Sequence[str], name: str) -> list[Any]:
        """The values of the column `name`, whatever they are; `columns` are all that the file has."""
        ...

    def write(self, chunk: Chunk, columns: Sequence[str], answers: Sequence[Answer]) -> bytes:
        """A whole file with these rows, their answers behind them."""
        ...

    def join(self, parts: Iterable[bytes], columns: Sequence[str], file: BinaryIO) -> None:
        """Write what such files hold as one file."""
        ...


def cut(items: Iterator[tuple[int, Item]], where: str, chunk_rows: int, wanted: Wanted) -> Iterator[Chunk]:
    """Numbered rows in chunks, at least one even if it is empty; those that are not wanted are passed over."""
    for number in count():
        some = islice(items, chunk_rows)
        if wanted(number):
            held = list(some)
            n_rows = len(held)
            chunk = Chunk([item for _, item in held], [row for row, _ in held], where)
        else:
            n_rows = sum(1 for _ in some)
            chunk = Chunk(None, (), where)
        if n_rows or not number:
            yield chunk
        if n_rows < chunk_rows:
            return
