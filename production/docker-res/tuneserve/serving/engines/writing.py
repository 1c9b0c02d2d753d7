"""What writes: prompts in, one token of each text at a time out. Everything else of serving stands on this side."""

from collections.abc import Sequence
from typing import Protocol

from tuneserve.network.wishes import Wishes, Writing


class WritingEngine(Protocol):
    """One loaded model. One thread uses it."""

    max_tokens: int
    """Tokens that may be under way at a time: rows of all texts and beams, each as long as the longest will be."""

    device: str
    """`cuda` or `cpu`."""

    sound: bool
    """Whether what is under way can go on; False after a failure in the midst of a change, until it is cleared."""

    def join(self, prompts: Sequence[tuple[Sequence[int], Wishes]]) -> list[Writing]:
        """Read prompts, and write the first token after each."""
        ...

    def step(self) -> None:
        """Write one token more of every text that is not done."""
        ...

    def drop(self, writings: Sequence[Writing]) -> None:
        """Leave texts as they are."""
        ...

    def clear(self) -> None:
        """Drop all texts, and begin anew."""
        ...
