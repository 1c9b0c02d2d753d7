"""Wrong labels: found by confident learning, written for people, and left out only where that is wanted."""

import csv
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import tiny
from jobs import train
from scipy.special import softmax

from tuneserve.lifecycle.evidence import read_evidence
from tuneserve.lifecycle.label_issues import LABEL_ISSUES, LabelIssue, read_label_issues, write_label_issues
from tuneserve.lifecycle.store import Store
from tuneserve.training import features, job, label_issues
from tuneserve.training.few import read_features
from tuneserve.training.label_issues import FOLDS, draw_folds, find, held_out_probabilities, judge, judge_learned, look
from tuneserve.training.tokens import TokenizedSplit

pytestmark = pytest.mark.usefixtures("brief")

FAST = {"N_EPOCHS": "1", "TEST_PCT": "0.2", "VALID_PCT": "0.1"}


def clouds(texts: int, *, labels: int = 3, channels: int = 8, seed: int = 0) -> tuple[Any, Any]:
    """Features of labels that lie apart."""
    rng = np.random.default_rng(seed)
    label_ids = np.arange(texts) % labels
    centers = 4 * rng.normal(size=(labels, channels))
    return centers[label_ids] + rng.normal(size=(texts, channels)), label_ids


def read_tiny() -> Callable[[TokenizedSplit, Any], Any]:
    """What a tiny body says of rows of a split."""
    model = tiny.make_classifier()
    return lambda split, rows: read_features(model, split.select(rows))


def test_the_confident_joint_of_eight_texts_is_that_of_a_hand() -> None:
    # Thresholds: (0.9 + 0.8 + 0.38 + 0.3) / 4 = 0.595 of label 0, (0.9 + 0.7 + 0.2 + 0.62) / 4 = 0.605 of label 1.
    first = [0.9, 0.8, 0.38, 0.3, 0.1, 0.3, 0.8, 0.38]
    label_ids = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    found = judge(np.array([[one, 1 - one] for one in first]), label_ids)
    # Texts 2 and 3 are confidently 1, text 6 is confidently 0; their own labels have 0.38, 0.3 and 0.2.
    # So of each label's four, two and one: three are suspected.
    assert found.rows.tolist() == [6, 3, 2]
    assert found.likely.tolist() == [0, 1, 1]
    assert found.probability == pytest.approx([0.2, 0.3, 0.38])
    assert found.rates == pytest.approx([2 / 4, 1 / 4])


def test_the_least_probable_label_is_suspected_first_however_many_others_share_the_rest() -> None:
    sure, other, unsure = [0.9, 0.0, 0.1], [0.0, 0.9, 0.1], [0.3, 0.3, 0.4]
    spread, opposed = [0.05, 0.5, 0.45], [0.1, 0.0, 0.9]  # their margins are -0.45 and -0.8
    found = judge(np.array([sure, sure, spread, opposed, other, unsure, unsure]), np.array([0, 0, 0, 0, 1, 2, 2]))
    assert found.rows.tolist() == [2, 3]
    assert found.likely.tolist() == [1, 2]


def test_an_answer_below_every_threshold_is_nobodys_and_suspects_nothing() -> None:
    probabilities = np.array([[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9], [0.3, 0.4, 0.3]])
    # The thresholds are 0.6 (the mean of 0.9 and 0.3), 0.9 and 0.9: the last text reaches none.
    found = judge(probabilities, np.array([0, 1, 2, 0]))
    assert found.rows.tolist() == []
    assert found.rates.tolist() == [0, 0, 0]


@pytest.mark.parametrize("labels", [2, 30])
def test_flipped_labels_are_most_of_as_many_suspects_and_their_own_is_the_likely_one(labels: int) -> None:
    features, true = clouds(600, labels=labels, channels=16)
    rng = np.random.default_rng(1)
    flipped = rng.choice(600, 30, replace=False)
    given = true.copy()
    given[flipped] = (given[flipped] + rng.integers(1, labels, 30)) % labels
    found = find(features, given, labels, seed=0)
    first = set(found.rows[:30].tolist())
    assert len(first & set(flipped.tolist())) >= 27
    likely = dict(zip(found.rows.tolist(), found.likely.tolist(), strict=True))
    right = [likely.get(row) == true[row] for row in flipped.tolist()]
    assert sum(right) >= 27
    assert found.rates[given].mean() == pytest.approx(0.05, abs=0.02)


def test_no_text_is_judged_by_what_has_learned_from_it() -> None:
    features = np.eye(40)  # nothing to learn but each text by heart
    label_ids = np.arange(40) % 2
    own = held_out_probabilities(features, label_ids, 2, seed=0)[np.arange(40), label_ids]
    assert own.max() < 0.6


