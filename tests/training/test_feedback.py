"""Feedback among the data: whose labels count, what joins which split, and that nobody chooses what is tested."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from tuneserve.artifact import Version
from tuneserve.errors import StoreError
from tuneserve.lifecycle import gate
from tuneserve.lifecycle.decision import Decision
from tuneserve.lifecycle.evidence import key_of, read_evidence, unseen
from tuneserve.lifecycle.feedback import Feedback
from tuneserve.lifecycle.feedback_database import FILE
from tuneserve.lifecycle.secret import SECRET
from tuneserve.lifecycle.store import Store
from tuneserve.settings import Settings
from tuneserve.training import feedback, job
from tuneserve.training.checks import Splits
from tuneserve.training.world import ALONE

pytestmark = pytest.mark.usefixtures("brief")

Rows = list[tuple[str, str]]
SAID: Rows = [(f"news about {number}", "good" if number % 2 else "bad") for number in range(60)]
OTHER = {"bad": "good", "good": "bad"}
BOUNDS = gate.Bounds(min_accuracy=0, min_recall=0, max_accuracy_drop=0.02, max_latency_increase=0.5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set with a test split."""
    folder = tmp_path / "reviews"
    folder.mkdir()
    sentences = tiny.sentences(240)
    tiny.write_csv(folder / "train.csv", sentences[:200])
    tiny.write_csv(folder / "test.csv", sentences[200:])
    return folder


@pytest.fixture
def environment(environment: dict[str, str], folder: Path) -> dict[str, str]:
    Path(environment["MODEL_PATH"]).mkdir()
    return environment | {"DATASET": str(folder)}


def say(environment: dict[str, str], said: Rows, *, keyed: bool) -> None:
    path = Path(environment["MODEL_PATH"], FILE)
    given = Feedback(path, max_rows=10_000, keep_texts=True, **{"keyed": True} if keyed else {})
    for text, label in said:
        given.label_text(text, label)
    given.close()


def gathered(environment: dict[str, str], **changed: str) -> Splits:
    settings = Settings.from_environ(environment | changed)
    return job.gather(settings, job.read_feedback(settings, ALONE))[1]


def judged(environment: dict[str, str], splits: Splits, said: Rows) -> Decision:
    """The gate on a candidate that says what feedback says, and is wrong on all else; the champion is right there."""
    store = Store(Path(environment["MODEL_PATH"]))
    metadata = {"labels": splits.labels, "data": splits.findings, "metrics": {"test": {"accuracy": 0.0}}}
    candidate = Version(store.versions_folder / "new", metadata)
    job.keep_evidence(store, candidate, splits, seed=1)
    evidence = read_evidence(store.evidence_folder / "new")
    truth = dict(tiny.sentences(240))
    lies = dict(said)
    champions = [truth.get(text, OTHER[label]) for text, label in zip(evidence.texts, evidence.labels, strict=True)]
    candidates = [lies.get(text, OTHER[label]) for text, label in zip(evidence.texts, evidence.labels, strict=True)]
    right = np.array(candidates) == np.array(evidence.labels)
    metadata["metrics"]["test"]["accuracy"] = float(right[np.isin(evidence.texts, [*splits.test])].mean())
    trial = {"error": None, "latency_ms": 1.0, "bytes": 1}
    found = {"candidate": trial | {"predicted": candidates}, "champion": trial | {"predicted": champions}}
    clean = np.ones(len(evidence.texts), dtype=bool)
    return gate.judge(candidate, Version(Path("old"), metadata), evidence, found, clean, BOUNDS)


