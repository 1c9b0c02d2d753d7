"""What is Unicode text and what is not."""

import pytest

from tuneserve.unicode import has_surrogates


@pytest.mark.parametrize(
    ("text", "found"),
    [("", False), ("a\n", False), ("é😀\ud7ff\ue000", False), ("a\ud83d", True), ("\ude00a", True), ("\udcff", True)],
    ids=range(6),
)
def test_half_a_surrogate_pair_is_found(text: str, found: bool) -> None:
    assert has_surrogates(text) == found
