import math
from typing import Any

import numpy as np
import pytest

from tuneserve.artifact import Version
from tuneserve.errors import TuneserveError
from tuneserve.serving.classifier import BATCH_TEXTS, Classifier


def test_answers_come_in_the_order_of_the_texts_whatever_their_lengths(classifier: Classifier) -> None:
    texts = [" ".join(["film"] * (1 + place * 7 % 11)) for place in range(3 * BATCH_TEXTS + 5)]
    together = classifier.predict(texts)
    assert [one.tokens for one in together] == [len(text.split()) + 2 for text in texts]
    assert together == [classifier.predict([text])[0] for text in texts]


def test_batches_hold_texts_of_like_length(classifier: Classifier, engine: Any) -> None:
    classifier.predict(["film"] * BATCH_TEXTS + ["film " * 12] * BATCH_TEXTS)
    assert engine.shapes == [(BATCH_TEXTS, 3), (BATCH_TEXTS, 14)]


def test_scores_are_probabilities_and_the_label_is_the_likeliest(classifier: Classifier) -> None:
    [one] = classifier.predict(["film"])  # [CLS] 2, film 6, [SEP] 3: the logits are -0.13 and 0.13
    assert one.label == "good"
    assert sum(one.scores.values()) == pytest.approx(1)
    total = sum(classifier._encoder.encode(["film"])[0].ids) / 100
    assert one.scores["good"] == pytest.approx(1 / (1 + math.exp(-2 * total)))


def test_a_text_that_was_cut_says_so(classifier: Classifier) -> None:
    fits, cut = classifier.predict(["film " * 14, "film " * 15])
    assert (fits.tokens, fits.truncated) == (16, False)
    assert (cut.tokens, cut.truncated) == (16, True)


def test_html_line_breaks_are_read_as_spaces(classifier: Classifier) -> None:
    first, second = classifier.predict(["good<br /><BR>film", "good film"])
    assert first == second


def test_a_figure_that_is_no_number_is_an_error_and_not_a_score(version: Version) -> None:
    class BrokenEngine:
        def infer(self, input_ids: Any, attention_mask: Any) -> Any:
            return np.full((len(input_ids), 2), np.nan, dtype=np.float32)

    with pytest.raises(TuneserveError, match="not a number"):
        Classifier(version, BrokenEngine()).predict(["film"])