@pytest.mark.parametrize("keyed", [False, True])
def test_labels_of_strangers_do_not_make_the_gate_accept_a_model_that_is_wrong(
    environment: dict[str, str], keyed: bool
) -> None:
    chosen = [f"spam {number}" for number in range(4000)]
    chosen = [text for text in chosen if key_of(text) % 2**32 < 0.1 * 2**32][:160]  # of the public hash's test texts
    said = [(text, "good") for text in chosen]
    say(environment, said, keyed=keyed)
    splits = gathered(environment)
    if not keyed:
        everything = {text for split in (splits.train, splits.valid, splits.test) for text in split}
        assert not everything & set(chosen)
    decision = judged(environment, splits, said)
    assert decision.verdict == "refused", decision.sentence


def test_a_share_is_held_out_always_the_same_one_and_nobody_can_foretell_it(environment: dict[str, str]) -> None:
    say(environment, SAID, keyed=True)

    def held_out() -> set[int]:
        split = gathered(environment, TEST_PCT="0.2").feedback
        assert split is not None
        return {key_of(text) for text in split}

    first = held_out()
    assert 4 <= len(first) <= 24
    assert held_out() == first
    say(environment, [(f" {text.upper()}", label) for text, label in SAID], keyed=True)
    assert held_out() == first
    (secret := Path(environment["MODEL_PATH"], SECRET)).unlink()
    assert held_out() != first
    assert (secret.stat().st_mode & 0o777, len(secret.read_bytes())) == (0o600, 32)
    secret.write_bytes(b"short")
    with pytest.raises(StoreError, match=r"secret is no secret of 32 bytes\. Remove it"):
        held_out()


@pytest.mark.parametrize("has_test", [True, False])
def test_the_owners_validation_and_test_stay_as_they_are(
    environment: dict[str, str], folder: Path, has_test: bool
) -> None:
    if not has_test:
        (folder / "test.csv").unlink()
    before = gathered(environment)
    own = [*before.test][:3]
    say(environment, [*SAID, *((text.upper(), "bad") for text in own), (next(iter(before.train)), "bad")], keyed=True)
    after = gathered(environment)
    assert [*after.valid] == [*before.valid]
    assert [*after.test] == [*before.test]
    assert after.feedback is not None
    said = {text for text, _ in SAID}
    assert set(after.feedback) | (set(after.train) - set(before.train)) == said
    assert not set(after.feedback) & set(after.train)
    found = after.findings["feedback"]
    assert (found["already_held_out"], found["already_trained_on"]) == (3, 1)
    assert sum(after.findings["counts"]["train"].values()) == len(after.train) == len(before.train) + found["train"]
    names = [after.labels[label] for label in after.train.label_ids]
    assert dict(SAID).items() >= {(t, n) for t, n in zip(after.train, names, strict=True) if t in said}


def joined(environment: dict[str, str], said: Rows) -> tuple[Rows, dict[str, int]]:
    """What joined of this feedback, and what is said of it."""
    settings = Settings.from_environ(environment)
    splits = job.gather(settings, feedback.draw_held_out(said, fraction=0.0, secret=bytes(32)))[1]
    rows = zip(splits.train, (splits.labels[label] for label in splits.train.label_ids), strict=True)
    return [row for row in rows if row[0] not in dict(tiny.sentences(240))], splits.findings["feedback"]


def test_labels_that_the_data_do_not_know_are_left_out_and_the_newest_spelling_counts(
    environment: dict[str, str],
) -> None:
    said = [*SAID[:4], ("new", "strange"), ("  ", "bad"), ("a text", "bad"), ("A  text", "good")]
    rows, found = joined(environment, said)
    assert sorted(rows) == sorted([*SAID[:4], ("A  text", "good")])
    assert found["unknown_label"] == 1


