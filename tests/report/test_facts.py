"""What a report says follows from the answers: groups, mistakes with their words, the champion, labels of people."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tuneserve.artifact import Version
from tuneserve.lifecycle.answers import Answers, Words
from tuneserve.lifecycle.evidence import Evidence
from tuneserve.report.facts import Facts, Piece, bought, clean, cut_up, gather
from tuneserve.settings import Settings

LABELS = ["bad", "good"]


def version(name: str = "one", **metadata: Any) -> Version:
    return Version(Path("/nowhere") / name, {"labels": LABELS, **metadata})


def facts(
    scores: list[list[float]], labels: list[str], *, own: int | None = None, columns: Any = None, **changed: Any
) -> Facts:
    """The facts of a version whose calibration halved the logits."""
    texts = [f"text {number}" for number in range(len(labels))]
    answers = {"tokens": [5] * len(texts), "truncated": [False] * len(texts), **changed}
    return gather(
        version(
            calibration={"temperature": 2.0},
            metrics={"test": {"accuracy": 0.75}},
            data={"counts": {"test": {"bad": 4}}},
        ),
        None,
        Evidence(texts, labels, own=own, columns=columns or {}),
        Answers(scores, **answers),
        findings=[],
    )


SURE, UNSURE, WRONG = [0.1, 0.9], [0.4, 0.6], [0.8, 0.2]


def test_the_matrix_has_true_labels_as_rows_and_counts_the_owners_texts_alone() -> None:
    found = facts([SURE, SURE, WRONG, WRONG], ["good", "bad", "good", "bad"], own=3)
    assert found.confusion is not None
    assert found.confusion.tolist() == [[0, 1], [1, 1]]
    assert found.texts == 3
    assert sorted(found.confused) == [("bad", "good", 1), ("good", "bad", 1)]


def test_mistakes_come_by_confidence_with_where_their_labels_are_from() -> None:
    words = [Words(1, [(0, 4), (5, 6)], [0.4, -0.2])]
    found = facts([UNSURE, SURE, SURE], ["bad", "bad", "good"], own=1, words=words)
    assert [(one.predicted, one.confidence, one.from_feedback) for one in found.mistakes] == [
        ("good", 0.9, True),
        ("good", 0.6, False),
    ]
    assert found.mistaken == 2
    assert found.mistakes[0].pieces == [Piece("text", 1.0), Piece(" "), Piece("1", -0.5)]
    assert found.mistakes[1].pieces == [Piece("text 0")]


def test_a_text_that_cannot_be_read_is_a_mistake_of_no_confidence() -> None:
    found = facts([[], SURE], ["good", "good"])
    [mistake] = found.mistakes
    assert (mistake.predicted, mistake.confidence) == ("(not read)", 0.0)
    assert found.confusion is not None
    assert found.confusion.sum() == 1


def test_before_calibration_the_logits_were_as_many_times_larger() -> None:
    found = facts([SURE] * 4, ["good", "good", "good", "bad"])
    [after], [before] = found.after, found.before
    assert (after.confidence, after.accuracy, after.texts) == pytest.approx((0.9, 0.75, 4))
    assert before.confidence == pytest.approx(0.81 / 0.82)  # odds of 9, squared
    assert before.accuracy == 0.75


def test_lengths_cover_every_text_once_and_cut_ones_are_apart() -> None:
    tokens = [2, 3, 3, 3, 8, 9, 12, 20, 21, 64]
    found = facts([SURE] * 10, ["good"] * 10, tokens=tokens, truncated=[False] * 9 + [True])
    assert sum(group.texts for group in found.lengths) == 10
    assert (found.lengths[-1].name, found.lengths[-1].texts) == ("cut", 1)
    assert found.lengths[0].name.startswith("2 to ")
    assert found.lengths[-2].name.endswith(" to 21")


def test_texts_of_one_length_are_one_group() -> None:
    [group] = facts([SURE] * 4, ["good"] * 4).lengths
    assert (group.name, group.texts, group.accuracy, group.high) == ("5", 4, 1.0, pytest.approx(1.0))


def test_columns_divide_the_owners_texts_and_one_of_a_single_value_says_nothing() -> None:
    columns = {"channel": ["app", "", "app"], "year": ["1", "1", "1"]}
    found = facts([SURE, SURE, WRONG, SURE], ["good", "good", "good", "bad"], own=3, columns=columns)
    [(name, groups)] = found.slices.items()
    assert name == "channel"
    assert [(group.name, group.texts, group.accuracy) for group in groups] == [("app", 2, 0.5), ("(empty)", 1, 1.0)]


def test_both_versions_are_counted_on_the_owners_texts_and_what_differs_is_shown() -> None:
    scores = [SURE, SURE, WRONG, SURE, SURE]
    labels = ["good", "good", "good", "bad", "bad"]
    found = facts(scores, labels, own=4, champion="old", before=["good", "bad", "good", None, "bad"]).comparison
    assert found is not None
    assert (found.champion, found.both, found.only_new, found.only_old, found.neither) == ("old", 1, 1, 1, 1)
    assert [(one.text, one.before) for one in found.gained] == [("text 1", "bad")]
    assert [(one.text, one.predicted) for one in found.lost] == [("text 2", "bad")]


def test_answers_to_other_texts_are_none() -> None:
    found = gather(version(), None, Evidence(["a", "b"], LABELS), Answers([SURE], [1], [False]), findings=[])
    assert (found.texts, found.confusion, found.mistakes) == (0, None, [])


def test_an_interval_is_that_of_the_whole_test() -> None:
    found = facts([SURE], ["good"])
    assert found.interval == pytest.approx((0.3006, 0.9544), abs=1e-3)  # three of four


def test_a_long_text_is_shortened_and_words_behind_it_are_left_out() -> None:
    pieces = cut_up("x" * 2000 + " end", Words(0, [(0, 2000), (2001, 2004)], [1.0, 1.0]))
    assert [(len(piece.text), piece.weight) for piece in pieces] == [(1201, 0.0)]
    assert pieces[0].text.endswith("…")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("nul \x00 bell \x07", "nul � bell �"),
        ("turned \u202egnp.exe", "turned �gnp.exe"),
        ("👩\u200d👩\ufe0f", "👩\u200d👩\ufe0f"),
        ("lone \ud800", "lone �"),
    ],
)
def test_characters_that_no_page_may_hold_become_a_sign(text: str, shown: str) -> None:
    assert clean(text) == shown


def step(name: str, labels: int, accuracy: float, **data: Any) -> Version:
    return version(
        name,
        created_at=name,
        metrics={"test": {"accuracy": accuracy}},
        data={"fingerprints": {"train": "x", "feedback": name}, "feedback": {"train": labels}} | data,
    )


def test_labels_of_people_are_held_against_the_version_before_on_the_same_data() -> None:
    versions = [
        step("1", 0, 0.80),
        step("2", 50, 0.81),
        step("3", 50, 0.82),
        step("4", 250, 0.84, fingerprints={"train": "others"}),
        step("5", 250, 0.86),
        step("6", 900, 0.99),
    ]
    found = bought(versions[4], versions)
    assert [(one.version, one.labels) for one in found] == [("1", 0), ("2", 50), ("3", 50), ("5", 250)]
    assert [one.per_hundred and round(one.per_hundred, 4) for one in found] == [None, 0.02, None, 0.02]
    assert bought(versions[0], versions) == []


def test_settings_that_are_not_the_defaults_are_named_but_for_where_it_ran() -> None:
    used = Settings.from_environ({"LR": "0.001", "MODEL_PATH": "/elsewhere", "PORT": "9", "API_KEY": "secret"}).public()
    assert gather(version(settings=used), None, None, None, findings=[]).changed == {"LR": "0.001"}


def test_settings_that_are_named_make_the_same_job() -> None:
    used = Settings.from_environ({"TRAIN_BODY": "0", "LR": "3e-05", "RETRAIN_ON_DRIFT": "1", "NUM_TRAIN": "50"})
    found = gather(version(settings=used.public()), None, None, None, findings=[]).changed
    assert Settings.from_environ(found) == used


def test_many_labels_name_the_pairs_that_are_confused_most() -> None:
    names = [f"label {number:02}" for number in range(77)]
    rng = np.random.default_rng(0)
    true = rng.integers(0, 77, 500)
    scores = np.full((500, 77), 0.001)
    scores[np.arange(500), true] = 0.9
    scores[:30, 3] = 0.95
    evidence = Evidence([f"t{number}" for number in range(500)], [names[one] for one in true])
    answers = Answers(scores.tolist(), [4] * 500, [False] * 500)
    found = gather(Version(Path("/x"), {"labels": names}), None, evidence, answers, findings=[])
    assert {other for _, other, _ in found.confused} == {"label 03"}
    assert [texts for _, _, texts in found.confused] == sorted((n for *_, n in found.confused), reverse=True)
