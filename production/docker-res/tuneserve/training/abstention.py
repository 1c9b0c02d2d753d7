"""Which answers to give and which to withhold: the confidence above which few answers are wrong, with a guarantee.

MAX_ERROR=0.02 asks for a threshold such that, of the answers at or above it, at most 2% are wrong. One that merely
fitted the validation texts would break its promise every other time. So thresholds are tested as hypotheses (Learn then
Test, Angelopoulos et al., 2110.01052, with fixed sequences): "of the answers at or above this confidence more than
MAX_ERROR are wrong" is rejected by an exact binomial test on the validation texts, and only what is rejected is used.

- The sequence of thresholds must not depend on the texts that test it. It comes from other texts, whose labels are not
  looked at: the confidences above which the model answers 2%, 4%, … 100% of the texts of the test.
- It is tested from the surest answers down, each threshold at the whole level, and ends with the first one that is not
  rejected. A threshold that breaks the promise is used only if the first such one in the sequence is rejected, which
  has at most the chance of the level, however many follow. Nothing is assumed of the confidences, not even that surer
  answers are more often right.
- Of a handful of answers nothing can be rejected even if all are right, and a sequence that began with one would end
  there. It begins where, by the test's confidences, somewhat more texts are answered than are needed; with many texts
  at a quarter of them, for one mistake among few is worse news than several among many.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import softmax
from scipy.stats import binom

Array = np.ndarray[Any, np.dtype[Any]]

logger = logging.getLogger(__name__)

CERTAINTY = 0.95
STEPS = 50
"""Thresholds of the sequence."""
FIRST_SHARE = 0.25
"""Of the texts that is answered where the sequence begins."""
SPARE = (1.2, 3.0)
"""How many times the texts that are needed this is, at least and at most; chance may take some away."""
EVERYTHING = 0.0
"""The threshold at which every text is answered."""


def promise(
    valid_logits: Array,
    valid_ids: Array,
    test_logits: Array,
    test_ids: Array | None,
    max_error: float,
) -> dict[str, Any]:
    """What metadata say of abstention, from the logits after calibration, float [texts, labels].

    Args:
        valid_logits: of texts that the model was not trained on, by which the threshold is found.
        valid_ids: the true ids of these, int [texts].
        test_logits: of other such texts.
        test_ids: the true ids of these; None if the labels of neither are the model's.
        max_error: the share of the answers that may be wrong.

    Returns:
        `max_error`; `certainty` of the promise; `threshold`, the smallest confidence that is answered, None if nothing
        can be promised, with the `reason`; `texts` that it was found by; `answered_share` of these; and of the test
        `answered_share`, `answered` and how many of these are `wrong`.
    """
    valid, test = confidences(valid_logits), confidences(test_logits)
    right = valid_logits.argmax(axis=1) == valid_ids
    threshold, reason = None, "nothing is known of the right labels"
    if test_ids is not None:
        threshold = find_threshold(valid, right, choose_thresholds(test), max_error)
        reason = explain_none(len(valid), max_error) if threshold is None else ""
    found: dict[str, Any] = {
        "max_error": max_error,
        "certainty": CERTAINTY,
        "threshold": threshold,
        "reason": reason or None,
        "texts": len(valid),
        "answered_share": _share(valid, threshold),
        "test": {"answered_share": _share(test, threshold)},
    }
    if test_ids is not None and threshold is not None:
        wrong = test_logits.argmax(axis=1) != test_ids
        found["test"] |= {
            "answered": int((test >= threshold).sum()),
            "wrong": int((wrong & (test >= threshold)).sum()),
        }
    if threshold is None:
        logger.warning("MAX_ERROR=%g cannot be promised, and every answer will abstain: %s", max_error, reason)
    else:
        logger.info(
            "MAX_ERROR=%g: answers below a confidence of %.4f abstain; %.1f%% of the test's texts are answered",
            *(max_error, threshold, 100 * found["test"]["answered_share"]),
        )
    return found


def confidences(logits: Array) -> Array:
    """The probability of the likeliest label, float64 [texts], of logits float [texts, labels]."""
    found: Array = softmax(logits.astype(np.float64), axis=1).max(axis=1)
    return found


def choose_thresholds(others: Array, steps: int = STEPS) -> list[tuple[float, float]]:
    """Thresholds from the highest down, each with the share of texts of these confidences that is answered at it."""
    shares = np.arange(1, steps) / steps
    cuts = np.quantile(others, 1 - shares, method="lower")
    found = {round(float(cut), 6): float((others >= round(float(cut), 6)).mean()) for cut in cuts}
    return [*found.items(), (EVERYTHING, 1.0)]


def find_threshold(
    confidence: Array,
    right: Array,
    thresholds: Sequence[tuple[float, float]],
    max_error: float,
    certainty: float = CERTAINTY,
) -> float | None:
    """The lowest threshold of which it is certain enough that at most `max_error` of the answers are wrong, or None.

    Args:
        confidence: of the answers, float [texts].
        right: whether they are, bool [texts].
        thresholds: from the highest down, with the share of texts that is expected to be answered; see
            `choose_thresholds`. They must not have been chosen by these texts.
        max_error: the share of the answers that may be wrong, above 0.
        certainty: the share of such findings that keep their promise, at least.
    """
    needed = texts_needed(max_error, certainty)
    count = len(confidence)
    if count < needed:
        return None
    first = min(max(FIRST_SHARE * count, SPARE[0] * needed), SPARE[1] * needed)
    begin = next((index for index, (_, share) in enumerate(thresholds) if share * count >= first), -1)
    limits = np.array([threshold for threshold, _ in thresholds[begin:]])
    answered = confidence[:, None] >= limits
    wrong = (answered & ~right[:, None]).sum(axis=0)
    rejected = binom.cdf(wrong, answered.sum(axis=0), max_error) <= 1 - certainty
    passed = int(np.logical_and.accumulate(rejected).sum())
    return float(limits[passed - 1]) if passed else None


def texts_needed(max_error: float, certainty: float = CERTAINTY) -> int:
    """How many texts, all answered rightly, reject that more than `max_error` of the answers are wrong."""
    return math.ceil(math.log(1 - certainty) / math.log1p(-max_error))


def explain_none(count: int, max_error: float) -> str:
    """Why there is no threshold."""
    needed = texts_needed(max_error)
    if count < needed:
        return f"there are {count} validation texts, and at least {needed} are needed even if all are answered rightly"
    return f"there is no confidence above which the {count} validation texts show so few mistakes with such certainty"


def _share(confidence: Array, threshold: float | None) -> float:
    return float((confidence >= threshold).mean()) if threshold is not None else 0.0
