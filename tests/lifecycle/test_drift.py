import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tuneserve.artifact import Version
from tuneserve.errors import StoreError
from tuneserve.lifecycle import drift
from tuneserve.lifecycle.drift import (
    Answers,
    Observation,
    Reference,
    Window,
    compare,
    judge,
    read_reference,
    write_reference,
)

LABELS = ["bad", "good"]


def answers(count: int, seed: int, **changed: Any) -> Answers:
    """What a model might answer to texts of one kind: half of them good, mostly sure, of about twenty tokens."""
    rng = np.random.default_rng(seed)
    kind = {"good": 0.5, "sureness": 5.0, "tokens": 20.0, "unknown": 0.01, "truncated": 0.05} | changed
    tokens = 2 + rng.poisson(kind["tokens"], count)
    return Answers(
        (rng.random(count) < kind["good"]).astype(np.int64),
        0.5 + rng.beta(kind["sureness"], 1, count) / 2,
        tokens,
        rng.binomial(tokens, kind["unknown"]),
        rng.random(count) < kind["truncated"],
    )


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(LABELS, answers(1500, seed=0))


def window_of(some: Answers, **options: Any) -> Window:
    window = Window(**options)
    columns = (some.label_ids, some.confidences, some.tokens, some.unknown, some.truncated)
    for row in zip(*(column.tolist() for column in columns), strict=True):
        window.add(Observation(*row))
    return window


def rate(size: int, windows: int = 300, **changed: Any) -> float:
    """How often fresh windows are called drift, each by a reference of its own."""
    called = [
        any(
            one.drifted
            for one in judge(
                Reference(LABELS, answers(1500, seed=2 * draw)), answers(size, seed=2 * draw + 1, **changed)
            )
        )
        for draw in range(windows)
    ]
    return float(np.mean(called))


@pytest.mark.parametrize("size", [50, 500])
def test_windows_of_the_same_texts_are_hardly_ever_called_drift(size: int) -> None:
    assert rate(size) <= 0.02  # 0.01 is promised; of 300 windows 6 may be called by chance


@pytest.mark.parametrize(
    "changed", [{"good": 0.75}, {"sureness": 3.0}, {"tokens": 24.0}, {"unknown": 0.03}, {"truncated": 0.16}]
)
def test_each_kind_of_change_is_found_in_500_texts(changed: dict[str, float]) -> None:
    assert rate(500, windows=60, **changed) >= 0.95


@pytest.mark.parametrize(
    ("changed", "name", "words"),
    [
        ({"good": 0.8}, "labels", "'good', which gained most, went from "),
        ({"sureness": 2.0}, "confidence", "mean probability of the predicted label went from 0.9"),
        ({"tokens": 30.0}, "length", "went from 22 to 32 tokens"),
        ({"unknown": 0.1}, "unknown", "mean share of a text went from 0.98% to 1"),
        ({"truncated": 0.3}, "truncated", "share went from 5.9% to 32.4%"),
    ],
)
def test_the_figure_that_changed_is_named_and_explained(
    reference: Reference, changed: dict[str, float], name: str, words: str
) -> None:
    report = compare(reference, window_of(answers(500, seed=9, **changed)))
    assert [one.name for one in report.figures if one.drifted] == [name]
    [figure] = [one for one in report.figures if one.drifted]
    assert words in figure.sentence
    assert "That is drift" in figure.sentence
    assert (figure.value >= figure.threshold, figure.p_value <= 0.01) == (True, True)
    assert report.drifted
    assert report.sentence.endswith(f"tested on: {name}.")


def test_a_difference_that_nobody_feels_is_no_drift_however_sure_it_is(reference: Reference) -> None:
    figures = judge(reference, answers(50_000, seed=4, tokens=20.6))
    [length] = [one for one in figures if one.name == "length"]
    assert length.p_value < 0.01
    assert not length.drifted
    assert "though more than chance" in length.sentence


def test_too_few_texts_are_not_judged(reference: Reference) -> None:
    report = compare(reference, window_of(answers(49, seed=1, good=1.0)))
    assert (report.drifted, report.texts, report.figures) == (False, 49, ())
    assert "49 texts" in report.sentence
    assert compare(reference, window_of(answers(50, seed=1, good=1.0))).drifted
    assert (
        "reference has 49" in compare(Reference(LABELS, answers(49, seed=1)), window_of(answers(50, seed=1))).sentence
    )


