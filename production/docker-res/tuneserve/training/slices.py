"""What the data's other columns say of the test texts (channel, country), by which a report looks at accuracy."""

import logging
from collections.abc import Sequence

from tuneserve.errors import DataError
from tuneserve.lifecycle.evidence import key_of
from tuneserve.logs import in_one_line
from tuneserve.tables.rows import NOT_TEXT, counts_rows, format_value, read_types, read_values, shorten
from tuneserve.training.data import Source

logger = logging.getLogger(__name__)

MOST_COLUMNS = 12
MOST_VALUES = 20
"""Of a column that divides texts into groups; one of more values is a text or a number of its own."""


def read_slices(source: Source | None, texts: Sequence[str]) -> dict[str, list[str]]:
    """The values of other columns for each of these texts, by the columns' names; none where they cannot be read.

    Args:
        source: that the texts were drawn from.
        texts: as they were read there.
    """
    if source is None or source.columns is None or not source.files:
        return {}
    wanted = {key_of(text): index for index, text in enumerate(texts)}
    found: dict[str, list[str]] = {}
    try:
        for file in source.files:
            types = read_types(file, file.name)
            text, label = source.columns.text, source.columns.label
            others = [name for name, kind in types if name not in (text, label) and _may_divide(name, kind)]
            others = others[:MOST_COLUMNS]
            if text not in [name for name, _ in types]:
                raise DataError(f"{file.name} no longer has a column {text!r}.")
            if not others:
                continue
            for value, *values in read_values(file, file.name, types, [text, *others]):
                if (index := wanted.get(key_of(format_value(value)))) is not None:
                    for name, one in zip(others, values, strict=True):
                        found.setdefault(name, [""] * len(texts))[index] = shorten(one.strip())
    except Exception as error:  # they were there when the texts were read; readers raise whatever has met them since
        logger.warning("other columns of the data cannot be read, and the report lacks them: %s", in_one_line(error))
        return {}
    return {name: values for name, values in found.items() if 2 <= len(set(values) - {""}) <= MOST_VALUES}


def _may_divide(name: str, kind: str) -> bool:
    return bool(name) and not counts_rows(name) and not kind.startswith(NOT_TEXT)
