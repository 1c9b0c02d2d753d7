"""From text to token ids: one way, for training and for serving, so that both read a text alike."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

LINE_BREAK_TAG = re.compile(r"<\s*br\s*/?\s*>", re.IGNORECASE)


def plain(text: str) -> str:
    """The text without HTML line breaks, which scraped reviews are full of; all else stays as it was written.

    Only `<br>` goes, in all its spellings: other markup may be what a text is about ("the <b> tag").
    """
    return LINE_BREAK_TAG.sub(" ", text)


@dataclass(frozen=True, slots=True)
class Tokens:
    """The ids of one text, special tokens included, and whether the text was longer than what was read."""

    ids: list[int]
    truncated: bool


class TextEncoder:
    """A `tokenizer.json` with the length limit of one model. Safe to share between threads.

    Texts are cut at `max_tokens`, special tokens included; nothing is padded here.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens)

    @classmethod
    def from_folder(cls, folder: Path, *, max_tokens: int) -> "TextEncoder":
        """Read `tokenizer.json` from a model's folder."""
        return cls(Tokenizer.from_file(str(folder / "tokenizer.json")), max_tokens=max_tokens)

    @classmethod
    def from_json(cls, tokenizer: str, *, max_tokens: int) -> "TextEncoder":
        """Read the content of a `tokenizer.json`."""
        return cls(Tokenizer.from_str(tokenizer), max_tokens=max_tokens)

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Token ids of each text, in order; the library spreads the texts over its threads."""
        encodings = self._tokenizer.encode_batch_fast([plain(text) for text in texts])
        return [Tokens(encoding.ids, bool(encoding.overflowing)) for encoding in encodings]

    def to_json(self) -> str:
        """The tokenizer and its limits as JSON: equal texts encode equally wherever this string is equal."""
        return json.dumps({"tokenizer": self._tokenizer.to_str(), "max_tokens": self.max_tokens})
