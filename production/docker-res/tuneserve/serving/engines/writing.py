"""What writes: prompts in, one token of each text at a time out. Everything else of serving stands on this side."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tuneserve.network.wishes import Wishes


@dataclass(eq=False, slots=True)
class Writing:
    """A text that is being written: the token ids so far, and whether that is all; of beams, none before the end."""

    ids: list[int] = field(default_factory=list)
    done: bool = False


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
