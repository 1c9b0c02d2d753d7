"""Base models of all shapes that transformers knows: each is trained, judged and served, or refused before a step."""

import asyncio
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiny
import torch
from jobs import train
from transformers import CONFIG_MAPPING, AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from tuneserve.errors import BaseModelError
from tuneserve.lifecycle import gate
from tuneserve.serving.probe import probe
from tuneserve.training import loop

pytestmark = pytest.mark.usefixtures("tried_here")

DECODER = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    **{"intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": None},
}
BART = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
BART |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
SHAPES: dict[str, dict[str, Any]] = {
    **tiny.KINDS,
    "electra": tiny.SIZES | {"embedding_size": 32},
    "albert": tiny.SIZES | {"embedding_size": 32},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neox": DECODER,
    "llama": DECODER,
    "mistral": DECODER,
    "qwen2": DECODER,
    "qwen3": DECODER | {"head_dim": 16},
    "opt": DECODER | {"ffn_dim": 64, "word_embed_proj_dim": 32},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "t5": ({"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}, "an encoder-decoder"),
    "bart": (BART | {"d_model": 32}, "an encoder-decoder"),
    "vit": ({"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}, "ViT"),
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}, "Mamba"),
}


@pytest.fixture(autouse=True)
def trial_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate tries versions in this process: a test of every shape would otherwise start many."""

    def here(versions: Any, evidence: Any, settings: Any) -> tuple[Any, str]:
        asked = {
            "versions": [str(one.folder) for one in versions],
            "texts": evidence.texts,
            "settings": settings.public() | {"long_text": "truncate"},
        }
        return asyncio.run(probe(asked)), ""

    monkeypatch.setattr(gate, "_in_fresh_process", here)


@pytest.fixture
def no_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever is refused is refused before the first step."""
    monkeypatch.setattr(loop, "fit", lambda *_, **__: pytest.fail("a step was made"))
    return


def make(folder: Path, kind: str, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(tiny.KINDS, kind, sizes)
    return tiny.make_base_model(folder, kind)


def refusal(environment: dict[str, str], base: Path, **changed: str) -> str:
    with pytest.raises(BaseModelError) as caught:
        train(environment, BASE_MODEL=str(base), **changed)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_a_shape_is_trained_judged_and_served(
    kind: str, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make(tmp_path / "base", kind, SHAPES[kind], monkeypatch)
    if SHAPES[kind].get("pad_token_id", 0) is None or kind == "gpt2":  # as these come: what ends a text fills rows
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.save_pretrained(base)
        about = json.loads((base / "tokenizer_config.json").read_text())
        about.pop("pad_token")
        (base / "tokenizer_config.json").write_text(json.dumps(about | {"eos_token": "[SEP]"}))
    version = train(environment, BASE_MODEL=str(base), N_EPOCHS="1", BATCH_SIZE="128")
    assert len(version.metadata["history"]) == 1
    assert gate.read_decision(version).verdict == "accepted"  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", sorted(REFUSED))
@pytest.mark.usefixtures("no_step")
def test_a_shape_that_cannot_classify_is_refused_before_the_first_step(
    kind: str, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, words = REFUSED[kind]
    monkeypatch.setitem(tiny.KINDS, kind, sizes)
    base = tiny.make_base_model(tmp_path / "base", "bert")
    config = CONFIG_MAPPING[kind](**sizes)
    for name, size in {"vocab_size": 27, "pad_token_id": 0}.items():
        setattr(config, name, size)
    AutoModel.from_config(config).save_pretrained(base)
    assert words in refusal(environment, base)


@pytest.mark.usefixtures("no_step")
def test_a_model_without_a_tokenizer_or_with_anothers_is_refused(
    environment: dict[str, str], tiny_bert: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(tiny_bert, tmp_path / "bare")
    for file in bare.glob("token*"):
        file.unlink()
    assert "has no tokenizer: none of tokenizer.json" in refusal(environment, bare)

    larger = tiny.make_base_model(tmp_path / "larger")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(larger)
    tokenizer.add_tokens(["number"])
    tokenizer.save_pretrained(larger)
    assert "writes ids up to" in refusal(environment, larger)


@pytest.mark.usefixtures("no_step")
def test_texts_of_a_language_that_the_tokenizer_does_not_know_are_refused(
    environment: dict[str, str], tmp_path: Path
) -> None:
    rows = [
        (f"電影 很 {word} 好看 {number}", "good" if number % 2 else "bad") for number in range(40) for word in "的不"
    ]
    data = tiny.write_csv(tmp_path / "data.csv", rows)
    assert "does not know 100% of the training texts' tokens (at most 50%)" in refusal(
        environment, Path(environment["BASE_MODEL"]), DATASET=str(data)
    )


@pytest.mark.parametrize(("asked", "limit"), [("130", 128), ("129", 128), ("128", None)])
def test_positions_count_from_behind_robertas_padding(
    asked: str, limit: int | None, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = tiny.SIZES | {"max_position_embeddings": 130, "pad_token_id": 1}
    base = make(tmp_path / "base", "roberta", sizes, monkeypatch)
    about = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(about | {"model_max_length": 512, "pad_token": "[UNK]"}))
    if limit is None:
        assert train(environment, BASE_MODEL=str(base), NUM_MAX_POSITIONS=asked, N_EPOCHS="1").labels
    else:
        assert f"reads {limit} tokens at most" in refusal(environment, base, NUM_MAX_POSITIONS=asked)


@pytest.mark.parametrize(("kind", "name"), [("deberta-v2", "spm.model"), ("xlm-roberta", "sentencepiece.bpe.model")])
def test_a_tokenizer_that_is_a_sentencepiece_model_alone_is_read(
    kind: str, name: str, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text, _ in tiny.sentences(400)]),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        user_defined_symbols=["[PAD]", "[CLS]", "[SEP]", "[MASK]"],
        minloglevel=2,
    )
    base = make(tmp_path / "base", kind, tiny.KINDS["deberta-v2"] | {"pad_token_id": 0}, monkeypatch)
    for file in base.glob("token*"):
        file.unlink()
    (base / name).write_bytes(model.getvalue())
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](vocab_size=128, **tiny.KINDS["deberta-v2"] | {"pad_token_id": 0})
    AutoModel.from_config(config).save_pretrained(base)
    version = train(environment, BASE_MODEL=str(base), N_EPOCHS="1")
    assert (version.folder / "tokenizer.json").is_file()


@pytest.mark.usefixtures("no_step")
def test_pickles_and_adapters_are_refused_with_the_way_out(
    environment: dict[str, str], tiny_bert: Path, tmp_path: Path
) -> None:
    pickled = shutil.copytree(tiny_bert, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "convert it: AutoModel.from_pretrained" in refusal(environment, pickled)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    shutil.copy(tiny_bert / "model.safetensors", adapter / "adapter_model.safetensors")
    assert "merge_and_unload" in refusal(environment, adapter)