def test_without_a_reference_and_without_texts_that_is_said(reference: Reference) -> None:
    assert "without a reference" in compare(None, window_of(answers(500, seed=1))).sentence
    empty = compare(reference, Window())
    assert (empty.texts, empty.begins, empty.ends, empty.reference_texts) == (0, None, None, 1500)


def test_a_label_that_was_never_predicted_before_is_drift(reference: Reference) -> None:
    three = Reference(["bad", "good", "{odd}"], reference.answers)
    now = answers(500, seed=1)
    now.label_ids[:100] = 2
    [labels] = [one for one in judge(three, now) if one.name == "labels"]
    assert labels.drifted
    assert "'{odd}', which gained most, went from 0.0% to 20.0%" in labels.sentence


def test_the_window_forgets_by_number_and_by_age(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1e9
    monkeypatch.setattr(drift.time, "time", lambda: now)
    window = Window(max_texts=60, hours=2)
    for number in range(100):
        window.add(Observation(0, 0.9, number, 0, False))
        now += 60
    at, kept = window.read()
    assert kept.tokens.tolist() == list(range(40, 100))
    assert (at[0], at[-1]) == (1e9 + 40 * 60, 1e9 + 99 * 60)
    now += 3600
    assert window.read()[1].tokens.tolist() == list(range(40, 100))
    now += 1800
    assert window.read()[1].tokens.tolist() == list(range(70, 100))


def test_the_window_may_be_read_while_it_is_written() -> None:
    window, ended = Window(max_texts=100_000), threading.Event()

    def write() -> None:
        number = 0
        while not ended.is_set():
            window.add(Observation(0, 0.9, number, 0, False))
            number += 1

    writer = threading.Thread(target=write)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that the writer gets its turn in the middle of a read
    writer.start()
    try:
        for _ in range(30):
            tokens = window.read()[1].tokens
            assert (np.diff(tokens) == 1).all()
    finally:
        sys.setswitchinterval(interval)
        ended.set()
        writer.join()


def version(folder: Path) -> Version:
    return Version(folder, {"labels": LABELS})


def test_a_reference_is_read_as_it_was_written(tmp_path: Path) -> None:
    some = answers(300, seed=3)
    write_reference(tmp_path, some, seed=1)
    found = read_reference(version(tmp_path))
    assert found is not None
    assert found.labels == LABELS
    assert found.answers.confidences == pytest.approx(some.confidences, abs=0.0005)
    for name in ("label_ids", "tokens", "unknown", "truncated"):
        read, wrote = getattr(found.answers, name), getattr(some, name)
        assert read.dtype == wrote.dtype
        assert read.tolist() == wrote.tolist()
    whole = found.whole_texts()
    assert 0 < len(whole.answers) < 300
    assert not whole.answers.truncated.any()


def test_of_many_texts_a_reference_has_some_and_the_same_each_time(tmp_path: Path) -> None:
    many = answers(20_000, seed=3)
    write_reference(tmp_path, many, seed=1)
    first = (tmp_path / "drift.json").read_bytes()
    write_reference(tmp_path, many, seed=1)
    assert (tmp_path / "drift.json").read_bytes() == first
    assert len(first) < 40_000
    found = read_reference(version(tmp_path))
    assert found is not None
    assert len(found.answers) == 2000
    assert not any(one.drifted for one in judge(found, many))  # drawn from all of it
    write_reference(tmp_path, many, seed=2)
    assert (tmp_path / "drift.json").read_bytes() != first


def test_an_old_version_has_none_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert read_reference(version(tmp_path)) is None
    for content in ("{", "{}", "[]", '{"label_ids":[1],"confidences":[],"tokens":[],"unknown":[],"truncated":[]}'):
        (tmp_path / "drift.json").write_text(content)
        with pytest.raises(StoreError, match=r"drift\.json cannot be read"):
            read_reference(version(tmp_path))


@pytest.mark.parametrize(("p_value", "drifted"), [(0.0101, False), (0.01, True), (0.015, False)])
def test_at_most_one_window_in_a_hundred_is_called_drift_by_chance(p_value: float, drifted: bool) -> None:
    assert drift._figure("labels", 0.5, p_value, "Words").drifted == drifted
