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
    """The columns appended to a row. A row that cannot be classified has an error and no label."""

    label: str | None
    score: float | None
    scores: dict[str, float] | None
    tokens: int | None
    truncated: bool | None
    error: str | None
    model_version: str
    abstain: bool | None = None


ANSWER_FIELDS = tuple(field.name for field in fields(Answer))


def answer_names(columns: Sequence[str]) -> dict[str, str]:
    """The column of each field of an answer in the output: `predicted_…` if the input has a column of that name."""
    names = {}
    for field in ANSWER_FIELDS:
        name = field
        while name in columns:
            name = f"predicted_{name}"
        names[field] = name
    return names


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of a file in the representation of its format, or None if they were not wanted."""

    rows: Any
    numbers: Sequence[int]
    """The rows' numbers as a spreadsheet shows them: the header of a CSV has number 1."""

    where: str
    """The file's name in messages."""

    share_read: float | None = None
    """The share of the file up to the end of this chunk; None if the file's position gives it."""


Wanted = Callable[[int], bool]
"""Whether a chunk is wanted; chunks are counted from 0."""


class Format(Protocol):
    """One kind of file. Files are passed at their beginning; `where` is their name in messages.

    All methods raise DataError, which names the row, if the content does not have this format.
    """

    def read_columns(self, file: BinaryIO, where: str) -> list[tuple[str, str]]:
        """The names of the columns and the types of their values; empty for a file without records."""
        ...

    def read_chunks(
        self, file: BinaryIO, where: str, *, chunk_rows: int, wanted: Wanted, columns: Sequence[str] | None = None
    ) -> Iterator[Chunk]:
        """All chunks in order, at least one; a format that can read single columns reads only `columns`."""
        ...

    def values(self, chunk: Chunk, columns: Sequence[str], name: str) -> list[Any]:
        """The values of the column `name`, of any type; `columns` are all columns of the file."""
        ...

    def write(self, chunk: Chunk, columns: Sequence[str], answers: Sequence[Answer]) -> bytes:
        """A complete file with these rows and their answers."""
        ...

    def join(self, parts: Iterable[bytes], columns: Sequence[str], file: BinaryIO) -> None:
        """Write the rows of such files as one file."""
        ...


def cut(items: Iterator[tuple[int, Item]], where: str, chunk_rows: int, wanted: Wanted) -> Iterator[Chunk]:
    """Numbered rows in chunks, at least one even if it is empty; unwanted chunks have no rows."""
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