def test_a_label_of_one_text_is_not_suspected_and_one_that_is_unused_is_nobodys() -> None:
    features, label_ids = clouds(41)
    label_ids[40] = 3
    assert draw_folds(label_ids, 0, folds=FOLDS)[40] == -1
    assert set(draw_folds(label_ids, 0, folds=FOLDS)[:40]) == set(range(FOLDS))
    found = find(features, label_ids, 5, seed=0)
    assert 40 not in found.rows
    assert 4 not in found.likely
    assert np.isfinite(found.rates).all()


def test_of_very_many_texts_a_sample_is_looked_at_and_rows_are_those_of_the_splits() -> None:
    splits = {name: tiny.make_split([5] * size, seed=size) for name, size in (("train", 50), ("test", 20))}
    all_of_them = look(read_tiny(), splits, 3, seed=0)
    assert all_of_them is not None
    assert all_of_them.record["texts"] == {"train": 50, "test": 20}
    some = look(read_tiny(), splits, 3, seed=0, most=40)
    assert some is not None
    assert sum(some.record["texts"].values()) == 40
    for found in (all_of_them, some):
        for name, split in splits.items():
            assert found.record["suspected"][name] == len(found.rows[name])
            assert all(
                split.label_ids[row] != likely for row, likely in zip(found.rows[name], found.likely[name], strict=True)
            )


@pytest.fixture
def flawed(tmp_path: Path) -> tuple[Path, set[str]]:
    """Sentences of which every twentieth has the other label."""
    rows = tiny.sentences(240)
    wrong = {text for text, _ in rows[::20]}
    names = sorted({label for _, label in rows})
    other = {names[0]: names[1], names[1]: names[0]}
    return tiny.write_csv(
        tmp_path / "flawed.csv", [(text, other[label] if text in wrong else label) for text, label in rows]
    ), wrong


