"""What is found wrong with labelled texts, what is mended, what is refused, and how the rest is split."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from datasets import Dataset, Features, Value

from tuneserve.errors import DataError
from tuneserve.tables.rows import format_label
from tuneserve.training.checks import Split, Splits, check, describe
from tuneserve.training.data import Source

Rows = list[tuple[str, str]]


def source(rows: Iterable[tuple[str, str]], where: str = "reviews.csv") -> Source:
    rows = list(rows)
    texts, labels = zip(*rows, strict=True)
    columns = {"row": range(2, len(rows) + 2), "text": texts, "label": labels}  # row 1 is a CSV's header
    features = Features({"row": Value("int64"), "text": Value("string"), "label": Value("string")})
    return Source(Dataset.from_dict(columns, features=features), where)


def numbered(sizes: Mapping[str, int], prefix: str = "text") -> Rows:
    """As many different texts of each class as asked for."""
    return [(f"{prefix} {label} {number}", label) for label, size in sizes.items() for number in range(size)]


def checked(splits: Mapping[str, Iterable[tuple[str, str]]], **changed: Any) -> Splits:
    settings = {"num_train": 0, "num_test": 0, "valid_fraction": 0.1, "test_fraction": 0.1, "seed": 1} | changed
    return check({name: source(rows, f"{name}.csv") for name, rows in splits.items()}, **settings)


def rows(splits: Splits, name: str) -> Rows:
    split: Split = getattr(splits, name)
    return [(text, splits.labels[label]) for text, label in zip(split.texts["text"], split.label_ids, strict=True)]


def refusal(splits: Mapping[str, Iterable[tuple[str, str]]], **changed: Any) -> str:
    with pytest.raises(DataError) as caught:
        checked(splits, **changed)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


ENOUGH = numbered({"bad": 40, "good": 40})
TEST = numbered({"bad": 10, "good": 10}, "test")
VALID = numbered({"bad": 10, "good": 10}, "valid")


def test_data_without_faults_are_used_whole() -> None:
    splits = checked({"train": ENOUGH, "valid": VALID, "test": TEST})
    assert rows(splits, "train") == ENOUGH
    assert rows(splits, "valid") == VALID
    assert rows(splits, "test") == TEST
    assert splits.labels == ["bad", "good"]
    assert splits.findings["counts"]["train"] == {"bad": 40, "good": 40}
    assert not any(value for value in splits.findings.values() if isinstance(value, int))


@pytest.mark.parametrize("empty", ["", " \t\n", "<br />", "<br><BR/> ", "\u00a0\u0085"])
def test_empty_texts_are_left_out_of_every_split_and_counted(empty: str) -> None:
    extra: Rows = [(empty, "bad"), (empty, "good")]
    splits = checked({"train": [*extra, *ENOUGH], "valid": [*VALID, *extra], "test": [extra[0], *TEST]})
    assert [rows(splits, name) for name in ("train", "valid", "test")] == [ENOUGH, VALID, TEST]
    assert splits.findings["empty_texts"] == {"train": 2, "valid": 2, "test": 1}
    assert splits.findings["contradicted_train_texts"] == 0


@pytest.mark.parametrize(
    "again", ["a text", "A TEXT", "  a\t text\n", "a<br />text", "a <br><br> Text", "a\u00a0text", "\u0085a text"]
)
def test_a_training_text_that_repeats_another_is_left_out(again: str) -> None:
    splits = checked(
        {"train": [("a text", "bad"), *ENOUGH, (again, "bad"), (again, "bad")], "test": TEST, "valid": VALID}
    )
    assert rows(splits, "train") == [("a text", "bad"), *ENOUGH]
    assert splits.findings["repeated_train_texts"] == 2


@pytest.mark.parametrize("other", ["a text!", "atext", "a texts", "a <b> text", "á text"])
def test_texts_that_differ_in_more_than_case_and_spaces_stay(other: str) -> None:
    splits = checked({"train": [("a text", "bad"), (other, "good"), *ENOUGH], "test": TEST, "valid": VALID})
    assert rows(splits, "train") == [("a text", "bad"), (other, "good"), *ENOUGH]


def test_a_training_text_with_two_labels_is_left_out_wherever_it_stands() -> None:
    train = [("mixed", "bad"), *ENOUGH, ("Mixed", "good"), ("mixed ", "bad"), ("twice", "bad"), ("twice", "bad")]
    splits = checked({"train": train, "test": TEST, "valid": VALID})
    assert rows(splits, "train") == [*ENOUGH, ("twice", "bad")]
    assert splits.findings["contradicted_train_texts"] == 3
    assert splits.findings["repeated_train_texts"] == 1


@pytest.mark.parametrize("split", ["valid", "test"])
def test_training_texts_that_are_also_held_out_leave_the_training(split: str) -> None:
    given = {"valid": VALID, "test": TEST}
    (first, label), *_ = given[split]
    train = [(first.upper(), label), *ENOUGH, (f"{first}<br/>", "good")]  # with another label it would be as bad
    splits = checked({"train": train, **given})
    assert rows(splits, "train") == ENOUGH
    assert rows(splits, split) == given[split]
    train = [(first.upper(), label), *ENOUGH]
    splits = checked({"train": train, **given})
    assert rows(splits, "train") == ENOUGH
    assert splits.findings[f"train_texts_also_in_{split}"] == 1


def test_a_given_test_stays_as_it_is() -> None:
    test = [*TEST, TEST[0], ("mixed", "bad"), ("mixed", "good"), VALID[0], ("<br />odd", "bad")]
    splits = checked({"train": ENOUGH, "valid": VALID, "test": test})
    assert rows(splits, "test") == test
    assert rows(splits, "valid") == VALID


def test_the_findings_are_told_in_sentences() -> None:
    train = [*ENOUGH, ENOUGH[0], ("mixed", "bad"), ("mixed", "good"), TEST[0], VALID[0], VALID[1], ("", "bad")]
    train = [("", ""), *train, (" ", "")]  # as a spreadsheet writes rows that were cleared
    lines = describe(checked({"train": train, "valid": VALID, "test": TEST}).findings)
    assert lines == [
        "train: 80 texts (bad 40, good 40)",
        "valid: 20 texts (bad 10, good 10)",
        "test: 20 texts (bad 10, good 10)",
        "1 training texts left out because they repeat another",
        "2 training texts left out because the same text carries two labels",
        "2 training texts left out because they are also in the validation texts",
        "1 training texts left out because they are also in the test texts",
        "3 empty texts left out of train",
    ]
    broken = checked({"train": numbered({"a\nb": 40, "c": 40})})
    assert "'a\\nb' " in describe(broken.findings)[0]  # one line all the same
    many = checked({"train": numbered({f"class {number}": 10 + number for number in range(9)})})
    assert describe(many.findings)[0].endswith("(9 classes of 8 to 14)")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["good", "bad", "Mixed"], ["Mixed", "bad", "good"]),
        (["10", "9", "-1"], ["-1", "9", "10"]),
        (["10", "9.5", "2.5"], ["2.5", "9.5", "10"]),
        (["10", "9", "ten"], ["10", "9", "ten"]),
        (["1", "01", "001"], ["001", "01", "1"]),
        (["10", "9", "inf"], ["10", "9", "inf"]),
        (["10", "9", "nan"], ["10", "9", "nan"]),
    ],
)
def test_labels_are_sorted_and_numbers_by_value_whatever_the_order_of_the_rows(
    names: list[str], expected: list[str]
) -> None:
    train = numbered(dict.fromkeys(names, 10))
    for order in (train, train[::-1]):
        splits = checked({"train": order, "test": order[:1], "valid": order[-1:]})
        assert splits.labels == expected
        assert set(rows(splits, "train")) <= set(train)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "one class": ({"train": numbered({"bad": 40})}, "train.csv has one class only, 'bad'"),
    "a class too small": (
        {"train": numbered({"bad": 40, "good": 1})},
        "train.csv: too few usable training texts of 'good' (1); 2 of each class are the least",
    ),
    "a class too small once mended": (
        {"train": [*numbered({"bad": 40, "good": 2}), ("text good 0", "bad")], "test": numbered({"good": 1, "bad": 1})},
        "of 'good' (1); 2 of each class are the least. Left out: contradicted_train_texts: 2, train_",
    ),
    "a class of copies": ({"train": [*numbered({"bad": 40}), *[("same", "good")] * 9]}, "'good' (1)"),
    "a label that is missing": ({"train": [*ENOUGH, ("text", "")]}, "row 82: the label is missing; write one"),
    "nothing but empty rows": ({"train": [("", "")] * 9}, "train.csv has no texts: all its rows are empty"),
    "a test label never shown": (
        {"train": ENOUGH, "test": [*TEST, ("text", "mixed")]},
        "test.csv, row 22: no training text has the label 'mixed'",
    ),
    "a validation label never shown": (
        {"train": ENOUGH, "valid": [("text", "Good")]},
        "valid.csv, row 2: no training text has the label 'Good'",
    ),
    "a training class that the test shows alone": (
        {"train": numbered({"bad": 40}), "test": TEST},
        "test.csv, row 12: no training text has the label 'good'",
    ),
    "a test of empty texts": ({"train": ENOUGH, "test": [("", "bad"), ("<br>", "good")]}, "No test texts are left"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_data_that_would_make_the_result_a_lie_are_refused(kind: str) -> None:
    splits, words = REFUSED[kind]
    assert words in refusal(splits)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_each_class_gives_its_share_to_the_test_and_then_to_validation(fraction: float) -> None:
    sizes = {"a": 400, "b": 40, "c": 200}
    splits = checked({"train": numbered(sizes)}, test_fraction=fraction, valid_fraction=fraction)
    counts = splits.findings["counts"]
    assert counts["test"] == {label: size * fraction for label, size in sizes.items()}
    rest = {label: size * (1 - fraction) for label, size in sizes.items()}
    assert counts["valid"] == pytest.approx({label: size * fraction for label, size in rest.items()}, abs=0.5)
    assert counts["train"] == {label: rest[label] - counts["valid"][label] for label in sizes}


@pytest.mark.parametrize("seed", range(5))
def test_a_split_keeps_every_class_in_every_part_and_no_text_in_two(seed: int) -> None:
    train = numbered({f"class {number}": 5 + number % 3 for number in range(77)})
    repeats = [(text.upper(), label) for text, label in train[::2]]
    splits = checked({"train": train + repeats}, test_fraction=0.01, valid_fraction=0.5, seed=seed)
    parts = [rows(splits, name) for name in ("train", "valid", "test")]
    assert all({label for _, label in part} == set(splits.labels) for part in parts)
    assert Counter(row for part in parts for row in part) == Counter(train)


def test_the_rows_of_a_split_are_a_random_share_and_not_the_first_ones() -> None:
    drawn = {checked({"train": ENOUGH}, seed=seed).test.texts["text"][0] for seed in range(8)}
    assert len(drawn) > 3


def test_the_same_seed_gives_the_same_split_and_another_seed_another() -> None:
    first, again, other = (checked({"train": ENOUGH}, num_train=50, num_test=6, seed=seed) for seed in (7, 7, 8))
    for name in ("train", "valid", "test"):
        assert rows(first, name) == rows(again, name)
        assert rows(first, name) != rows(other, name)


@pytest.mark.parametrize(
    ("given", "changed", "sizes"),
    [
        ({}, {"num_train": 40}, {"train": 36, "valid": 4, "test": 8}),
        ({}, {"num_train": 40, "num_test": 5}, {"train": 36, "valid": 4, "test": 5}),
        ({"valid": VALID}, {"num_train": 40}, {"train": 40, "valid": 20, "test": 8}),
        ({"test": TEST}, {"num_test": 7}, {"train": 72, "valid": 8, "test": 7}),
        ({"test": TEST, "valid": VALID}, {"num_train": 1000, "num_test": 1000}, {"train": 80, "valid": 20, "test": 20}),
    ],
)
def test_as_many_texts_are_drawn_as_asked_for(given: Any, changed: dict[str, int], sizes: dict[str, int]) -> None:
    splits = checked({"train": ENOUGH, **given}, **changed)
    assert {name: len(getattr(splits, name)) for name in sizes} == sizes
    assert set(rows(splits, "train")) <= set(ENOUGH)
    if "num_train" in changed and changed["num_train"] < 80:
        assert rows(splits, "train") != ENOUGH[: sizes["train"]]


def test_a_draw_that_misses_a_class_is_refused() -> None:
    splits = {"train": numbered({"common": 1000, "rare": 5}), "valid": numbered({"common": 5, "rare": 5}, "valid")}
    assert "hold none of 'rare'; raise NUM_TRAIN" in refusal(splits, num_train=10)


def test_a_draw_too_small_to_validate_on_is_refused_by_its_name() -> None:
    assert "NUM_TRAIN" in refusal({"train": ENOUGH, "test": TEST}, num_train=1)


@pytest.mark.parametrize(
    ("labels", "texts", "min_valid", "held_out"),
    [(20, 20, 40, 40), (20, 20, 41, 0), (40, 20, 40, 80), (40, 20, 41, 0), (400, 10, 40, 400), (400, 10, 41, 0)],
)
def test_many_labels_want_more_validation_texts_up_to_ten_times_as_many(
    labels: int, texts: int, min_valid: int, held_out: int
) -> None:
    sizes = {f"label {number}": texts for number in range(labels)}
    given = {"train": numbered(sizes), "test": numbered(dict.fromkeys(sizes, 1), "test")}
    splits = checked(given, min_valid=min_valid)
    assert len(splits.valid) == pytest.approx(held_out, rel=0.05)
    assert splits.cross_validates == (held_out == 0)


def test_a_fingerprint_changes_with_every_text_and_label_and_with_nothing_else() -> None:
    def fingerprint(train: Rows) -> str:
        return checked({"train": train}, seed=1).fingerprints["train"]

    (text, label), *rest = ENOUGH
    original = fingerprint(ENOUGH)
    assert len(original) == 64
    assert fingerprint(list(ENOUGH)) == original
    assert checked({"train": ENOUGH}, seed=2).fingerprints["train"] == original
    changed = [
        [(f"{text}.", label), *rest],
        [(text, "good"), *rest],
        rest,
        [*rest, (text, label)],
        [*ENOUGH, ("", label)],
    ]
    assert len({original, *map(fingerprint, changed)}) == 6
    assert set(checked({"train": ENOUGH, "test": TEST}).fingerprints) == {"train", "test"}


def test_a_fingerprint_tells_apart_what_runs_together() -> None:
    prints = {
        checked({"train": [*ENOUGH, *pair], "valid": VALID, "test": TEST}).fingerprints["train"]
        for pair in ([("ab", "bad"), ("c", "bad")], [("a", "bad"), ("bc", "bad")], [("abbadc", "bad")])
    }
    assert len(prints) == 3


def test_what_is_held_out_mostly_stays_so_when_data_grow_and_never_depends_on_their_order() -> None:
    train = numbered({"bad": 400, "good": 600})
    first = {name: set(rows(checked({"train": train}), name)) for name in ("valid", "test")}
    turned = {name: set(rows(checked({"train": train[::-1]}), name)) for name in first}
    assert turned == first
    grown = checked({"train": [*numbered({"bad": 100, "good": 20}, "more"), *train]})
    assert len(first["test"] - set(rows(grown, "test"))) <= 0.15 * len(first["test"])
    assert len(set(rows(grown, "test")) & set(train)) >= 0.85 * len(first["test"])


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("1.0", "1"),
        ("-2.00", "-2"),
        ("-0.0", "0"),
        ("0.0", "0"),
        ("01", "01"),
        ("01.0", "01.0"),
        ("1.10", "1.10"),
        (f"{'9' * 5000}.0", "9" * 5000),
        (1.0, "1"),
        (1.5, "1.5"),
        (True, "True"),
        (" cafe\u0301\u00a0", "caf\u00e9"),
        (None, ""),
        (float("nan"), ""),
    ],
)
def test_a_label_is_written_in_one_way_whatever_its_type(value: Any, label: str) -> None:
    assert format_label(value) == label
