"""Labels that are probably wrong: `MODEL_PATH/evidence/<id>/label-issues.csv`, which a version's report repeats.

It stands beside the version and not in it, as all texts do; with its report, a version has it too.
"""

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from tuneserve.errors import StoreError
from tuneserve.files import read_bytes, replace_file

LABEL_ISSUES = "label-issues.csv"
MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class LabelIssue:
    """A text whose label is probably wrong, in the words of the data."""

    split: str
    text: str
    given: str
    likely: str
    probability: float
    """Of the given label, by a model that has not learned from the text."""


COLUMNS = [one.name for one in fields(LabelIssue)]


def render_label_issues(issues: Sequence[LabelIssue]) -> bytes:
    """The file's content, in the order given.

    Texts are written as they are in the data, where they must be found again, also those that begin with `=`, `+`, `-`
    or `@`, which a spreadsheet takes for a formula: such a program should import the columns as text.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([*astuple(one)[:-1], f"{one.probability:.4f}"] for one in issues)
    return file.getvalue().encode()


def write_label_issues(folder: Path, issues: Sequence[LabelIssue]) -> None:
    """Put them into a folder.

    Raises:
        StoreError: the disk refuses.
    """
    try:
        replace_file(folder / LABEL_ISSUES, render_label_issues(issues))
    except OSError as error:
        raise StoreError(f"{folder / LABEL_ISSUES} cannot be written: {error}") from error


def read_label_issues(folder: Path) -> list[LabelIssue] | None:
    """Those of a folder; None if they were not looked for.

    Raises:
        StoreError: the file cannot be read.
    """
    path = folder / LABEL_ISSUES
    try:
        csv.field_size_limit(sys.maxsize)
        content = read_bytes(path, max_bytes=MAX_BYTES).decode()
        rows = list(csv.reader(io.StringIO(content, newline=""), strict=True))
        if rows[:1] != [COLUMNS]:
            raise ValueError(f"it should have the columns {', '.join(COLUMNS)}")
        return [LabelIssue(split, text, given, likely, float(p)) for split, text, given, likely, p in rows[1:]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, csv.Error) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