@pytest.mark.parametrize(
    ("changed", "looks"), [({}, 0), ({"TRAIN_BODY": "0"}, 1), ({"LABEL_ISSUES": "drop"}, 1), ({"MIN_VALID": "100"}, 1)]
)
def test_a_training_of_the_body_on_many_texts_shows_by_itself_what_is_suspected(
    environment: dict[str, str],
    flawed: tuple[Path, set[str]],
    changed: dict[str, str],
    looks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[int] = []
    monkeypatch.setattr(label_issues, "look", lambda *about, **more: looked.append(1) or look(*about, **more))
    version = train(environment, DATASET=str(flawed[0]), **FAST, **changed)
    assert len(looked) == looks
    assert sum(version.metadata["label_issues"]["texts"].values()) == 240


def test_flipped_labels_are_found_by_what_was_said_before_they_were_learned() -> None:
    features, true = clouds(600)
    rng = np.random.default_rng(1)
    flipped = rng.choice(600, 60, replace=False)
    given = true.copy()
    given[flipped] = (given[flipped] + 1) % 3
    logits = np.stack([-((features - features[true == label].mean(0)) ** 2).sum(1) for label in range(3)], axis=1)
    rows = {"train": np.arange(0, 400), "valid": np.arange(400, 500), "test": np.arange(500, 600)}
    tokens = {name: tiny.make_split([5] * len(chosen)) for name, chosen in rows.items()}
    tokens = {name: replace(one, label_ids=given[rows[name]].astype(np.int64)) for name, one in tokens.items()}
    answered = np.arange(0, 400, 2)  # of more texts than are kept, a sample
    learned = answered, softmax(logits[answered], axis=1)
    found = judge_learned(learned, {name: logits[rows[name]] for name in ("test", "valid")}, tokens)
    assert found.record["texts"] == {"train": 200, "valid": 100, "test": 100}
    for name, chosen in rows.items():
        wrong = {place for place, row in enumerate(chosen) if row in flipped and (name != "train" or place in answered)}
        assert len(wrong & set(found.rows[name])) >= 0.9 * len(wrong) > 0
        assert found.record["suspected"][name] == len(found.rows[name]) <= 1.2 * len(wrong)
        likely = dict(zip(found.rows[name], found.likely[name], strict=True))
        assert sum(likely.get(place) == true[chosen[place]] for place in wrong) >= 0.9 * len(wrong)
    assert found.record["test_label_error"] == pytest.approx(np.isin(rows["test"], flipped).mean(), abs=0.03)


def test_the_head_alone_is_trained_on_what_its_labels_were_judged_by(
    environment: dict[str, str], flawed: tuple[Path, set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encode = features._encode

    def count(encoder: features.Encoder, split: TokenizedSplit, *more: Any) -> None:
        seen.append(len(split))
        encode(encoder, split, *more)

    monkeypatch.setattr(features, "_encode", count)
    version = train(environment, DATASET=str(flawed[0]), TRAIN_BODY="0", **FAST)
    assert sum(version.metadata["label_issues"]["texts"].values()) == sum(seen) == 240


def test_what_is_suspected_is_written_and_nothing_is_changed(
    environment: dict[str, str],
    flawed: tuple[Path, set[str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    data, _ = flawed
    with caplog.at_level(logging.INFO):
        version = train(environment, DATASET=str(data), **FAST)
    store = Store(Path(environment["MODEL_PATH"]))
    record = version.metadata["label_issues"]
    counts = {name: sum(sizes.values()) for name, sizes in version.metadata["data"]["counts"].items()}
    assert record["texts"] == counts
    assert sum(counts.values()) == 240
    assert 0 <= record["test_label_error"] <= 1
    issues = read_label_issues(store.evidence_folder / version.id)
    assert issues is not None
    assert {name: sum(one.split == name for one in issues) for name in counts} == record["suspected"]
    with data.open(newline="") as file:
        given = {row["text"]: row["label"] for row in csv.DictReader(file)}
    assert all(given[one.text] == one.given != one.likely for one in issues)
    tested = set(read_evidence(store.evidence_folder / version.id).texts)
    assert {one.text for one in issues if one.split == "test"} <= tested
    assert "labels that are probably wrong: " in caplog.text


def test_drop_leaves_suspected_training_texts_out_and_no_others(
    environment: dict[str, str], flawed: tuple[Path, set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = flawed

    def accuse(model: Any, tokens: Any, labels: int, **_: Any) -> label_issues.Found:
        rows = {name: list(range(8)) for name in ("train", "valid", "test")}
        likely = {name: (1 - tokens[name].label_ids[:8]).tolist() for name in rows}
        record = {"texts": {name: len(tokens[name]) for name in rows}, "suspected": dict.fromkeys(rows, 8)}
        return label_issues.Found(rows, likely, {name: [0.1] * 8 for name in rows}, record | {"test_label_error": 0.1})

    monkeypatch.setattr(label_issues, "look", accuse)
    kept = train(environment, DATASET=str(data), **FAST)
    left = train(environment, DATASET=str(data), LABEL_ISSUES="drop", **FAST)
    counts = [
        {name: sum(sizes.values()) for name, sizes in one.metadata["data"]["counts"].items()} for one in (kept, left)
    ]
    assert counts[1] == counts[0] | {"train": counts[0]["train"] - 8}
    assert left.metadata["data"]["suspected_train_texts"] == 8
    assert "suspected_train_texts" not in kept.metadata["data"]
    folder = Store(Path(environment["MODEL_PATH"])).evidence_folder
    learned = [len(np.load(folder / one.id / "learned.npy")) for one in (kept, left)]
    assert learned[0] - learned[1] == 8
    issues = read_label_issues(folder / left.id)
    assert issues is not None
    assert len(issues) == 24  # what was dropped is named, too


def test_of_a_label_at_least_half_and_two_texts_stay() -> None:
    label_ids = np.array([0] * 3 + [1] * 10, dtype=np.int32)
    found = label_issues.Found({"train": list(range(13))}, {}, {}, {})
    splits = label_issues.Splits(
        train=label_issues.Split(cast(Any, SimpleNamespace()), np.arange(100, 113), label_ids),
        valid=cast(Any, None),
        test=cast(Any, None),
        labels=["a", "b"],
        fingerprints={},
        findings={"counts": {"train": {}, "test": {"a": 1}}},
    )
    left = label_issues.drop(splits, found)
    assert left.train.rows.tolist() == [101, 102, *range(108, 113)]
    assert left.findings["counts"] == {"train": {"a": 2, "b": 5}, "test": {"a": 1}}
    assert left.findings["suspected_train_texts"] == 6


def test_off_looks_at_nothing(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "Dynamics", lambda *about: pytest.fail("it kept answers"))
    monkeypatch.setattr(label_issues, "look", lambda *about, **more: pytest.fail("it looked"))
    version = train(environment, LABEL_ISSUES="off", **FAST)
    assert "label_issues" not in version.metadata
    assert read_label_issues(Store(Path(environment["MODEL_PATH"])).evidence_folder / version.id) is None


def test_an_interrupted_run_goes_on_with_what_it_had_found(tmp_path: Path) -> None:
    found = look(read_tiny(), {name: tiny.make_split([5] * 30) for name in ("train", "test")}, 3, seed=0)
    assert found is not None
    path = tmp_path / "run" / "label-issues.json"
    assert label_issues.recall(path) is None
    label_issues.remember(path, found)
    assert label_issues.recall(path) == found
    path.write_text('{"rows": 3}')
    assert label_issues.recall(path) is None


@pytest.mark.parametrize("text", ["=1+1", 'a "b", c\nd\r\ne', "電影 " * 50_000])
def test_texts_are_read_as_they_were_written(text: str, tmp_path: Path) -> None:
    issue = LabelIssue("test", text, "a,b", "c", 0.25)
    write_label_issues(tmp_path, [issue])
    assert read_label_issues(tmp_path) == [issue]
    assert (tmp_path / LABEL_ISSUES).read_bytes().startswith(b"split,text,given,likely,probability\n")
