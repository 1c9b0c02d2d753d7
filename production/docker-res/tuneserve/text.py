"""From text to token ids to batches: one way, for training and for serving, so that both read a text alike."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

# Possessive, and with one place for each space: a tag without an end must not be tried in every way it could be split.
BREAK = r"<\s*+br\s*+(?:/\s*+)?>"
LINE_BREAK_TAG = re.compile(BREAK, re.IGNORECASE)

INVISIBLE = (
    r"\s\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
"""Spaces, control characters, and what Unicode calls ignorable by default; the inside of a set of a pattern."""
BLANK = re.compile(rf"(?:[{INVISIBLE}]|{BREAK})*+", re.IGNORECASE)

CHARACTERS_PER_TOKEN = 64
"""Characters read of a text for each token of the limit: more than real texts have, so only others are cut there."""
MAX_WINDOWS = 8
"""A text that is read in windows may have as many characters as this many windows of CHARACTERS_PER_TOKEN."""
ENCODE_CHARACTERS = 1 << 16
"""Most characters that the library is given at once, for it needs some 300 bytes for each while it encodes."""


def plain(text: str) -> str:
    """The text without HTML line breaks, which scraped reviews are full of; all else stays as it is.

    Only `<br>` is removed, in all its spellings: other markup may be content ("the <b> tag").
    """
    return LINE_BREAK_TAG.sub(" ", text)


def is_blank(text: str) -> bool:
    """Whether there is nothing to read: only spaces, line breaks (HTML's too) and characters that are not shown."""
    return BLANK.fullmatch(text) is not None


def has_surrogates(text: str) -> bool:
    """Whether a string holds half a surrogate pair, which no encoding of Unicode can write.

    An escape in JSON can make one, and so can bytes of the environment that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


WINDOW_OVERLAP = 0.25
"""Share of a window that the next one repeats, so that every phrase is whole in one of them."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one text.

    `windows` are token ids, special ones included, of the text from its beginning: one, unless long texts are read in
    several; `read` counts each token once; `truncated` says whether the text continues after the last window.
    """

    windows: Sequence[Sequence[int]]
    read: int
    truncated: bool

    @property
    def ids(self) -> Sequence[int]:
        """The ids of the first window, usually the only one."""
        return self.windows[0]


def unknown_id(tokenizer: "Tokenizer") -> int | None:
    """The id of the unknown token; None for tokenizers that can encode any text, such as GPT-2's."""
    model = json.loads(tokenizer.to_str())["model"]
    if model.get("unk_id") is not None:  # Unigram
        return int(model["unk_id"])
    token = model.get("unk_token")
    return tokenizer.token_to_id(token) if token else None


class TextEncoder:
    """A `tokenizer.json` with the length limit of one model. Safe to share between threads.

    Texts are truncated to `max_tokens`, special tokens included, or read in overlapping `windows` of that length;
    nothing is padded here. Before anything else a text is cut to `max_characters`, whatever it consists of, so that
    time and memory are bounded; what was cut counts as truncated. Then it goes through `clean`.
    """

    def __init__(
        self,
        tokenizer: "Tokenizer",
        *,
        max_tokens: int,
        windows: bool = False,
        clean: Callable[[str], str] = plain,
    ) -> None:
        self.max_tokens = max_tokens
        self.max_characters = max_tokens * CHARACTERS_PER_TOKEN * (MAX_WINDOWS if windows else 1)
        self._tokenizer, self._clean = tokenizer, clean
        self._tokenizer.no_padding()
        self._special = tokenizer.num_special_tokens_to_add(is_pair=False)
        self._overlap = int((max_tokens - self._special) * WINDOW_OVERLAP) if windows else 0
        self._windows = windows
        self.unknown_id = unknown_id(tokenizer)
        self._tokenizer.enable_truncation(max_tokens, stride=self._overlap)

    @classmethod
    def from_folder(
        cls, folder: Path, *, max_tokens: int, windows: bool = False, clean: Callable[[str], str] = plain
    ) -> "TextEncoder":
        """Read `tokenizer.json` from a model's folder."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return cls(tokenizer, max_tokens=max_tokens, windows=windows, clean=clean)

    @classmethod
    def from_json(cls, tokenizer: str, *, max_tokens: int, clean: Callable[[str], str] = plain) -> "TextEncoder":
        """Read the content of a `tokenizer.json`."""
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_str(tokenizer), max_tokens=max_tokens, clean=clean)

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of each text, in order; the library encodes in several threads."""
        cut = [text[: self.max_characters] for text in texts]
        found: list[Tokens] = []
        for part in split_by_tokens(list(map(len, cut)), ENCODE_CHARACTERS):
            encodings = self._tokenizer.encode_batch_fast([self._clean(text) for text in cut[part]])
            found += map(self._read, encodings, [len(text) > self.max_characters for text in texts[part]])
        return found

    def _read(self, encoding: "Encoding", is_cut: bool) -> Tokens:
        if not self._windows or not encoding.overflowing:
            ids = encoding.ids
            return Tokens([ids], len(ids), is_cut or bool(encoding.overflowing))
        windows = [encoding.ids, *(one.ids for one in encoding.overflowing)]
        repeated = (len(windows) - 1) * (self._overlap + self._special)
        return Tokens(windows, sum(map(len, windows)) - repeated, truncated=is_cut)

    def to_json(self) -> str:
        """The tokenizer and its limits as JSON: equal texts encode equally wherever this string is equal."""
        return json.dumps({"tokenizer": self._tokenizer.to_str(), "max_tokens": self.max_tokens})


def split_by_tokens(lengths: Sequence[int], max_tokens: int, *, padded: bool = False) -> Iterator[slice]:
    """Batches of consecutive texts as slices, in order, with at most `max_tokens` tokens and at least one text each.

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
