"""The model, its loss and its tokenizer: `build_model` is the place for a head of your own, `loss_of` for a loss."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tuneserve.errors import BaseModelError
from tuneserve.network import head
from tuneserve.network.optimizer import body_parameters

DROPOUTS = {
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "dropout",
    "attention_dropout",
    "seq_classif_dropout",
    "embedding_dropout",
    "mlp_dropout",
    "pooler_dropout",
    "cls_dropout",
}
"""The names under which the encoders' configurations keep their dropouts."""

ATTENTION = {"cpu": "eager"}
"""What attention to train with where transformers' own choice is not the fastest: on a CPU the backward pass of torch's
fused attention takes twice as long on short texts (docs/decisions/0002-training-defaults.md)."""


def load_tokenizer(folder: Path, *, max_tokens: int) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, told to read at most `max_tokens`.

    Raises:
        BaseModelError: it has no fast tokenizer, or reads fewer tokens than asked for.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"The tokenizer in {folder} cannot be loaded: {error}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise BaseModelError(f"The tokenizer in {folder} has no tokenizer.json and cannot be converted to one.")
    limit = min(tokenizer.model_max_length, config.get("max_position_embeddings") or tokenizer.model_max_length)
    if max_tokens > limit:
        raise BaseModelError(
            f"NUM_MAX_POSITIONS={max_tokens}, but this base model reads {limit} tokens at most; set it no higher."
        )
    tokenizer.model_max_length = max_tokens
    return tokenizer


def build_model(
    folder: Path, labels: Sequence[str], *, dropout: float, seed: int, device: torch.device
) -> PreTrainedModel:
    """The base model with a new classification head, in fp32 on the device; `seed` decides the new weights.

    The place for a head of your own, by its configuration; layers of your own are a class in `network/head.py`, which
    also loads the model again wherever a version is exported or served.

    Raises:
        BaseModelError: transformers cannot classify with this model, or memory does not hold it.
    """
    torch.manual_seed(seed)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for name in DROPOUTS & set(config.to_dict()):
            setattr(config, name, dropout)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        config.num_labels = len(labels)
        config.problem_type = "single_label_classification"
        model = head.NETWORK.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            attn_implementation=ATTENTION.get(device.type),
        )
    except (OSError, ValueError, RuntimeError, KeyError, MemoryError) as error:
        raise BaseModelError(f"{folder} cannot be loaded as a classifier: {error}") from error
    assert isinstance(model, PreTrainedModel)
    nn.Module.to(model, device)
    return model


def require_reloadable(model: PreTrainedModel) -> None:
    """Make sure that what `build_model` returned has the layers of the class that will load it again.

    Raises:
        BaseModelError: it has others, which would be saved and never be read.
    """
    with torch.device("meta"):
        make = getattr(head.NETWORK, "from_config", head.NETWORK)
        expected, found = set(make(model.config).state_dict()), set(model.state_dict())
    if expected != found:
        names = ", ".join(sorted(expected ^ found)[:6])
        raise BaseModelError(
            f"The model cannot be loaded again as it is built: {names}. Layers of your own belong to a class in "
            "network/head.py."
        )


def loss_of(
    logits: torch.Tensor, label_ids: torch.Tensor, *, class_weights: torch.Tensor | None, label_smoothing: float
) -> torch.Tensor:
    """The loss of each text, float [texts]: cross-entropy. The place for a loss of your own.

    The training loop sums it and divides by the total class weight of the batch, which makes it a mean.

    Args:
        logits: float32 [texts, labels].
        label_ids: int64 [texts].
        class_weights: float [labels], by label id; None: all count alike.
        label_smoothing: share of each text's weight that is spread over all labels.
    """
    return functional.cross_entropy(logits, label_ids, class_weights, reduction="none", label_smoothing=label_smoothing)


def freeze_body(model: PreTrainedModel) -> None:
    """Leave only what follows the body's last hidden state to train: pooler and classifier for BERT."""
    for _, parameter in body_parameters(model):
        parameter.requires_grad = False
