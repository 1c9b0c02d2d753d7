"""Tests of whether two samples come from one distribution, and intervals of shares: what chance alone explains.

Distributions are in closed form, in the standard library's functions: a server does without SciPy.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

FEWEST_EXPECTED = 5
"""Texts of a label that both samples should show at least, or the chi-square approximation is a poor one (Cochran)."""
RESAMPLES = 2000
TESTS = 1000
DRAWS_AT_ONCE = 100
"""Of a matrix, whose cells may be many."""
CONFIDENCE = 0.95
LARGER = (1.5, 2.0, 3.0, 5.0)
"""How many times a share the ones are that it is tested against; see `sequential_p_value`."""


def kolmogorov_smirnov(first: Array, second: Array) -> tuple[float, float]:
    """The largest distance of the two cumulative shares, and its p-value for large samples.

    Equal values make the p-value too large, never too small.
    """
    values = np.unique(np.concatenate([first, second]))
    shares = [np.searchsorted(np.sort(one), values, side="right") / len(one) for one in (first, second)]
    distance = float(np.abs(shares[0] - shares[1]).max())
    size = len(first) * len(second) / (len(first) + len(second))
    return distance, _kolmogorov(math.sqrt(size) * distance)


def chi_square(first: Array, second: Array) -> float:
    """The p-value of two lists of counts by label having the same shares; the rarest labels are counted as one."""
    counts = np.stack([first, second]).astype(np.float64)
    counts = counts[:, np.argsort(counts.sum(axis=0))]
    expected = counts.sum(axis=0) * counts.sum(axis=1).min() / counts.sum()
    rare = int(np.count_nonzero(expected < FEWEST_EXPECTED))
    while 0 < rare < len(expected) and expected[:rare].sum() < FEWEST_EXPECTED:
        rare += 1
    if rare:
        counts = np.concatenate([counts[:, :rare].sum(axis=1, keepdims=True), counts[:, rare:]], axis=1)
    if counts.shape[1] < 2:
        return 1.0
    wanted = np.outer(counts.sum(axis=1), counts.sum(axis=0)) / counts.sum()
    return _chi_square(counts.shape[1] - 1, float(((counts - wanted) ** 2 / wanted).sum()))


def rank_sum(first: Array, second: Array) -> float:
    """The two-sided p-value of Mann and Whitney's test, by the normal distribution with the correction for ties."""
    _, indices, times = np.unique(np.concatenate([first, second]), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(times) - (times - 1) / 2)[indices.ravel()]
    n, m = len(first), len(second)
    surplus = abs(ranks[:n].sum() - n * (n + m + 1) / 2)
    ties = float((times.astype(np.float64) ** 3 - times).sum()) / ((n + m) * (n + m - 1))
    variance = n * m / 12 * (n + m + 1 - ties)
    return math.erfc(max(0.0, surplus - 0.5) / math.sqrt(2 * variance)) if variance > 0 else 1.0


