"""What mixed batches write, while texts join and leave, is what transformers' `generate` writes on each alone."""

import os
import random
from collections.abc import Iterator
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
    T5Config,
    T5ForConditionalGeneration,
)

from tuneserve.network.decoder import Decoder
from tuneserve.network.search import Limits, Search, search
from tuneserve.network.wishes import Wishes

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
    if kind == "bart":
        sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 256}
        ends = {"decoder_start_token_id": END, "forced_eos_token_id": END, "forced_bos_token_id": None}
        return BartForConditionalGeneration(BartConfig(init_std=0.6, **LAYERS, **sizes, **ends, **IDS)).eval()
    sizes = {"d_model": 32, "d_kv": 16, "num_layers": 2, "num_heads": 2, "d_ff": 64}
    config = T5Config(initializer_factor=4.0, decoder_start_token_id=0, **sizes, **IDS)
    return T5ForConditionalGeneration(config).eval()


KINDS = ["gpt2", "llama", "bart", "t5", *os.environ.get("TUNESERVE_TEST_CHECKPOINTS", "").split()]
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


class Page:
    """Texts that a decoder writes, a row or several each."""

    def __init__(self, model: Any) -> None:
        self.decoder, self.model = Decoder(model), model
        self.texts: dict[int, Search] = {}
        self.tokens: list[int] = []

    def join(self, name: int, ids: list[int], wishes: Wishes) -> None:
        self.join_all({name: ids}, wishes)

    def join_all(self, prompts: dict[int, list[int]], wishes: Wishes) -> None:
        begin = [self.model.config.decoder_start_token_id] if self.model.config.is_encoder_decoder else []
        reads = self.decoder.read(list(prompts.values()), begin)
        for (name, ids), read in zip(prompts.items(), reads, strict=True):
            rows, start = self.decoder.rows, len(begin or ids)
            limits = Limits(
                (self.model.generation_config.eos_token_id,),
                start + wishes.min_new_tokens if wishes.min_new_tokens else 0,
                start + wishes.max_new_tokens,
                forced_last=getattr(self.model.config, "forced_eos_token_id", None),
            )
            self.texts[name] = search(begin or ids, wishes, limits, read.logits.device)
            tokens, parents = self.texts[name].advance(read.logits)
            self.decoder.join(read)
            self.decoder.select([*range(rows), *(rows + parent for parent in parents)])
            self.tokens += tokens

    def step(self) -> Iterator[tuple[int, list[int]]]:
        """Write one token of each; those that are done leave."""
        logits = self.decoder.step(self.tokens)
        self.tokens, index, row = [], [], 0
        for name, text in list(self.texts.items()):
            rows = text.rows
            tokens, parents = text.advance(logits[row : row + rows])
            self.tokens += tokens
            index += [row + parent for parent in parents]
            row += rows
            if text.done:
                yield name, self.texts.pop(name).ids
        self.decoder.select(index)


@pytest.mark.parametrize("wishes", WISHES, ids=["likeliest", "3 beams", "4 beams", "2 beams", "penalties"])
def test_texts_that_join_and_leave_are_those_of_transformers(
    model: Any, prompts: list[list[int]], wishes: Wishes
) -> None:
    chance, page, waiting, found = random.Random(2), Page(model), list(range(len(prompts))), {}
    while waiting or page.texts:
        while waiting and len(page.texts) < 4 and (not page.texts or chance.random() < 0.5):
            page.join(name := waiting.pop(0), prompts[name], wishes)
        found.update(page.step())
    assert found == {name: by_transformers(model, ids, wishes) for name, ids in enumerate(prompts)}
    assert page.decoder.rows == 0


def test_texts_of_different_wishes_share_a_batch(model: Any, prompts: list[list[int]]) -> None:
    page, found = Page(model), {}
    for name, (ids, wishes) in enumerate(zip(prompts, WISHES, strict=False)):
        page.join(name, ids, wishes)
    while page.texts:
        found.update(page.step())
    assert found == {name: by_transformers(model, prompts[name], wishes) for name, wishes in enumerate(WISHES)}


def test_prompts_that_are_read_together_go_on_as_each_alone(model: Any, prompts: list[list[int]]) -> None:
    page, found = Page(model), {}
    page.join(9, prompts[4], WISHES[0])
    page.join_all(dict(enumerate(prompts)), WISHES[1])
    while page.texts:
        found.update(page.step())
    assert found.pop(9) == by_transformers(model, prompts[4], WISHES[0])
    assert found == {name: by_transformers(model, ids, WISHES[1]) for name, ids in enumerate(prompts)}


def test_equal_seeds_draw_equal_texts_whoever_else_is_there(prompts: list[list[int]]) -> None:
    model, drawn = make("gpt2"), Wishes(NEW, do_sample=True, temperature=0.9, top_k=50, top_p=0.95, seed=7)

    def draw(wishes: Wishes, *others: list[int]) -> list[int]:
        page, found = Page(model), {}
        for name, ids in enumerate(others, 1):
            page.join(name, ids, replace(drawn, seed=name))
        page.join(0, prompts[0], wishes)
        while page.texts:
            found.update(page.step())
        return found[0]

    alone = draw(drawn)
    assert draw(drawn, prompts[1], prompts[2]) == alone
    assert draw(replace(drawn, seed=8)) != alone
    assert draw(replace(drawn, do_sample=False)) == by_transformers(model, prompts[0], Wishes(NEW))
