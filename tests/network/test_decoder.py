"""What mixed batches write, while texts join and leave, is what transformers' `generate` writes on each alone."""

import copy
import os
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tuneserve.network import cache
from tuneserve.network.decoder import Decoder
from tuneserve.network.page import Page
from tuneserve.network.wishes import Wishes, Writing

WORDS, BEGIN, END, NEW = 120, 1, 2, 28
IDS = {"vocab_size": WORDS, "bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": 0}
LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}


def make(kind: str) -> Any:
    """A model of a few thousand weights, large enough for every text to be another; or a real one."""
    torch.manual_seed(0)
    if "/" in kind:
        pair = AutoConfig.from_pretrained(kind).is_encoder_decoder
        return (AutoModelForSeq2SeqLM if pair else AutoModelForCausalLM).from_pretrained(kind).eval()
    if kind == "gpt2":
        config: Any = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=256, initializer_range=0.6, **IDS)
        return GPT2LMHeadModel(config).eval()
    if kind == "llama":
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        config = LlamaConfig(hidden_size=32, intermediate_size=64, initializer_range=0.6, **heads, **IDS)
        return LlamaForCausalLM(config).eval()
    if kind == "mistral":  # of which each token sees the last eight alone
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "sliding_window": 8}
        sliding = MistralConfig(hidden_size=32, intermediate_size=64, initializer_range=0.6, **heads, **IDS)
        return MistralForCausalLM(sliding).eval()
    if kind == "bart":
        sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 256}
        ends = {"decoder_start_token_id": END, "forced_eos_token_id": END, "forced_bos_token_id": None}
        return BartForConditionalGeneration(BartConfig(init_std=0.6, **LAYERS, **sizes, **ends, **IDS)).eval()
    sizes = {"d_model": 32, "d_kv": 16, "num_layers": 2, "num_heads": 2, "d_ff": 64}
    config = T5Config(initializer_factor=4.0, decoder_start_token_id=0, **sizes, **IDS)
    return T5ForConditionalGeneration(config).eval()


KINDS = ["gpt2", "llama", "mistral", "bart", "t5", *os.environ.get("TUNESERVE_TEST_CHECKPOINTS", "").split()]
"""Those that are made here, and folders or hub names of real ones."""
WISHES = [
    Wishes(NEW),
    Wishes(NEW, num_beams=3, no_repeat_ngram_size=3, early_stopping=True),
    Wishes(NEW, num_beams=4, length_penalty=2.0, min_new_tokens=8),
    Wishes(NEW, num_beams=2, length_penalty=0.5),
    Wishes(NEW, no_repeat_ngram_size=2, repetition_penalty=1.3, min_new_tokens=12),
]


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    chance = random.Random(1)
    return [[chance.randrange(3, WORDS) for _ in range(length)] for length in (3, 39, 7, 21, 12, 30)]


def by_transformers(model: Any, ids: list[int], wishes: Wishes) -> list[int]:
    pairs = model.config.is_encoder_decoder
    before = 1 if pairs else len(ids)
    with torch.inference_mode():
        found: list[int] = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_length=before + wishes.max_new_tokens,
            min_length=before + wishes.min_new_tokens if wishes.min_new_tokens else 0,
            num_beams=wishes.num_beams,
            early_stopping=wishes.early_stopping,
            length_penalty=wishes.length_penalty,
            no_repeat_ngram_size=wishes.no_repeat_ngram_size,
            repetition_penalty=wishes.repetition_penalty,
            do_sample=False,
        )[0].tolist()[before:]
    end = model.generation_config.eos_token_id
    return found[: found.index(end) + 1] if end in found else found


Prompts = dict[str, tuple[list[int], Wishes]]