def fisher(first: int, first_texts: int, second: int, second_texts: int) -> float:
    """The two-sided p-value of Fisher's exact test: `first` of `first_texts` against `second` of `second_texts`."""
    both = first + second
    possible = np.arange(max(0, both - second_texts), min(both, first_texts) + 1)
    log_shares = _log_ways(first_texts, possible) + _log_ways(second_texts, both - possible)
    shares = np.exp(log_shares - log_shares.max())
    shares /= shares.sum()
    seen = shares[first - possible[0]]
    return min(1.0, float(shares[shares <= seen * (1 + 1e-7)].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number: calling those up to a level keeps the chance of any false call below it.

    Holm, A simple sequentially rejective multiple test procedure, 1979; the tests may depend on each other.
    """
    corrected = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = largest
    return corrected


def wilson(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% interval of a share (Wilson, Probable inference, 1927): it holds for few labels and near 0 and 1 too.

    Args:
        right: of the share.
        count: of all, above 0.
        z: quantile of the normal distribution.
    """
    share = right / count
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    whole = 1 + z * z / count
    return max(0.0, (middle - spread) / whole), min(1.0, (middle + spread) / whole)


def sequential_p_value(found: int, count: int, share: float) -> float:
    """How likely so many of `count` are, if at most this share of all is such; valid however often one looks.

    A test made anew after each label would sooner or later reject what is true. This is one over the mean likelihood
    ratio of larger shares, which begins at 1 and does not grow by itself: the chance that it ever comes down to a level
    is at most that level (Ville, Étude critique de la notion de collectif, 1939; Shafer, Testing by betting, 2021).

    Args:
        found: of the kind.
        count: of all, in the order of their coming.
        share: above 0 and below 1.
    """
    log_ratios = []
    for times in LARGER:
        larger = min(times * share, (1 + share) / 2)
        log_ratios.append(
            found * math.log(larger / share) + (count - found) * (math.log1p(-larger) - math.log1p(-share))
        )
    highest = max(log_ratios)
    ratio = highest + math.log(sum(math.exp(one - highest) for one in log_ratios) / len(log_ratios))
    return math.exp(min(0.0, -ratio))


def sign_test(gained: int, lost: int) -> float:
    """The one-sided p-value of `lost` or more of the texts that only one of two models has right, if they were equal.

    It is exact, for a handful of texts too (McNemar, Note on the sampling error of the difference, 1947).
    """
    count = gained + lost
    return float(np.exp(_log_ways(count, np.arange(lost, count + 1)) - count * math.log(2)).sum()) if lost else 1.0


def paired_bootstrap(right: Array, right_before: Array, *, seed: int = 0) -> tuple[float, float]:
    """One-sided 95% bounds of the difference in accuracy, both models having answered the same texts.

    The texts are drawn anew with replacement (Efron and Tibshirani, An Introduction to the Bootstrap, 1993). A text
    counts +1, 0 or -1, so a draw of all is one of the three counts: no loop over texts is needed.

    Args:
        right: whether the candidate answered rightly, bool [texts].
        right_before: whether the champion did, bool [texts].
        seed: of the draws.
    """
    count = len(right)
    gained, lost = int((right & ~right_before).sum()), int((~right & right_before).sum())
    draws = np.random.default_rng(seed).multinomial(
        count, [gained / count, lost / count, (count - gained - lost) / count], size=RESAMPLES
    )
    differences = (draws[:, 0] - draws[:, 1]) / count
    low, high = np.quantile(differences, [1 - CONFIDENCE, CONFIDENCE])
    return float(low), float(high)


def resampled_figures(confusion: Array, *, seed: int = 0) -> tuple[tuple[float, float], tuple[float, float]]:
    """The 95% intervals of accuracy and macro F1 over tests that are drawn anew from this one.

    A text is one of the matrix's cells, so a draw of all texts with replacement is a multinomial draw of the cells
    (Efron and Tibshirani, 1993): no loop over texts is needed. Macro F1 is the mean over the labels that a draw shows.

    Args:
        confusion: texts, int [true labels, predicted labels], one at least.
        seed: of the draws.
    """
    true, predicted = np.nonzero(confusion)  # the true labels ascend
    counts = confusion[true, predicted]
    total = int(counts.sum())
    rng = np.random.default_rng(seed)
    by_predicted = np.argsort(predicted, kind="stable")
    right = np.flatnonzero(true == predicted)
    accuracies, scores = [], []
    for _ in range(0, TESTS, DRAWS_AT_ONCE):
        draws = rng.multinomial(total, counts / total, size=DRAWS_AT_ONCE)
        hits = np.zeros((DRAWS_AT_ONCE, len(confusion)))
        hits[:, true[right]] = draws[:, right]
        marked = _sums(draws, true, len(confusion)) + _sums(
            draws[:, by_predicted], predicted[by_predicted], len(confusion)
        )
        shown = marked > 0
        f1 = 2 * hits / np.where(shown, marked, 1)
        accuracies.append(hits.sum(1) / total)
        scores.append(f1.sum(1) / shown.sum(1))
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    (low, high), (low_f1, high_f1) = (np.quantile(np.concatenate(one), tails) for one in (accuracies, scores))
    return (float(low), float(high)), (float(low_f1), float(high_f1))


def _sums(draws: Array, label_ids: Array, labels: int) -> Array:
    """Sums of the columns of each label, int [draws, labels]; the columns' labels ascend."""
    known, starts = np.unique(label_ids, return_index=True)
    sums = np.zeros((len(draws), labels), dtype=np.int64)
    sums[:, known] = np.add.reduceat(draws, starts, axis=1)
    return sums


def _kolmogorov(distance: float) -> float:
    """The chance of this distance or a larger one, times the square root of the size (Kolmogorov, 1933)."""
    if distance < 0.1:
        return 1.0
    if distance < 1:  # of the two series for the same the one that needs few terms here
        steps = [math.exp(-(((2 * k - 1) * math.pi / distance) ** 2) / 8) for k in range(1, 6)]
        return 1 - math.sqrt(2 * math.pi) / distance * sum(steps)
    return 2 * math.fsum((-1.0) ** (k - 1) * math.exp(-2 * (k * distance) ** 2) for k in range(1, 6))


def _chi_square(freedom: int, value: float) -> float:
    """The chance of this value or a larger one with so many degrees of freedom, a whole number."""
    half = value / 2
    if half <= 0:
        return 1.0
    powers = np.arange(freedom % 2 / 2, freedom / 2)
    whole = math.erfc(math.sqrt(half)) if freedom % 2 else 0.0
    return min(1.0, whole + float(np.exp(powers * math.log(half) - half - _log_gamma(powers + 1)).sum()))


def _log_ways(total: int, chosen: Array) -> Array:
    """The logarithms of binomial coefficients."""
    found: Array = math.lgamma(total + 1) - _log_gamma(chosen + 1) - _log_gamma(total - chosen + 1)
    return found


_log_gamma = np.vectorize(math.lgamma, otypes=[np.float64])
