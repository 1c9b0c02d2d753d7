"""The promise of few wrong answers: kept in 95% of a thousand draws, refused with too few texts, said in metadata."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from jobs import train
from scipy.special import softmax
from scipy.stats import beta, binom

from tuneserve.settings import Settings
from tuneserve.training.abstention import (
    CERTAINTY,
    choose_thresholds,
    confidences,
    find_threshold,
    promise,
    texts_needed,
)
from tuneserve.training.calibration import fit_temperature

Array = Any

DRAWS = 1000


def draw(rng: np.random.Generator, count: int, *, labels: int, skill: float) -> tuple[Array, Array]:
    """Logits float [texts, labels], and labels drawn with the very probabilities that they state."""
    logits = rng.normal(0, skill, (count, labels))
    cumulated = softmax(logits, axis=1).cumsum(axis=1)
    return logits, (cumulated > rng.random((count, 1))).argmax(axis=1)


def errors_above(logits: Array, label_ids: Array) -> Callable[[float], float]:
    """The share of wrong ones among the answers from a confidence on."""
    wrong, confidence = logits.argmax(axis=1) != label_ids, confidences(logits)
    falling = np.argsort(-confidence)
    shares = np.r_[0.0, np.cumsum(wrong[falling]) / np.arange(1, len(wrong) + 1)]
    return lambda threshold: float(shares[np.searchsorted(-confidence[falling], -threshold, side="right")])


@pytest.mark.parametrize(
    ("labels", "skill", "accuracy", "texts", "max_error", "found"),
    [
        (2, 3, 0.88, 400, 0.05, 0.9),
        (2, 5, 0.92, 600, 0.02, 0.9),
        (5, 4, 0.81, 1000, 0.05, 0.9),
        (2, 1, 0.72, 200, 0.2, 0.5),
    ],
)
def test_the_promise_is_broken_in_at_most_a_twentieth_of_the_draws(
    labels: int, skill: float, accuracy: float, texts: int, max_error: float, found: float
) -> None:
    error_above = errors_above(*draw(np.random.default_rng(0), 300_000, labels=labels, skill=skill))
    assert 1 - error_above(0) == pytest.approx(accuracy, abs=0.01)
    broken = promised = 0
    for number in range(DRAWS):
        rng = np.random.default_rng([number, labels])
        logits, label_ids = draw(rng, texts, labels=labels, skill=skill)
        others, _ = draw(rng, texts, labels=labels, skill=skill)
        right = logits.argmax(axis=1) == label_ids
        threshold = find_threshold(confidences(logits), right, choose_thresholds(confidences(others)), max_error)
        if threshold is not None:
            promised += 1
            broken += error_above(threshold) > max_error
    assert broken <= (1 - CERTAINTY) * DRAWS
    assert promised >= found * DRAWS


def test_a_temperature_that_the_same_texts_have_fitted_does_not_break_it() -> None:
    """The one figure that depends on the texts; of logits that are too sure by half."""
    all_logits, all_ids = draw(np.random.default_rng(0), 30_000, labels=4, skill=4)
    broken, draws = 0, DRAWS // 3
    for number in range(draws):
        rng = np.random.default_rng([number, 4])
        logits, label_ids = draw(rng, 300, labels=4, skill=4)
        others, _ = draw(rng, 300, labels=4, skill=4)
        scale = 1.5 / fit_temperature(1.5 * logits, label_ids)
        right = logits.argmax(axis=1) == label_ids
        thresholds = choose_thresholds(confidences(scale * others))
        threshold = find_threshold(confidences(scale * logits), right, thresholds, 0.1)
        broken += threshold is not None and errors_above(scale * all_logits, all_ids)(threshold) > 0.1
    assert broken <= (1 - CERTAINTY) * draws


def test_a_share_is_promised_if_the_exact_upper_bound_of_the_error_is_no_higher() -> None:
    thresholds = [(0.0, 1.0)]  # every text is answered
    for wrong in range(30):
        right = np.arange(400) >= wrong
        bound = beta.ppf(CERTAINTY, wrong + 1, 400 - wrong)
        found = find_threshold(np.full(400, 0.9), right, thresholds, 0.05)
        assert (found is not None) == (bound <= 0.05)


def test_as_few_texts_as_could_promise_anything_are_counted() -> None:
    for max_error in (0.01, 0.02, 0.05, 0.2):
        needed = texts_needed(max_error)
        assert binom.cdf(0, needed, max_error) <= 1 - CERTAINTY < binom.cdf(0, needed - 1, max_error)
        for count in (needed - 1, needed):
            sure, right = np.full(count, 0.9), np.ones(count, dtype=bool)
            assert find_threshold(sure, right, choose_thresholds(sure), max_error) == (0 if count == needed else None)


def test_a_larger_share_of_errors_answers_more() -> None:
    rng = np.random.default_rng(1)
    logits, label_ids = draw(rng, 2000, labels=2, skill=4)
    confidence, right = confidences(logits), logits.argmax(axis=1) == label_ids
    thresholds = choose_thresholds(confidences(draw(rng, 2000, labels=2, skill=4)[0]))
    found = [find_threshold(confidence, right, thresholds, share) for share in (0.02, 0.04, 0.06, 0.2)]
    assert found == sorted(found, reverse=True)  # type: ignore[type-var]
    assert len(set(found)) == 4
    assert found[-1] == 0


def test_what_is_beyond_a_failed_threshold_is_not_looked_at() -> None:
    confidence = np.repeat([0.9, 0.6, 0.3], [500, 200, 1000])
    thresholds = [(0.9, 500 / 1700), (0.6, 700 / 1700), (0.0, 1.0)]
    assert find_threshold(confidence, confidence != 0.6, thresholds, 0.2) == 0.9  # of all 12% are wrong
    assert find_threshold(confidence, confidence != 0.6, thresholds[::2], 0.2) == 0


def test_thresholds_fall_and_say_what_share_is_answered() -> None:
    confidence = np.random.default_rng(0).random(777)
    thresholds, shares = zip(*choose_thresholds(confidence), strict=True)
    assert list(thresholds) == sorted(set(thresholds), reverse=True)
    assert thresholds[-1] == 0
    assert list(shares) == [pytest.approx((confidence >= one).mean()) for one in thresholds]
    assert choose_thresholds(np.ones(9)) == [(1.0, 1.0), (0.0, 1.0)]


def test_what_cannot_be_promised_is_said_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    logits, label_ids = draw(np.random.default_rng(0), 300, labels=3, skill=0.1)
    few = promise(logits[:50], label_ids[:50], logits, label_ids, 0.02)
    assert few["threshold"] is None
    assert "50 validation texts, and at least 149" in few["reason"]
    assert (few["answered_share"], few["test"]) == (0.0, {"answered_share": 0.0})
    assert "every answer will abstain" in caplog.text
    assert "no confidence above which the 300" in promise(logits, label_ids, logits, label_ids, 0.02)["reason"]
    assert "right labels" in promise(logits, label_ids, logits, None, 0.9)["reason"]


def test_metadata_say_what_is_promised_and_what_the_test_shows_of_it(
    environment: dict[str, str], brief: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    environment |= {"VALID_PCT": "0.4", "N_EPOCHS": "12"}
    said = train(environment, MAX_ERROR="0.1").metadata["abstention"]
    assert (said["max_error"], said["certainty"], said["reason"]) == (0.1, 0.95, None)
    assert 0 <= said["threshold"] < 1
    assert said["texts"] > texts_needed(0.1)
    assert 0 < said["answered_share"] <= 1
    assert said["test"]["wrong"] <= 0.1 * said["test"]["answered"]
    assert "MAX_ERROR=0.1: answers below" in caplog.text
    assert "abstention" not in train(environment).metadata
    assert Settings().max_error == 0
