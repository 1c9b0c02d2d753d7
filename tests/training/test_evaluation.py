import numpy as np
import pytest

from tuneserve.training.evaluation import expected_calibration_error, score


def test_figures_of_a_small_case_worked_out_by_hand() -> None:
    # Four texts; the model is 80% sure each time and right three times.
    logits = np.log(np.array([[0.8, 0.2], [0.8, 0.2], [0.2, 0.8], [0.2, 0.8]]))
    figures = score(logits, np.array([0, 0, 1, 0]), ["a", "b"])
    assert figures["accuracy"] == 0.75
    assert figures["confusion_matrix"] == [[2, 1], [0, 1]]
    assert figures["per_class"]["a"] == pytest.approx({"precision": 1, "recall": 2 / 3, "f1": 0.8, "texts": 3})
    assert figures["per_class"]["b"] == pytest.approx({"precision": 0.5, "recall": 1, "f1": 2 / 3, "texts": 1})
    assert figures["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert figures["log_loss"] == pytest.approx(-(3 * np.log(0.8) + np.log(0.2)) / 4)
    assert figures["ece"] == pytest.approx(0.05)


def test_a_class_that_the_test_never_shows_counts_as_zero_and_not_as_an_error() -> None:
    figures = score(np.array([[5.0, 0.0, 0.0], [5.0, 0.0, 0.0]]), np.array([0, 0]), ["a", "b", "c"])
    assert figures["per_class"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "texts": 0}
    assert figures["accuracy"] == 1


def test_calibration_error_is_zero_when_confidence_is_kept_and_large_when_it_is_not() -> None:
    sure = np.array([[0.99, 0.01]] * 100)
    assert expected_calibration_error(sure, np.array([0] * 99 + [1])) == pytest.approx(0, abs=1e-9)
    assert expected_calibration_error(sure, np.array([1] * 100)) == pytest.approx(0.99)
    assert expected_calibration_error(np.array([[1.0, 0.0]]), np.array([0])) == 0
