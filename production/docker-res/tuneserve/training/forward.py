"""How a batch goes through the model: without padding where the encoder can, in padded rows where it cannot."""

import inspect
import logging
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from tuneserve.training.attention import IMPLEMENTATION, Spans, attend_together
from tuneserve.training.batches import Batch

logger = logging.getLogger(__name__)

PROBE_LENGTHS = (3, 7, 7, 12, 160)
"""Tokens of the texts on which both ways must agree; the longest reaches beyond ModernBERT's window of 128."""
PROBE_TOLERANCE = 2e-5


class Forward(Protocol):
    """Takes a batch to its logits [texts, labels], in the model's own number format."""

    pads: bool
    """Whether texts are made equally long."""

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Logits of each text."""
        ...

    def remove(self) -> None:
        """Leave the model as it was."""


class Padded:
    """Rows as long as the batch's longest text, the rest masked: what every encoder understands."""

    pads = True

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Logits of each text."""
        input_ids, mask = batch.padded(self.model.config.pad_token_id or 0)
        logits = self.model(input_ids=input_ids, attention_mask=mask).logits
        assert isinstance(logits, torch.Tensor)
        return logits

    def remove(self) -> None:
        """Nothing was changed."""


class Packed:
    """One row of all texts end to end: nothing is computed for padding.

    Attention keeps the texts apart (see `attention`), position ids start anew with each, and what the classification
    head reads, the first token's state or the mean, is gathered for each text behind the encoder. In encoders built
    like BERT's, queries, keys and values are one product, and the last layer's feed-forward part is computed for first
    tokens alone, for nothing else is read from it.

    Args:
        model: an encoder with transformers' sequence-classification head, in evaluation or training mode.
        first_position: position id of a text's first token (RoBERTa's family counts from behind the padding's id).
        like_bert: whether the encoder is built like that.
    """

    pads = False

    def __init__(self, model: PreTrainedModel, *, first_position: int = 0, like_bert: bool = False) -> None:
        self.model = model
        self.first_position = first_position
        self._spans: Spans | None = None
        self._mean = getattr(model.config, "classifier_pooling", "cls") == "mean"
        body = model.base_model
        self._takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
        layers: list[Any] = _bert_layers(body) if like_bert else [None]
        self._layers, self._tail = layers[:-1], layers[-1]
        self._hooks = [body.register_forward_hook(self._pool_output)]
        if self._tail is not None:
            self._hooks.append(self._tail.attention.output.register_forward_pre_hook(self._keep_first_tokens))
        for layer in self._layers:
            layer.attention.self.forward = partial(self._attend, layer.attention.self)
        if isinstance(pooler := getattr(body, "pooler", None), nn.Module):
            self._hooks.append(pooler.register_forward_pre_hook(self._pool_input))

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Logits of each text."""
        config = self.model.config
        usual = config._attn_implementation
        self._spans = spans = Spans(batch.lengths, batch.input_ids.device)
        input_ids = batch.input_ids[None]
        types = {"token_type_ids": torch.zeros_like(input_ids)} if self._takes_types else {}
        config._attn_implementation = IMPLEMENTATION
        try:
            logits = self.model(
                input_ids=input_ids,
                position_ids=(spans.positions + self.first_position)[None],
                spans=spans,
                pooled_by=self._tail and self._tail.attention.self,
                **types,
            ).logits
        finally:
            config._attn_implementation = usual
            self._spans = None
        assert isinstance(logits, torch.Tensor)
        return logits

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers:
            layer.attention.self.__dict__.pop("forward", None)

    def _attend(self, module: Any, hidden_states: torch.Tensor, **arguments: Any) -> Any:
        if self._spans is None:
            return type(module).forward(module, hidden_states, **arguments)
        linears = module.query, module.key, module.value
        found = attend_together(
            hidden_states[0],
            torch.cat([one.weight for one in linears]),
            torch.cat([one.bias for one in linears]),
            self._spans,
            heads=module.num_attention_heads,
            scaling=module.attention_head_size**-0.5,
        )
        return found[None], None

    def _keep_first_tokens(
        self, module: nn.Module, states: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
        if self._spans is None:
            return None
        first = self._spans.first
        return tuple(one[:, first] for one in states)

    def _pool_input(self, module: nn.Module, states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        return None if self._spans is None else (self._pool(states[0]), *states[1:])

    def _pool_output(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        if self._spans is not None:
            output.last_hidden_state = self._pool(output.last_hidden_state)
        return output

    def _pool(self, states: torch.Tensor) -> torch.Tensor:
        """States [1, tokens, channels] → [texts, 1, channels], what the head would read of each text."""
        assert self._spans is not None
        spans, states = self._spans, states[0]
        if self._mean:
            lengths = torch.as_tensor(spans.lengths, device=states.device)
            exact = states.to(torch.promote_types(states.dtype, torch.float32))  # a sum in bf16 stops growing
            sums = exact.new_zeros(len(lengths), states.shape[1])
            sums = sums.index_add(0, torch.repeat_interleave(lengths), exact)
            states = (sums / lengths[:, None]).to(states.dtype)
        elif self._tail is None:
            states = states[spans.first]
        return states[:, None]


def choose_forward(model: PreTrainedModel) -> Forward:
    """The fastest way that gives this model's own logits, found by trying on a few made-up texts.

    Encoders that do not use transformers' attention interface (DeBERTa), or add to the scores what the packed kernels
    cannot (MPNet), and models with dropout inside attention, are fed padded rows.
    """
    padded = Padded(model)
    if not getattr(model, "_supports_attention_backend", False) or _attention_dropout(model):
        return padded
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _agreeing(model, padded) or padded
    finally:
        model.train(training)


def _agreeing(model: PreTrainedModel, padded: Padded) -> Packed | None:
    batch = probe(model)
    wanted = padded(batch).double()
    if not (wanted - wanted[0]).abs().max() > 10 * PROBE_TOLERANCE:
        return None  # all texts look alike to this head: it could not tell a wrong way from a right one
    offsets = dict.fromkeys((0, (model.config.pad_token_id or 0) + 1))
    for like_bert in (True, False) if _bert_layers(model.base_model) else (False,):
        for offset in offsets:
            packed = Packed(model, first_position=offset, like_bert=like_bert)
            try:
                agrees = torch.allclose(packed(batch).double(), wanted, rtol=1e-4, atol=PROBE_TOLERANCE)
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
                logger.debug("packed forward of %s: %s", type(model).__name__, error)
                agrees = False
            if agrees:
                return packed
            packed.remove()
    return None


def probe(model: PreTrainedModel) -> Batch:
    """A few made-up texts of this model's words, the same every time."""
    limit = getattr(model.config, "max_position_embeddings", None) or max(PROBE_LENGTHS)
    lengths = np.minimum(PROBE_LENGTHS, max(1, limit - (model.config.pad_token_id or 0) - 2))  # RoBERTa counts from 2
    rng = np.random.default_rng(0)
    input_ids = rng.integers(0, model.config.vocab_size, lengths.sum())
    input_ids[input_ids == model.config.pad_token_id] += 1
    input_ids = input_ids % model.config.vocab_size
    device = model.device
    return Batch(torch.from_numpy(input_ids).to(device), lengths, torch.zeros(len(lengths), dtype=torch.int64))


def _bert_layers(body: nn.Module) -> list[Any]:
    """The layers, if they are built as BERT's: `attention.self`, then `attention.output` for each token alone."""
    layers = getattr(getattr(body, "encoder", None), "layer", [])
    parts = ("self.query", "self.key", "self.value", "output")
    built = [all(_has(getattr(layer, "attention", None), part) for part in parts) for layer in layers]
    return list(layers) if all(built) else []


def _has(module: Any, path: str) -> bool:
    for name in path.split("."):
        module = getattr(module, name, None)
    return isinstance(module, nn.Module)


def _attention_dropout(model: PreTrainedModel) -> bool:
    return any(getattr(model.config, name, 0.0) for name in ("attention_probs_dropout_prob", "attention_dropout"))
