"""Cutting texts into batches by a budget of tokens."""

from collections.abc import Iterator, Sequence


def split_by_tokens(lengths: Sequence[int], max_tokens: int, *, padded: bool = False) -> Iterator[slice]:
    """Slices of consecutive texts, in order, with at most `max_tokens` tokens and at least one text each.

    Args:
        lengths: tokens of each text.
        max_tokens: of a slice, unless a single text is longer.
        padded: whether every text of a slice counts as many tokens as the longest.
    """
    begin = tokens = longest = 0
    for end, length in enumerate(lengths):
        tokens, longest = tokens + length, max(longest, length)
        if end > begin and ((end - begin + 1) * longest if padded else tokens) > max_tokens:
            yield slice(begin, end)
            begin, tokens, longest = end, length, length
    if lengths:
        yield slice(begin, len(lengths))
