"""Feedback among the data: what joins which split, and what a run then is called."""

from pathlib import Path
from typing import Any

import pytest
import tiny

from tuneserve.lifecycle.evidence import key_of
from tuneserve.lifecycle.feedback import FILE, Feedback
from tuneserve.settings import Settings
from tuneserve.tables.rows import Columns
from tuneserve.training import data, job
from tuneserve.training.world import ALONE

Rows = list[tuple[str, str]]
SAID: Rows = [(f"news about {number}", "good" if number % 2 else "bad") for number in range(200)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set with a test split."""
    folder = tmp_path / "reviews"
    folder.mkdir()
    sentences = tiny.sentences(240)
    tiny.write_csv(folder / "train.csv", sentences[:200])
    tiny.write_csv(folder / "test.csv", sentences[200:])
    return folder


def joined(folder: Path, said: Rows, **changed: Any) -> tuple[dict[str, Rows], dict[str, int]]:
    """The rows that feedback added to each split, and what is said of it."""
    cache = folder.parent / "cache"
    sources = data.read(str(folder), Columns(), cache=cache)
    found, counts = data.join_feedback(sources, said, cache=cache, **{"test_fraction": 0.2} | changed)
    more: dict[str, Rows] = {}
    for split, source in found.items():
        rows = list(zip(source.rows["text"], source.rows["label"], strict=True))
        more[split] = rows[len(sources[split].rows) :]
    return more, counts


def test_a_share_joins_the_test_texts_and_always_the_same_ones(folder: Path) -> None:
    more, counts = joined(folder, SAID)
    assert counts == {"train": len(more["train"]), "test": len(more["test"]), "unknown_label": 0, "already_held_out": 0}
    assert sorted(more["train"] + more["test"]) == sorted(SAID)
    assert 20 <= len(more["test"]) <= 60
    fewer, _ = joined(folder, SAID[::-2])
    assert set(fewer["test"]) == set(more["test"]) & set(SAID[::-2])
    shouted, _ = joined(folder, [(f" {text.upper()}", label) for text, label in SAID])
    assert {key_of(text) for text, _ in shouted["test"]} == {key_of(text) for text, _ in more["test"]}


def test_labels_that_the_data_do_not_know_are_left_out_and_counted(folder: Path) -> None:
    more, counts = joined(folder, [*SAID[:4], ("new", "strange"), ("  ", "bad")])
    assert sorted(more["train"] + more["test"]) == sorted(SAID[:4])
    assert counts["unknown_label"] == 1


def test_a_text_that_is_tested_on_stays_there_alone_and_one_that_is_trained_on_never_becomes_a_test(
    folder: Path,
) -> None:
    test, train = (data.read(str(folder), Columns(), cache=folder)[split].rows["text"] for split in ("test", "train"))
    more, counts = joined(folder, [(test[0].upper(), "bad"), *((text, "good") for text in train)], test_fraction=0.5)
    assert counts["already_held_out"] == 1
    assert more["test"] == []
    assert {text for text, _ in more["train"]} <= set(train)


def test_of_two_spellings_of_a_text_the_newer_label_counts(folder: Path) -> None:
    more, _ = joined(folder, [("a text", "bad"), ("A  text", "good")])
    assert more["train"] + more["test"] == [("A  text", "good")]


def gathered(environment: dict[str, str], **changed: str) -> tuple[str, dict[str, Any]]:
    """A run's fingerprint and findings."""
    settings = Settings.from_environ(environment | changed)
    base, splits = job.gather(settings, job.read_feedback(settings, ALONE))
    return job.fingerprint_run(settings, base, splits, []), splits.findings


def test_feedback_changes_a_run_and_nothing_else_does(
    environment: dict[str, str], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    environment["DATASET"] = str(folder)
    path = Path(environment["MODEL_PATH"], FILE)
    path.parent.mkdir()
    before, findings = gathered(environment)
    assert "feedback" not in findings
    assert not path.exists()

    path.write_bytes(b"this is no database, " * 500)
    assert gathered(environment)[0] == before
    assert "not a database" in caplog.text
    path.unlink()

    feedback = Feedback(path, max_rows=1000, keep_texts=True)
    feedback.remember("unlabelled", 0, "v1", "good", 0.9, "a text")
    feedback.close()
    assert gathered(environment)[0] == before
    feedback.label_text("we left", "strange")
    assert gathered(environment)[0] == before
    feedback.label_text("we left at the interval", "bad")
    once, findings = gathered(environment)
    assert once != before
    assert sum(findings["feedback"][split] for split in ("train", "test")) == 1
    assert findings["feedback"]["unknown_label"] == 1
    assert gathered(environment)[0] == once
    assert gathered(environment, USE_FEEDBACK="0", KEEP_TEXTS="1", FEEDBACK_MAX_ROWS="9")[0] == before
    feedback.label_text("we left at the interval", "good")
    assert gathered(environment)[0] not in (before, once)


def test_a_text_of_feedback_is_trained_or_tested_on(environment: dict[str, str], folder: Path) -> None:
    settings = Settings.from_environ(environment | {"DATASET": str(folder)})
    _, splits = job.gather(settings, SAID)
    parts = {name: set(getattr(splits, name)) & {text for text, _ in SAID} for name in ("train", "valid", "test")}
    assert sum(map(len, parts.values())) == len(SAID)
    assert parts["test"] == {text for text, _ in joined(folder, SAID, test_fraction=settings.test_pct)[0]["test"]}
    assert len(parts["test"]) > 5


@pytest.mark.parametrize(
    ("variables", "labels"),
    [
        ({}, ["1", "2", "Good", "bad", "good"]),
        ({"LABELS": "merge"}, ["1", "2", "bad", "good"]),
        ({"RARE_LABELS": "other", "MIN_CLASS_SIZE": "7"}, ["bad", "good", "other"]),
        ({"RARE_LABELS": "drop", "MIN_CLASS_SIZE": "7"}, ["bad", "good"]),
    ],
)
def test_the_settings_of_labels_reach_the_data_and_feedback_and_change_the_fingerprint(
    environment: dict[str, str], folder: Path, variables: dict[str, str], labels: list[str]
) -> None:
    rows = [*tiny.sentences(200), *((f"a film of {number}", str(number % 2 + 1)) for number in range(10))]
    tiny.write_csv(folder / "train.csv", [*rows, *((f"one of {number}", "Good") for number in range(5))])
    (folder / "test.csv").unlink()
    said = [("the interval", "GOOD"), ("the end", "other"), ("an end", "1.0"), ("a new one", "odd")]
    settings = Settings.from_environ(environment | {"DATASET": str(folder)} | variables)
    base, splits = job.gather(settings, said)
    assert splits.labels == labels
    plain = Settings.from_environ(environment | {"DATASET": str(folder)})
    same = job.fingerprint_run(settings, base, splits, []) == job.fingerprint_run(plain, base, splits, [])
    assert same is not bool(variables)
    expected = {"merge": 2, "other": 2}.get(variables.get("LABELS", variables.get("RARE_LABELS", "")), 3)
    assert splits.findings["feedback"]["unknown_label"] == expected
