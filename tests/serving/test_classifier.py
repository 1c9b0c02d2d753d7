import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tuneserve.artifact import Golden, Version, write_golden
from tuneserve.errors import EngineError, StoreError, TextError
from tuneserve.tasks.classifier import Classifier, Prediction


def test_answers_come_in_the_order_of_the_texts_whatever_their_lengths(classifier: Classifier) -> None:
    texts = [" ".join(["film"] * (1 + place * 7 % 11)) for place in range(101)]
    together = classifier.predict(texts)
    assert [one.tokens for one in together] == [len(text.split()) + 2 for text in texts]
    assert together == [classifier.predict([text])[0] for text in texts]


def test_batches_hold_texts_of_like_length(classifier: Classifier, engine: Any) -> None:
    classifier.predict(["film", "film " * 12] * 21)
    assert engine.batches[0] == [3] * 21
    assert all(len(set(batch)) == 1 and sum(batch) <= engine.max_batch_tokens for batch in engine.batches)


def test_scores_are_probabilities_and_the_label_is_the_likeliest(classifier: Classifier) -> None:
    [one] = classifier.predict(["film"])  # [CLS] 2, film 6, [SEP] 3: the logits are -0.13 and 0.13
    assert one.label == "good"
    assert sum(one.scores.values()) == pytest.approx(1)
    total = sum(classifier.body.encoder.encode(["film"])[0].ids) / 100
    assert one.scores["good"] == pytest.approx(1 / (1 + math.exp(-2 * total)))


def test_a_text_that_was_cut_says_so(classifier: Classifier) -> None:
    fits, cut = classifier.predict(["film " * 14, "film " * 15])
    assert (fits.tokens, fits.truncated) == (16, False)
    assert (cut.tokens, cut.truncated) == (16, True)


def test_html_line_breaks_are_read_as_spaces(classifier: Classifier) -> None:
    first, second = classifier.predict(["good<br /><BR>film", "good film"])
    assert first == second


def test_a_figure_that_is_no_number_is_an_error_and_not_a_score(
    version: Version, make_engine: Callable[..., Any]
) -> None:
    engine = make_engine(lambda engine: np.full((len(engine.running), 2), np.nan, dtype=np.float32))
    [answer] = Classifier(version, engine).predict(["film"])
    assert isinstance(answer, EngineError)
    assert "not a number" in str(answer)


@pytest.mark.parametrize("text", ["", " \n", "\ud800"])
def test_a_text_that_cannot_be_read_fails_alone(classifier: Classifier, text: str) -> None:
    first, bad, last = classifier.predict(["film", text, "film"])
    assert isinstance(bad, TextError)
    assert first == last


def test_a_long_text_may_be_an_error(version: Version, engine: Any) -> None:
    fits, cut = Classifier(version, engine, long_text="error").predict(["film " * 14, "film " * 15])
    assert fits.tokens == 16
    assert isinstance(cut, TextError)
    assert "16 tokens" in str(cut)


def test_a_long_text_may_be_read_in_overlapping_windows(version: Version, engine: Any) -> None:
    classifier = Classifier(version, engine, long_text="window")
    [one] = classifier.predict(["film " * 30])  # 14 words a window, of which 3 are the last one's
    assert sorted(engine.batches[0]) == [10, 16, 16]
    assert (one.tokens, one.truncated) == (32, False)
    windows = [classifier.predict(["film " * words])[0].scores["good"] for words in (14, 14, 8)]
    assert one.scores["good"] == pytest.approx(sum(windows) / 3)


@pytest.mark.parametrize("long_text", ["truncate", "error", "window"])
def test_whatever_becomes_of_long_texts_the_golden_answers_are_given(
    version: Version, engine: Any, classifier: Classifier, long_text: Any
) -> None:
    texts = ["film", "good " * 10 + "film " * 30]
    stored = Golden(texts, [one.scores for one in classifier.predict(texts) if isinstance(one, Prediction)])
    asked = Classifier(version, engine, long_text=long_text)
    write_golden(version.folder, stored)
    asked.prove()
    stored.scores[0]["good"] += 0.1
    write_golden(version.folder, stored)
    with pytest.raises(StoreError, match=r"differs by 0\.100"):
        asked.prove()
