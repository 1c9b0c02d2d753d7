"""Which texts to label next."""

import random

import numpy as np
import pytest

from tuneserve.lifecycle.drift import Answers, Observation, Reference, rare_in
from tuneserve.lifecycle.selection import choose, density, margin_uncertainty, sketch, worth


def test_texts_with_the_same_rare_words_are_alike() -> None:
    texts = ["the blue kettle leaks", "my blue kettle leaks", "the tram was late", "THE BLUE  kettle leaks!", ""]
    vectors = sketch(texts)
    alike = vectors @ vectors.T
    assert alike[0, 3] == pytest.approx(1, abs=1e-5)  # case, spaces and signs are not looked at
    assert alike[0, 1] > 0.5 > 0.3 > abs(alike[0, 2])
    assert not vectors[4].any()


def test_a_common_text_has_many_neighbours() -> None:
    rng = random.Random(0)
    words = [f"word{number}" for number in range(400)]
    odd = [" ".join(rng.sample(words, 6)) for _ in range(30)]
    usual = [f"where is my parcel number {number}" for number in range(30)]
    common = density(sketch([*odd, *usual]))
    assert common[30:].min() > common[:30].max()
    assert density(sketch(["one"])).tolist() == [0]


def test_a_model_is_unsure_where_two_labels_are_as_likely() -> None:
    probabilities = np.array([[0.5, 0.5, 0.0], [0.4, 0.3, 0.3], [0.9, 0.1, 0.0]])
    assert margin_uncertainty(probabilities) == pytest.approx([1, 0.9, 0.2])
    assert margin_uncertainty(np.ones((3, 1))).tolist() == [0, 0, 0]


def test_of_texts_that_say_the_same_one_comes_first_and_the_others_last() -> None:
    texts = ["where is my parcel", "where is my parcel?", "the card was declined", "Where is my parcel!"]
    value = np.array([1.0, 0.99, 0.5, 0.98])
    assert choose(value, sketch(texts), 2) == [0, 2]
    assert sorted(choose(value, sketch(texts), 9)) == [0, 1, 2, 3]
    assert choose(np.zeros(0), sketch([]), 3) == []


def test_what_the_test_did_not_have_is_worth_more() -> None:
    value = worth(np.array([0.5, 0.5, 0.0]), np.zeros(3), np.array([False, True, True]))
    assert value.tolist() == [0.25, 0.375, 0]


def test_a_text_is_rare_by_its_length_or_its_unknown_words() -> None:
    rows = [(0, 0.9, 10 + number % 20, 0, False) for number in range(200)]
    reference = Reference(["a", "b"], Answers.from_columns(list(zip(*rows, strict=True))))
    seen = [(15, 0), (15, 3), (90, 0), (2, 1)]
    answers = [Observation(0, 0.9, tokens, unknown, False) for tokens, unknown in seen]
    assert rare_in(reference, [*answers, None]) == [[], ["unknown"], ["length"], ["length", "unknown"], []]
    assert rare_in(None, answers) == [[]] * 4