def test_feedback_changes_a_run_and_nothing_else_does(
    environment: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(environment["MODEL_PATH"], FILE)

    def run(**changed: str) -> str:
        settings = Settings.from_environ(environment | changed)
        base, splits = job.gather(settings, job.read_feedback(settings, ALONE))
        return job.fingerprint_run(settings, base, splits, [])

    before = run()
    assert not path.exists()
    path.write_bytes(b"this is no database, " * 500)
    assert run() == before
    assert "not a database" in caplog.text
    path.unlink()
    say(environment, SAID, keyed=False)
    say(environment, [("we left", "strange")], keyed=True)
    assert run() == before
    say(environment, [("we left at the interval", "bad")], keyed=True)
    once = run()
    assert once not in (before, run(USE_FEEDBACK="0"))
    assert run() == once
    assert run(USE_FEEDBACK="0", KEEP_TEXTS="1", FEEDBACK_MAX_ROWS="9") == before
    say(environment, [("we left at the interval", "good")], keyed=True)
    assert run() not in (before, once)


def test_a_training_says_both_figures_and_keeps_the_evidence_apart(
    environment: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    say(environment, SAID, keyed=True)
    version = job.train(Settings.from_environ(environment | {"N_EPOCHS": "1"}), _never(), threads=1)
    assert version is not None
    assert version.metadata["metrics"]["feedback"]["accuracy"] >= 0
    found = version.metadata["data"]["feedback"]
    store = Store(Path(environment["MODEL_PATH"]))
    evidence = read_evidence(store.evidence_folder / version.id)
    held_out = np.array(evidence.texts)[~evidence.is_own].tolist()
    assert set(held_out) <= {text for text, _ in SAID}
    assert len(held_out) == found["test"]
    assert set(np.array(evidence.texts)[evidence.is_own]) == {text for text, _ in tiny.sentences(240)[200:]}
    assert unseen(store.evidence_folder / version.id, held_out).all()
    decision = json.loads((version.folder / "decision.json").read_text())
    assert decision["figures"]["texts"] == 40
    assert decision["figures"]["feedback"]["texts"] == found["test"]
    assert "feedback: " in decision["sentence"]
    assert "gate: feedback: " in caplog.text
    assert "feedback_accuracy=" in caplog.text


def _never() -> Any:
    from tuneserve.signals import Stop

    return Stop()


def test_the_champion_has_seen_its_validation_texts_too_and_its_test_texts_not(environment: dict[str, str]) -> None:
    splits = gathered(environment)
    store = Store(Path(environment["MODEL_PATH"]))
    job.keep_evidence(store, Version(store.versions_folder / "one", {"labels": []}), splits, seed=1)
    folder = store.evidence_folder / "one"
    seen = {name: ~unseen(folder, [*getattr(splits, name)]) for name in ("train", "valid", "test")}
    assert seen["train"].all()
    assert seen["valid"].all()
    assert not seen["test"].any()


@pytest.mark.parametrize(
    ("variables", "labels", "unknown"),
    [
        ({}, ["1", "2", "Good", "bad", "good"], 3),
        ({"LABELS": "merge"}, ["1", "2", "bad", "good"], 2),
        ({"RARE_LABELS": "other", "MIN_CLASS_SIZE": "7"}, ["bad", "good", "other"], 3),
        ({"RARE_LABELS": "drop", "MIN_CLASS_SIZE": "7"}, ["bad", "good"], 4),
    ],
)
def test_the_settings_of_labels_reach_the_data_and_feedback_and_change_the_fingerprint(
    environment: dict[str, str], folder: Path, variables: dict[str, str], labels: list[str], unknown: int
) -> None:
    rows = [*tiny.sentences(200), *((f"a film of {number}", str(number % 2 + 1)) for number in range(10))]
    tiny.write_csv(folder / "train.csv", [*rows, *((f"one of {number}", "Good") for number in range(5))])
    (folder / "test.csv").unlink()
    said = [("the interval", "GOOD", False), ("the end", "other", False), ("an end", "1.0", False), ("a", "odd", False)]
    settings, plain = Settings.from_environ(environment | variables), Settings.from_environ(environment)
    base, splits = job.gather(settings, said)
    assert splits.labels == labels
    assert splits.findings["feedback"]["unknown_label"] == unknown
    same = job.fingerprint_run(settings, base, splits, []) == job.fingerprint_run(plain, base, splits, [])
    assert same is not bool(variables)
