"""Tiny models that write, as Hugging Face folders with the tests' own words."""

from pathlib import Path

import tiny
import torch
from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel

WORDS = len(tiny.SPECIAL) + len(tiny.WORDS)
PAD, BEGIN, END = (tiny.SPECIAL.index(one) for one in ("[PAD]", "[CLS]", "[SEP]"))
IDS = {"vocab_size": WORDS, "bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD}
AND = len(tiny.SPECIAL) + tiny.WORDS.index("and")
FIRST = len(tiny.SPECIAL)


def make_causal(folder: Path, *, positions: int = 64) -> Path:
    """A GPT-2 whose random weights are large enough for every prompt to go on in another way."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=positions, initializer_range=0.6, **IDS)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return _with_words(folder, positions)


def make_pair(folder: Path, *, learned: bool = False) -> Path:
    """A BART with large random weights, or one that has learned to write what stands before the first "and"."""
    torch.manual_seed(0)
    sizes = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    dropouts = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    ends = {"decoder_start_token_id": END, "forced_eos_token_id": END, "forced_bos_token_id": None}
    config = BartConfig(init_std=0.1 if learned else 0.6, **sizes, **layers, **dropouts, **ends, **IDS)
    model = BartForConditionalGeneration(config)
    if learned:
        _learn_to_summarize(model)
    model.save_pretrained(folder)
    return _with_words(folder, 64)


def _learn_to_summarize(model: BartForConditionalGeneration) -> None:
    """About three seconds of one core, from chance to a loss below 0.003."""
    chance = torch.Generator().manual_seed(0)
    others = torch.tensor([one for one in range(FIRST, WORDS) if one != AND])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)

    def draw(count: int) -> torch.Tensor:
        return others[torch.randint(len(others), (32, count), generator=chance)]

    for step in range(1000):
        before, behind = torch.randint(2, 7, (2,), generator=chance).tolist()
        start, end, both = (torch.full((32, 1), one) for one in (BEGIN, END, AND))
        kept = draw(before)
        read = torch.cat([start, kept, both, draw(behind), end], dim=1)
        loss = model(input_ids=read, attention_mask=torch.ones_like(read), labels=torch.cat([kept, end], dim=1)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 50) * (1 - step / 1000)
        optimizer.step()
        if loss.item() < 0.003:
            return
    raise AssertionError("it has not learned")


def _with_words(folder: Path, positions: int) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tiny.make_base_model(folder / "words"))
    tokenizer.model_max_length = positions
    tokenizer.save_pretrained(folder)
    return folder
