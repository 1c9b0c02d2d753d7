"""What a version answered to the texts of its test: `MODEL_PATH/evidence/<id>/answers.json`, which its report reads."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from tuneserve.errors import StoreError
from tuneserve.files import read_record, replace_file

ANSWERS = "answers.json"
MAX_BYTES = 256 << 20

Span = tuple[int, int]


@dataclass(frozen=True)
class Words:
    """What spoke for the wrong label of a text, by its place among the texts; see `Explanation`."""

    text: int
    spans: list[Span]
    weights: list[float]


@dataclass(frozen=True)
class Answers:
    """Of each text of the evidence, in its order.

    `scores` are float [texts, labels], in the order of the version's labels, of a text that it cannot read none;
    `tokens` how many were read; `truncated` whether that was only the beginning; `words` those of the most confident
    mistakes; `before` the labels that the version `champion` gave, if it was compared with one.
    """

    scores: list[list[float]]
    tokens: list[int]
    truncated: list[bool]
    words: list[Words] = field(default_factory=list)
    champion: str | None = None
    before: list[str | None] | None = None


SHAPE = TypeAdapter(Answers)


def write_answers(folder: Path, answers: Answers) -> None:
    """Put them beside the evidence.

    Raises:
        OSError: the disk refuses.
    """
    replace_file(folder / ANSWERS, json.dumps(asdict(answers), allow_nan=False).encode())


def read_answers(folder: Path) -> Answers | None:
    """The answers; None if there are none.

    Raises:
        StoreError: they cannot be read.
    """
    try:
        return read_record(folder / ANSWERS, SHAPE, max_bytes=MAX_BYTES)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder / ANSWERS} cannot be read: {error}") from error
