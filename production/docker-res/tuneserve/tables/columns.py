"""Which columns hold the text and the label, and what a value says: one rule for training and for scoring files."""

import math
from collections.abc import Sequence
from typing import Any

from tuneserve.errors import DataError

TEXT_NAMES = {"text", "sentence", "review", "content", "comment", "message", "document", "body", "tweet", "question"}
LABEL_NAMES = {"label", "labels", "sentiment", "category", "class", "target", "intent", "coarse_label"}

NO_TEXTS = ("binary", "large_binary", "fixed_size_binary", "list", "large_list", "fixed_size_list", "struct", "map")
"""How the names of Parquet's types begin that cannot be read as a text."""


def find_columns(names: Sequence[str], *, text: str = "", label: str = "") -> tuple[str, str]:
    """The names of the text's and the label's column; each is the one asked for, else the only one that could be meant.

    A name that cannot be told is empty; one that was asked for is given back even where no column has it.
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
    """Refuse a column whose type is not one text or number a row.

    Raises:
        DataError: it is not.
    """
    if kind.startswith(NO_TEXTS):
        raise DataError(f"{where}: the column {name!r} holds {kind}, not one text or number a row.")


def format_value(value: Any) -> str:
    """A value as text; a missing one as an empty text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    # A column with gaps turns whole numbers into floats; that is undone.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
