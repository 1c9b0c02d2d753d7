"""Texts cut into batches by tokens."""

import pytest

from tuneserve.token_budget import split_by_tokens


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "padded", "parts"),
    [
        ([], 10, False, []),
        ([4, 6, 1], 10, False, [[4, 6], [1]]),
        ([4, 6, 1], 10, True, [[4], [6], [1]]),
        ([1, 5, 5], 10, True, [[1, 5], [5]]),
        ([11, 12], 10, False, [[11], [12]]),
        ([11, 1, 12], 10, True, [[11], [1], [12]]),
        ([5, 5, 5, 5], 10, True, [[5, 5], [5, 5]]),
    ],
)
def test_a_part_ends_before_the_text_that_would_exceed_the_budget(
    lengths: list[int], max_tokens: int, padded: bool, parts: list[list[int]]
) -> None:
    assert [lengths[part] for part in split_by_tokens(lengths, max_tokens, padded=padded)] == parts
