"""Tiny checkpoints and data sets, made on the spot: real files of the real formats, trained in a second."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tuneserve.artifact import Version
from tuneserve.settings import Settings
from tuneserve.signals import Stop
from tuneserve.training.model import DROPOUTS
from tuneserve.training.tokens import TokenizedSplit

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = """
    a the film food was is it not good bad great awful fine dull warm cold and but very one two three
""".split()  # noqa: SIM905  (a list of words reads best as a line)
GOOD, BAD = ["good", "great", "fine", "warm"], ["bad", "awful", "dull", "cold"]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 66,  # RoBERTa's first position is 2
}
KINDS = {
    "bert": SIZES,
    "roberta": SIZES | {"pad_token_id": 0},
    "deberta-v2": SIZES | {"pooler_hidden_size": 32},
    "modernbert": SIZES | {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3},
    "mpnet": SIZES | {"pad_token_id": 0},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64},
}
"""Encoders by transformers' name of them, with configurations of a few thousand weights."""
RECIPE = {"NUM_MAX_POSITIONS": "32", "LR": "5e-3", "BATCH_SIZE": "16", "N_EPOCHS": "12", "OMP_NUM_THREADS": "1"}
RECIPE |= {"REPORT": "0", "MIN_VALID": "0", "MIN_STEPS": "0"}
"""Variables with which such an encoder learns the sentences below in a few seconds, as it would learn many."""


def make_base_model(folder: Path, kind: str = "bert", **changed: Any) -> Path:
    """Write an encoder with random weights and a word tokenizer, as a checkpoint's folder."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        model_max_length=64,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](vocab_size=len(SPECIAL) + len(WORDS), **KINDS[kind] | changed)
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


def make_classifier(kind: str = "bert", *, labels: int = 3, words: int = 50, **changed: Any) -> PreTrainedModel:
    """A classifier in memory, without dropout; its weights are large enough for every part to matter."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](vocab_size=words, **{"initializer_range": 0.1, **KINDS.get(kind, SIZES), **changed})
    for name in DROPOUTS & set(config.to_dict()) - set(changed):
        setattr(config, name, 0.0)
    config.num_labels = labels
    return AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")


def make_split(lengths: Sequence[int], *, labels: int = 3, words: int = 50, seed: int = 0) -> TokenizedSplit:
    """Texts of these lengths out of random words, with random labels; the first five words are the special ones."""
    rng = np.random.default_rng(seed)
    return TokenizedSplit(
        ids=rng.integers(len(SPECIAL), words, sum(lengths), dtype=np.int32),
        starts=np.r_[0, np.cumsum(lengths)],
        label_ids=rng.integers(0, labels, len(lengths)),
        truncated=np.zeros(len(lengths), dtype=bool),
    )


def sentences(count: int, *, first: int = 0) -> list[tuple[str, str]]:
    """Different sentences with their labels, which one word in each decides."""
    rows = []
    for number in range(first, first + count):
        label = ("bad", "good")[number % 2]
        word = (BAD, GOOD)[number % 2][number // 2 % 4]
        filler = [WORDS[(number // 8 * step) % 8] for step in range(1, 2 + number % 7)]
        rows.append((f"{' '.join(filler)} {word} number {number}", label))
    return rows


def write_csv(path: Path, rows: Iterable[tuple[str, str]], header: tuple[str, str] = ("text", "label")) -> Path:
    """Write rows as a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def paths(folder: Path) -> dict[str, str]:
    """The variables that keep all that a job writes in a folder."""
    return {f"{name}_PATH": str(folder / name) for name in ("MODEL", "DATA", "LOG")}


def train(dataset: Path, folder: Path, **variables: str) -> Version:
    """Train a version for the store `folder/MODEL`."""
    from tuneserve.training import job

    base_model = str(make_base_model(folder / "base"))
    environment = RECIPE | paths(folder) | {"DATASET": str(dataset), "BASE_MODEL": base_model} | variables
    version = job.train(Settings.from_environ(environment), Stop(), threads=1)
    assert version is not None
    return version
