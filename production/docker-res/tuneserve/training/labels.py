"""Label names: which are spellings of one label, and which look like something else than the name of a class."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from tuneserve.tables.rows import MOST_NORMALIZED, enumerate_some, shorten

OTHER = "other"
"""The label that rare ones are joined as."""

NUMBER = re.compile(r"[+-]?[0-9]{1,14}(\.[0-9]{1,14})?")
MISSING = {"nan", "null", "none", "na", "n/a", "<na>", "nat", "#n/a", "\\n"}
"""Words, casefolded, that programs write where a value is missing."""

MOST_FRACTIONS = 20
"""Different numbers, some with decimals, that may still be classes: half stars, say."""

MOST_INTEGERS = 100
TEXTS_PER_INTEGER = 20
"""More whole numbers than these, with fewer texts each, are a scale and no classes."""

SEPARATORS = "|,;"
SHOWN = 5
"""Labels that a message or finding names."""


def sort_labels(names: Iterable[str]) -> list[str]:
    """Label names in the order of their ids: numbers by value, words by their letters."""
    try:
        return sorted(names, key=lambda name: (_number(name), name))
    except ValueError:
        return sorted(names)


def _number(name: str) -> float:
    number = float(name)
    if not math.isfinite(number):  # "nan" and "inf" are words
        raise ValueError(name)
    return number


def fold(name: str) -> str:
    """Equal for names that differ only in case, spaces, Unicode form or the format of a number."""
    if len(name) > MOST_NORMALIZED:
        return name
    visible = "".join(one for one in unicodedata.normalize("NFKC", name) if unicodedata.category(one) != "Cf")
    words = " ".join(visible.casefold().split())
    return str(Decimal(words).normalize()) if NUMBER.fullmatch(words) else words or name


def find_alike(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Groups of names that fold to the same, by the one that most texts have.

    Args:
        sizes: training texts of each name.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(sizes):
        groups.setdefault(fold(name), []).append(name)
    return {max(group, key=lambda name: sizes[name]): group for group in groups.values() if len(group) > 1}


def look_like_numbers(sizes: Mapping[str, int]) -> bool:
    """Whether the labels measure something: numbers with decimals, or whole ones with few texts each."""
    try:
        numbers = [_number(name.replace(",", ".").rstrip("%")) for name in sizes if name.casefold() not in MISSING]
    except ValueError:
        return False
    if any(not number.is_integer() for number in numbers):
        return len(numbers) > MOST_FRACTIONS
    return len(numbers) > MOST_INTEGERS and sum(sizes.values()) < TEXTS_PER_INTEGER * len(numbers)


def count_numbers(names: Sequence[str]) -> int:
    """How many labels there are if all are numbers and there are many; else 0."""
    return len(names) if len(names) > MOST_INTEGERS and all(map(NUMBER.fullmatch, names)) else 0


def find_combined(names: Sequence[str]) -> list[str]:
    """Names that seem to be several labels: written as a list, or of parts that other names have too."""
    parts = {name: {part.strip() for part in re.split(f"[{SEPARATORS}]", name)} - {""} for name in names}
    known, shared = set(names), Counter(part for one in parts.values() for part in one)
    return [
        name
        for name, one in parts.items()
        if re.fullmatch(r"\[.*\]", name) or (len(one) > 1 and (one & known or all(shared[part] > 1 for part in one)))
    ]


def find_missing(names: Iterable[str]) -> list[str]:
    """Names that programs write where a value is missing."""
    return [name for name in names if name.casefold() in MISSING]


def name_labels(names: Iterable[str]) -> str:
    """Labels for a message: the first of them, in quotes, and how many more there are."""
    return enumerate_some(map(quote, names), SHOWN)


def quote(name: str) -> str:
    """A label in quotes for a message, cut short."""
    return repr(shorten(name))


def describe(findings: Mapping[str, Any]) -> Iterator[str]:
    """What `checks` found about the labels, in sentences."""
    if alike := findings.get("alike_labels"):
        groups = [
            " and ".join(f"{quote(name)} ({size})" for name, size in list(group.items())[:3])
            for group in alike["examples"][:3]
        ]
        more = f" and {alike['groups'] - len(groups)} more" if alike["groups"] > len(groups) else ""
        yield (
            f"labels differ only in case, spaces, Unicode form or number format: {'; '.join(groups)}{more}; "
            f"{'they are joined' if alike['merged'] else 'LABELS=merge joins them'}"
        )
    if combined := findings.get("combined_labels"):
        yield (
            f"labels look like several in one: {name_labels(combined)}; each combination is a class of its own, for a "
            "text with several labels is not supported"
        )
    if count := findings.get("numbers_as_labels"):
        yield f"labels are {count} different numbers; if they measure something, put them into classes"
    if missing := findings.get("missing_labels"):
        yield f"labels may mean that the label is missing: {name_labels(missing)}; they are classes like any other"
    if rare := findings.get("rare_labels"):
        texts = ", ".join(f"{count} {split} texts" for split, count in rare["texts"].items() if count)
        what = f"joined as {quote(rare['joined_as'])}" if rare["joined_as"] else "left out"
        yield f"{rare['labels']} rare labels with {texts or 'no texts'} {what}, such as {name_labels(rare['examples'])}"
