"""How a batch goes through the model: without padding where the encoder can, in padded rows where it cannot."""

import inspect
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from tuneserve.hardware import Precision
from tuneserve.network.attention import IMPLEMENTATION, Array, Layout, Spans, register, upload
from tuneserve.network.pooling import is_uniform

logger = logging.getLogger(__name__)

PROBE_LENGTHS = (3, 7, 7, 12, 160)
"""Tokens of the texts on which both ways must agree; the longest reaches beyond ModernBERT's window of 128."""
PROBE_TOLERANCE = 2e-5


NUMBER_FORMAT = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""torch's types by the names that PRECISION knows."""


@dataclass(frozen=True)
class Texts:
    """Texts end to end, without padding: `input_ids` int64 [tokens], `lengths` int64 [texts]."""

    input_ids: torch.Tensor
    lengths: Array

    def padded(self, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of equal length, and a mask that is 0 for padding: both int64 [texts, tokens of the longest]."""
        filled = np.arange(self.lengths.max()) < self.lengths[:, None]
        device = self.input_ids.device
        input_ids = torch.full((filled.size,), pad_id, dtype=torch.int64, device=device)
        input_ids[upload(np.flatnonzero(filled), device)] = self.input_ids  # by a mask, the GPU would be waited for
        return input_ids.view(filled.shape), upload(filled.astype(np.int64), device)


class Forward(Protocol):
    """Takes a batch to its logits [texts, labels], in the model's own number format."""

    pads: bool
    """Whether texts are made equally long."""

    def __call__(self, batch: Texts) -> torch.Tensor:
        """Logits of each text."""
        ...

    def remove(self) -> None:
        """Leave the model as it was."""


class Padded:
    """Rows as long as the batch's longest text, the rest masked: what every encoder understands."""

    pads = True

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, batch: Texts) -> torch.Tensor:
        """Logits of each text."""
        return self.run(*self.lay_out(batch))

    def lay_out(self, texts: Texts) -> tuple[torch.Tensor, torch.Tensor]:
        """What `run` takes; laid out, a GPU's work can be queued without waiting for it."""
        return texts.padded(self.model.config.pad_token_id or 0)

    def run(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits [texts, labels] of padded rows: both int64 [texts, tokens of the longest]."""
        logits = self.model(input_ids=input_ids, attention_mask=mask).logits
        assert isinstance(logits, torch.Tensor)
        return logits

    def remove(self) -> None:
        """Nothing was changed."""


class Packed:
    """One row of all texts end to end: nothing is computed for padding.

    Attention keeps the texts apart (see `attention`), position ids start anew with each, and what the classification
    head reads, the first token's state or the mean, is gathered for each text behind the encoder. In encoders built
    like BERT's, queries, keys and values are one product, and the last layer's queries and feed-forward part are made
    for first tokens alone, for nothing else is read from it.

    Args:
        model: an encoder with transformers' sequence-classification head, in evaluation or training mode.
        first_position: position id of a text's first token (RoBERTa's family counts from behind the padding's id).
        like_bert: whether the encoder is built like that.
    """

    pads = False

    def __init__(self, model: PreTrainedModel, *, first_position: int = 0, like_bert: bool = False) -> None:
        register()
        self.model = model
        self.first_position = first_position
        self._spans: Layout | None = None
        self._mean = getattr(model.config, "classifier_pooling", "cls") == "mean"
        body = model.base_model
        self._takes_types = "token_type_ids" in inspect.signature(body.forward).parameters
        self._layers = _bert_layers(body) if like_bert else []
        self._tail = self._layers.pop() if self._layers and not self._mean else None
        self._hooks = [body.register_forward_hook(self._pool_output)]
        if self._tail is not None:
            self._hooks.append(self._tail.attention.output.register_forward_pre_hook(self._keep_first_tokens))
            last = self._tail.attention.self
            attend_first = self._average if is_uniform(last) else self._attend_first
            last.forward = partial(attend_first, last)
        for layer in self._layers:
            layer.attention.self.forward = partial(self._attend, layer.attention.self)
        if isinstance(pooler := getattr(body, "pooler", None), nn.Module):
            self._hooks.append(pooler.register_forward_pre_hook(self._pool_input))

    def __call__(self, batch: Texts) -> torch.Tensor:
        """Logits of each text."""
        return self.run(batch.input_ids, Spans(batch.lengths, batch.input_ids.device))

    def lay_out(self, texts: Texts) -> tuple[torch.Tensor, Spans]:
        """What `run` takes; laid out, a GPU's work can be queued without waiting for it."""
        spans = Spans(texts.lengths, texts.input_ids.device)
        spans.upload()
        return texts.input_ids, spans

    def run(self, input_ids: torch.Tensor, spans: Layout) -> torch.Tensor:
        """Logits [texts, labels] of texts that lie in `input_ids` int64 [tokens] as `spans` says."""
        config = self.model.config
        usual = config._attn_implementation
        self._spans = spans
        types = {"token_type_ids": torch.zeros_like(input_ids[None])} if self._takes_types else {}
        config._attn_implementation = IMPLEMENTATION
        try:
            logits = self.model(
                input_ids=input_ids[None],
                position_ids=(spans.positions + self.first_position)[None],
                spans=spans,
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
        for layer in [*self._layers, *([self._tail] if self._tail is not None else [])]:
            layer.attention.self.__dict__.pop("forward", None)

    def _attend(self, module: Any, hidden_states: torch.Tensor, **arguments: Any) -> Any:
        if self._spans is None:
            return type(module).forward(module, hidden_states, **arguments)
        joint = _project(hidden_states[0], module.num_attention_heads, module.query, module.key, module.value)
        return self._spans.attend_together(joint, scaling=module.attention_head_size**-0.5).flatten(1)[None], None

    def _attend_first(self, module: Any, hidden_states: torch.Tensor, **arguments: Any) -> Any:
        if self._spans is None:
            return type(module).forward(module, hidden_states, **arguments)
        states, heads = hidden_states[0], module.num_attention_heads
        query = _project(states[self._spans.first], heads, module.query)
        key_value = _project(states, heads, module.key, module.value)
        found = self._spans.attend(
            query[:, 0],
            key_value[:, 0],
            key_value[:, 1],
            scaling=module.attention_head_size**-0.5,
            first_only=True,
        )
        return found.flatten(1)[None], None

    def _average(self, module: Any, hidden_states: torch.Tensor, **arguments: Any) -> Any:
        """Uniform attention: the mean of the values is the value of the mean."""
        if self._spans is None:
            return type(module).forward(module, hidden_states, **arguments)
        return module.value(self._spans.mean(hidden_states[0]))[None], None

    def _keep_first_tokens(
        self, module: nn.Module, states: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Of what goes into the last layer's attention output: found for first tokens, and the states before."""
        return None if self._spans is None else (states[0], states[1][:, self._spans.first])

    def _pool_input(self, module: nn.Module, states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        return None if self._spans is None else (self._pool(states[0]), *states[1:])

    def _pool_output(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        if self._spans is not None:
            output.last_hidden_state = self._pool(output.last_hidden_state)
        return output

    def _pool(self, states: torch.Tensor) -> torch.Tensor:
        """States [1, tokens, channels] → [texts, 1, channels], what the head would read of each text."""
        assert self._spans is not None
        states = states[0]
        if self._mean:
            states = self._spans.mean(states)
        elif self._tail is None:
            states = states[self._spans.first]
        return states[:, None]


class LastStates:
    """Keeps what the head reads of each text while a batch goes through the model: the first token's last state.

    Make it after the forward pass, whose packed way leaves one state a text.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._states: torch.Tensor | None = None
        self._hook = model.base_model.register_forward_hook(self._keep)

    def take(self) -> torch.Tensor:
        """The states [texts, channels] of the batch that went through last; they are not kept any longer."""
        assert self._states is not None
        states, self._states = self._states, None
        return states[:, 0]

    def remove(self) -> None:
        """Leave the model as it was."""
        self._hook.remove()

    def _keep(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._states = output[0]


def choose_forward(model: PreTrainedModel, *, learns: bool = True) -> Packed | Padded:
    """The fastest way that gives this model's own logits, found by trying on a few made-up texts.

    Encoders that do not use transformers' attention interface (DeBERTa), or add to the scores what the packed kernels
    cannot (MPNet), and models with dropout inside attention that are to learn, are fed padded rows.
    """
    padded = Padded(model)
    if not getattr(model, "_supports_attention_backend", False) or (learns and _attention_dropout(model)):
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


def probe(model: PreTrainedModel) -> Texts:
    """A few made-up texts of this model's words, the same every time."""
    limit = getattr(model.config, "max_position_embeddings", None) or max(PROBE_LENGTHS)
    lengths = np.minimum(PROBE_LENGTHS, max(1, limit - (model.config.pad_token_id or 0) - 2))  # RoBERTa counts from 2
    rng = np.random.default_rng(0)
    input_ids = rng.integers(0, model.config.vocab_size, lengths.sum())
    input_ids[input_ids == model.config.pad_token_id] += 1
    input_ids = input_ids % model.config.vocab_size
    return Texts(torch.from_numpy(input_ids).to(model.device), lengths)


def cast(model: nn.Module, precision: Precision) -> None:
    """Let a model compute in this format. Its buffers stay as they are: rounded frequencies would shift positions."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(NUMBER_FORMAT[precision])


def _project(states: torch.Tensor, heads: int, *linears: Any) -> torch.Tensor:
    """Several linear layers as one product: states [tokens, channels] → [tokens, layers, heads, channels of a head]."""
    weight, bias = (torch.cat([getattr(one, name) for one in linears]) for name in ("weight", "bias"))
    return functional.linear(states, weight, bias).view(states.shape[0], len(linears), heads, -1)


def is_like_bert(model: PreTrainedModel) -> bool:
    """Whether the model's layers are built as BERT's."""
    return bool(_bert_layers(model.base_model))


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