def write(model: Any, texts: Prompts, *, at_once: int, chance: random.Random) -> dict[str, list[int]]:
    """What a page writes on prompts of which so many are under way at the most, and which join when chance will."""
    page, waiting = Page(model), list(texts)
    under_way: dict[str, Writing] = {}
    found: dict[str, list[int]] = {}
    while waiting or under_way:
        room = at_once - len(under_way)
        if joining := waiting[: room if not under_way else chance.randint(0, room)]:
            waiting = waiting[len(joining) :]
            under_way.update(zip(joining, page.join([texts[name] for name in joining]), strict=True))
        page.step()
        found.update({name: text.ids for name, text in under_way.items() if text.done})
        under_way = {name: text for name, text in under_way.items() if not text.done}
    return found


def each_alone(model: Any, texts: Prompts) -> dict[str, list[int]]:
    return {name: by_transformers(model, ids, wishes) for name, (ids, wishes) in texts.items()}


@pytest.mark.parametrize("wishes", WISHES, ids=["likeliest", "3 beams", "4 beams", "2 beams", "penalties"])
def test_texts_that_join_and_leave_are_those_of_transformers(
    model: Any, prompts: list[list[int]], wishes: Wishes
) -> None:
    texts = {f"{number}": (ids, wishes) for number, ids in enumerate(prompts)}
    assert write(model, texts, at_once=4, chance=random.Random(2)) == each_alone(model, texts)


def test_texts_of_different_wishes_share_a_batch(model: Any, prompts: list[list[int]]) -> None:
    texts = {f"{number}": one for number, one in enumerate(zip(prompts, WISHES, strict=False))}
    assert write(model, texts, at_once=9, chance=random.Random(3)) == each_alone(model, texts)


def test_a_text_that_is_dropped_changes_no_other(model: Any, prompts: list[list[int]]) -> None:
    page = Page(model)
    texts = page.join(list(zip(prompts, WISHES, strict=False)))
    for _ in range(3):
        page.step()
    page.drop(texts[1:3])
    before = texts[1].ids
    while not all(text.done for text in (texts[0], *texts[3:])):
        page.step()
    assert texts[1].ids == before
    assert not texts[1].done
    for number in (0, 3, 4):
        assert texts[number].ids == by_transformers(model, prompts[number], WISHES[number])


def test_equal_seeds_draw_equal_texts_whoever_else_is_there(prompts: list[list[int]]) -> None:
    model, drawn = make("gpt2"), Wishes(NEW, do_sample=True, temperature=0.9, top_k=50, top_p=0.95, seed=7)

    def draw(wishes: Wishes, *others: list[int]) -> list[int]:
        texts = {f"{name}": (ids, replace(drawn, seed=name)) for name, ids in enumerate(others, 1)}
        return write(model, {**texts, "it": (prompts[0], wishes)}, at_once=9, chance=random.Random(0))["it"]

    alone = draw(drawn)
    assert draw(drawn, prompts[1], prompts[2]) == alone
    assert draw(replace(drawn, seed=8)) != alone
    assert draw(replace(drawn, do_sample=False)) == by_transformers(model, prompts[0], Wishes(NEW))


def logits(model: Any, prompts: list[list[int]]) -> tuple[Decoder, torch.Tensor]:
    decoder = Decoder(model)
    for read in decoder.read(prompts, [END] if decoder.pairs else ()):
        decoder.join(read)
    return decoder, torch.stack([decoder.step([token + row for row in range(len(prompts))]) for token in (5, 9, 7)])


def test_wider_tables_change_nothing(model: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    _, wanted = logits(model, prompts)
    monkeypatch.setitem(cache.WIDER, torch.float32, torch.float64)
    decoder, found = logits(copy.deepcopy(model), prompts)
    assert decoder._written.tables[0].keys.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_bf16_on_the_cpu_has_wider_tables() -> None:
    decoder, found = logits(make("gpt2").to(torch.bfloat16), [[5, 6]])
    assert decoder._written.tables[0].keys.dtype == torch.float32
    assert found.isfinite().all()


def test_a_tables_length_has_no_bound_under_either_of_transformers_names() -> None:
    table = cache.Table()
    assert (table.get_max_length(), table.get_max_cache_shape()) == (-1, -1)
