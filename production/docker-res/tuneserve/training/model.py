"""The model, its loss and its tokenizer: `build_model` is the place for a head of your own, `loss_of` for a loss."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tuneserve.errors import BaseModelError
from tuneserve.logs import in_one_line
from tuneserve.network import head
from tuneserve.network.embedding import read_pooling
from tuneserve.network.forward import Padded, Texts, is_like_bert
from tuneserve.network.optimizer import body_parameters
from tuneserve.network.pooling import append_mean
from tuneserve.training.tokens import TokenizedSplit, collate

logger = logging.getLogger(__name__)

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


MOST_TOKENS = 512
"""Tokens read of a text where nobody has said how many; a model may be able to read more."""
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model", "*.tiktoken", "tekken.json")
"""The files of which a tokenizer has at least one."""
MOST_UNKNOWN, MANY_UNKNOWN = 0.5, 0.05
"""Shares of unknown tokens: refused, and said. The default base model has at most 0.01% on English texts, and about 70%
on Chinese ones, which it does not read."""


def load_tokenizer(folder: Path, *, max_tokens: int | None) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, told to read at most `max_tokens`; None: as many as the model can, and MOST_TOKENS.

    Raises:
        BaseModelError: it has no fast tokenizer, or reads fewer tokens than asked for.
    """
    if not any(True for pattern in VOCABULARIES for _ in folder.glob(pattern)):
        raise BaseModelError(
            f"{folder} has no tokenizer: none of {', '.join(VOCABULARIES)}. Copy the model's own tokenizer files there."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except Exception as error:  # transformers raises whatever met it in files of another kind
        raise BaseModelError(f"The tokenizer in {folder} cannot be loaded: {in_one_line(error)}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise BaseModelError(f"The tokenizer in {folder} has no tokenizer.json and cannot be converted to one.")
    if tokenizer.pad_token is None:  # GPT-2's family: what ends a text fills rows as well
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise BaseModelError(f"The tokenizer in {folder} has neither a padding token nor one that ends a text.")
    positions = config.get("max_position_embeddings") or config.get("n_positions") or tokenizer.model_max_length
    limit = min(tokenizer.model_max_length, positions)
    if max_tokens is not None:
        _require_positions(max_tokens, limit)
    tokenizer.model_max_length = max_tokens or min(limit, MOST_TOKENS)
    return tokenizer


def _require_positions(max_tokens: int, limit: int) -> None:
    if max_tokens > limit:
        raise BaseModelError(
            f"NUM_MAX_POSITIONS={max_tokens}, but this base model reads {limit} tokens at most; set it no higher."
        )


def require_known_words(tokenizer: PreTrainedTokenizerBase, train: TokenizedSplit) -> None:
    """Make sure that the tokenizer knows the language of the training texts.

    Raises:
        BaseModelError: more than MOST_UNKNOWN of their tokens, special ones apart, are the unknown token.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return
    special = [one for one in tokenizer.all_special_ids if one != unknown]
    words = len(train.ids) - int(np.isin(train.ids, special).sum())
    share = int(np.count_nonzero(train.ids == unknown)) / max(1, words)
    if share > MOST_UNKNOWN:
        raise BaseModelError(
            f"The base model's tokenizer does not know {share:.0%} of the training texts' tokens (at most "
            f"{MOST_UNKNOWN:.0%}): its vocabulary of {len(tokenizer)} is of another language, or incomplete. Name a "
            "base model of the texts' language in BASE_MODEL."
        )
    if share > MANY_UNKNOWN:
        logger.warning("%.0f%% of the training texts' tokens are unknown to the base model's tokenizer", 100 * share)


def build_model(
    folder: Path,
    labels: Sequence[str],
    *,
    dropout: float,
    seed: int,
    device: torch.device,
    pad_id: int | None = None,
    reads_mean: bool = False,
) -> PreTrainedModel:
    """The base model with a new classification head, in fp32 on the device; `seed` decides the new weights.

    `pad_id` is the tokenizer's, for models that do not say what fills a row. With `reads_mean` the head reads the mean
    of the last states instead of the first one, if the base model was trained for that and is built like BERT.

    The place for a head of your own, by its configuration; layers of your own are a class in `network/head.py`, which
    also loads the model again wherever a version is exported or served.

    Raises:
        BaseModelError: transformers cannot classify with this model, or memory does not hold it.
    """
    torch.manual_seed(seed)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if config.is_encoder_decoder:
            raise BaseModelError(
                f"{folder} is an encoder-decoder ({config.model_type}), made to write texts. Name an encoder, such as "
                "BERT, RoBERTa, DeBERTa or ModernBERT, in BASE_MODEL."
            )
        made_for = getattr(head.NETWORK, "config_class", None)
        if made_for is not None and not isinstance(config, made_for):
            raise BaseModelError(
                f"{head.NETWORK.__name__} in network/head.py is made for {made_for.model_type}, and {folder} is of the "
                f"kind {config.model_type}: name a BASE_MODEL of its kind, or another NETWORK."
            )
        for name in DROPOUTS & set(config.to_dict()):
            setattr(config, name, dropout)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        config.num_labels = len(labels)
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = pad_id if pad_id is not None and pad_id < config.vocab_size else 0
        config.problem_type = "single_label_classification"
        model = head.NETWORK.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            attn_implementation=ATTENTION.get(device.type),
        )
        assert isinstance(model, PreTrainedModel)
        nn.Module.to(model, device)
        usual = head.NETWORK is AutoModelForSequenceClassification
        if reads_mean and usual and is_like_bert(model) and _pools_by_mean(folder):
            append_mean(model)
    except BaseModelError:
        raise
    except Exception as error:  # transformers raises whatever met it in files of another kind
        raise BaseModelError(f"{folder} cannot be loaded as a classifier: {in_one_line(error)}") from error
    return model


def _pools_by_mean(folder: Path) -> bool:
    try:
        return read_pooling(folder) == "mean"
    except BaseModelError:  # it pools in a way that no layer here can stand for
        return False


def rehearse(model: PreTrainedModel, tokens: Mapping[str, TokenizedSplit], *, max_tokens: int) -> None:
    """Let the model read and learn from a few texts, and forget it, before hours are spent on it.

    Raises:
        BaseModelError: it cannot read what the tokenizer writes, a text of `max_tokens`, or two texts at once.
    """
    require_embeddings(model, max_tokens)
    largest = max(int(one.ids.max()) for one in tokens.values())
    words = int(getattr(model.get_input_embeddings(), "num_embeddings", largest + 1))
    if largest >= words:
        raise BaseModelError(
            f"The base model's tokenizer writes ids up to {largest}, and the model has {words} embeddings: they do not "
            "belong together."
        )
    train, kind = tokens["train"], type(model).__name__
    rows = np.unique([train.lengths.argmin(), train.lengths.argmax()])
    longest = torch.from_numpy(np.resize(train.text_ids(rows[-1]), max_tokens).astype(np.int64)).to(model.device)
    training, forward = model.training, Padded(model)
    model.eval()
    try:
        with torch.no_grad():
            forward(Texts(longest, np.array([max_tokens])))
        batch = collate(train, rows, model.device)
        loss_of(forward(batch).float(), batch.label_ids, class_weights=None, label_smoothing=0.0).sum().backward()
    except torch.OutOfMemoryError:
        pass  # the loop takes smaller parts
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            return
        raise BaseModelError(f"This base model ({kind}) cannot be trained on texts: {in_one_line(error)}") from error
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)


def require_embeddings(model: nn.Module, max_tokens: int) -> None:
    """Make sure that a model has a position for so many tokens, where the configuration counts some that it has not.

    Raises:
        BaseModelError: it has fewer.
    """
    for name, module in model.named_modules():  # RoBERTa's family counts from behind the padding's number
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            _require_positions(max_tokens, int(module.num_embeddings) - int(module.padding_idx) - 1)


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


def last_linear(model: nn.Module) -> nn.Linear | None:
    """The layer that gives the logits, where they come from a linear layer as in all of transformers' classifiers."""
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    layers = [one for one in model.modules() if isinstance(one, nn.Linear) and one.out_features == labels]
    return layers[-1] if layers else None


def freeze_body(model: PreTrainedModel) -> None:
    """Leave only what follows the body's last hidden state to train: pooler and classifier for BERT."""
    for _, parameter in body_parameters(model):
        parameter.requires_grad = False
