import numpy as np
import pytest
from scipy import special, stats
from sklearn.metrics import f1_score

from tuneserve.lifecycle import statistics
from tuneserve.lifecycle.statistics import (
    chi_square,
    fisher,
    holm,
    kolmogorov_smirnov,
    paired_bootstrap,
    rank_sum,
    resampled_figures,
    sequential_p_value,
    sign_test,
    wilson,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.3])
def test_the_distance_of_two_samples_is_scipys(shift: float) -> None:
    first, second = RNG.normal(size=700), RNG.normal(size=500) + shift
    wanted = stats.ks_2samp(first, second, method="asymp")
    distance, p_value = kolmogorov_smirnov(first, second)
    assert distance == pytest.approx(wanted.statistic)
    assert p_value == pytest.approx(wanted.pvalue, rel=0.5)  # SciPy corrects for finite samples


@pytest.mark.parametrize(("gained", "lost"), [(0, 1), (3, 12), (12, 3), (0, 5), (7, 7)])
def test_the_sign_test_is_scipys_exact_binomial_one(gained: int, lost: int) -> None:
    assert sign_test(gained, lost) == pytest.approx(stats.binomtest(lost, gained + lost, alternative="greater").pvalue)
    assert sign_test(gained, 0) == 1


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_looking_after_every_label_calls_what_is_true_untrue_in_a_twentieth_of_the_cases(share: float) -> None:
    labels, cases = 300, 1000
    found = (np.random.default_rng(0).random((cases, labels)) < share).cumsum(axis=1)
    p_values = {
        (number, count): sequential_p_value(number, count, share)
        for count in range(1, labels + 1)
        for number in np.unique(found[:, count - 1]).tolist()
    }
    ever = sum(any(p_values[number, at + 1] < 0.05 for at, number in enumerate(row)) for row in found.tolist())
    assert 0 < ever <= 0.05 * cases
    exact = stats.binom.sf(found - 1, np.arange(1, labels + 1), share)
    assert (exact < 0.05).any(axis=1).mean() > 0.15  # a test for one look


def test_a_larger_share_is_soon_found_out_and_a_smaller_one_never() -> None:
    assert sequential_p_value(0, 0, 0.02) == sequential_p_value(0, 500, 0.02) == 1
    assert sequential_p_value(1, 1, 0.02) > 0.05
    assert sequential_p_value(8, 100, 0.02) < 0.05 < sequential_p_value(5, 100, 0.02)
    assert sequential_p_value(500, 500, 0.9) < 1e-3
    assert sequential_p_value(5, 500, 0.02) == 1


def test_equal_values_do_not_make_a_difference_surer() -> None:
    first, second = RNG.integers(0, 3, 1000), RNG.integers(0, 3, 500)
    assert kolmogorov_smirnov(first, first[::2])[0] < 0.05
    assert kolmogorov_smirnov(np.zeros(100), np.zeros(50)) == (0, 1)
    assert kolmogorov_smirnov(np.zeros(100), np.ones(50)) == (1, pytest.approx(0, abs=1e-20))
    assert kolmogorov_smirnov(first, second)[1] > 0.01


def test_shares_of_labels_are_tested_as_scipy_does() -> None:
    first, second = np.array([500, 300, 200]), np.array([220, 180, 100])
    assert chi_square(first, second) == pytest.approx(stats.chi2_contingency([first, second]).pvalue)
    assert chi_square(second, first) == pytest.approx(chi_square(first, second))


def test_rare_labels_are_counted_as_one() -> None:
    first, second = np.array([1000, 980, 5, 3, 8, 4]), np.array([260, 230, 0, 4, 3, 3])
    together = [[1000, 980, 20], [260, 230, 10]]
    assert chi_square(first, second) == pytest.approx(stats.chi2_contingency(together).pvalue)
    assert chi_square(np.array([100, 0]), np.array([50, 0])) == 1
    assert chi_square(np.array([100, 1]), np.array([50, 0])) == 1  # nothing is left beside the rare ones


def test_ranks_are_tested_as_scipy_does() -> None:
    first, second = RNG.binomial(3, 0.1, 900) / 3, RNG.binomial(3, 0.15, 500) / 3
    assert rank_sum(first, second) == pytest.approx(
        stats.mannwhitneyu(first, second, method="asymptotic").pvalue, rel=1e-6
    )
    assert rank_sum(np.zeros(10), np.zeros(20)) == 1


@pytest.mark.parametrize(("first", "second"), [(0, 3), (40, 0), (200, 60), (0, 0), (1000, 500)])
def test_two_shares_are_tested_as_scipy_does(first: int, second: int) -> None:
    wanted = stats.fisher_exact([[first, 1000 - first], [second, 500 - second]]).pvalue
    assert fisher(first, 1000, second, 500) == pytest.approx(wanted, rel=1e-6)


def test_p_values_are_corrected_for_their_number() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),  # Newcombe, Statistics in Medicine 17 (1998), table I
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_wilsons(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == pytest.approx((low, high), abs=6e-5)


def test_a_test_drawn_anew_has_the_figures_of_texts_drawn_one_by_one() -> None:
    confusion = np.array([[40, 5, 0], [9, 20, 3], [0, 1, 4]])
    true, predicted = np.repeat(np.indices((3, 3)).reshape(2, -1), confusion.ravel(), axis=1)
    rng = np.random.default_rng(1)
    accuracies, scores = [], []
    for _ in range(1000):
        rows = rng.integers(len(true), size=len(true))
        accuracies.append((true[rows] == predicted[rows]).mean())
        scores.append(f1_score(true[rows], predicted[rows], average="macro"))
    for found, drawn in zip(resampled_figures(confusion), (accuracies, scores), strict=True):
        assert found == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.02)
    assert resampled_figures(confusion) == resampled_figures(confusion)


def test_labels_that_no_text_has_do_not_lower_the_score_of_a_test_drawn_anew() -> None:
    assert resampled_figures(np.diag([3, 0, 1])) == ((1.0, 1.0), (1.0, 1.0))


def test_the_bootstrap_covers_the_true_difference_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    below = 0
    for seed in range(400):
        gains = rng.random(500)
        right, before = gains < 0.86, (gains < 0.80) | (gains > 0.96)  # truly 86% and 84%
        low, high = paired_bootstrap(right, before, seed=seed)
        assert low <= high
        below += low > 0.02
    assert 0.02 < below / 400 < 0.08


@pytest.mark.parametrize("distance", [0.0, 0.09, 0.3, 0.9999, 1.0, 1.5, 4.0])
def test_kolmogorovs_distribution_is_scipys(distance: float) -> None:
    assert statistics._kolmogorov(distance) == pytest.approx(special.kolmogorov(distance), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 76, 999])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.8, 1.0, 1.3, 4.0])
def test_the_distribution_of_chi_square_is_scipys(freedom: int, share: float) -> None:
    wanted = special.chdtrc(freedom, share * freedom)
    assert statistics._chi_square(freedom, share * freedom) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("gained", "lost"), [(0, 1), (400, 500), (50_000, 50_700), (3, 0)])
def test_the_sign_test_is_exact_for_many_texts_too(gained: int, lost: int) -> None:
    wanted = special.bdtrc(lost - 1, gained + lost, 0.5) if lost else 1.0
    assert sign_test(gained, lost) == pytest.approx(wanted, rel=1e-6)
