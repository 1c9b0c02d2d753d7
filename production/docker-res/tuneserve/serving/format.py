"""What a kind of file must be able to do to be scored: be read a chunk at a time and be written with answers."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, BinaryIO, Protocol


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
    """Some rows of a file, as its format holds them, or None where they were not wanted; and the share read so far."""

    rows: Any
    share_read: float


class Format(Protocol):
    """One kind of file. Files are given at their beginning; `where` is what messages call them.

    All methods raise DataError, which names the row, where a file is not what its ending says.
    """

    def read_columns(self, file: BinaryIO, where: str) -> dict[str, str]:
        """The columns' names, with what they hold; none, when there is nothing to tell them from."""
        ...

    def read_chunks(
        self, file: BinaryIO, where: str, *, chunk_rows: int, n_bytes: int, wanted: Callable[[int], bool]
    ) -> Iterator[Chunk]:
        """All chunks in order, at least one; `wanted` is asked with a chunk's place in the file, from 0."""
        ...

    def texts(self, rows: Any, columns: Sequence[str], text_column: str) -> list[Any]:
        """The values of the text column, whatever they are."""
        ...

    def write(self, rows: Any, columns: Sequence[str], answers: Sequence[Answer]) -> bytes:
        """A file of its own with these rows, their answers behind them."""
        ...

    def join(self, parts: Iterable[bytes], columns: Sequence[str], file: BinaryIO) -> None:
        """Write what such files hold as one file."""
        ...
