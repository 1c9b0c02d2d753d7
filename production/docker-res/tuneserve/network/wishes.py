"""How a text is to be written, and what was; read by both halves, so it loads nothing."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Wishes:
    """How a text is to be written; lengths count what is written, and of an encoder-decoder's text all of it."""

    max_new_tokens: int
    min_new_tokens: int = 0
    num_beams: int = 1
    early_stopping: bool = False
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(eq=False, slots=True)
class Writing:
    """A text that is being written: the token ids so far, and whether that is all; of beams, none before the end."""

    ids: list[int] = field(default_factory=list)
    done: bool = False
