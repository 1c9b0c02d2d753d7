"""Mean pooling inside a plain BERT: one more layer whose attention is uniform, so that the first token gets the mean.

Encoders of sentences are trained with the mean of all tokens, while BERT's classifiers read the first token alone. A
layer with queries and keys of zero attends to every token alike; with identity as its values and a feed-forward part of
zeros, the first token's state is the mean, normalized. So every program that loads the folder reads the mean without
knowing of it, and `forward.Packed` computes the layer as what it is.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

MEAN_WEIGHT = 8.0
"""Times that the mean counts beside the token's own state, which the layer's residual connection adds to it."""


@torch.no_grad()
def append_mean(model: PreTrainedModel) -> None:
    """Let a classifier that is built like BERT read the mean of the last states; the new layer is not trained.

    The pooler begins as the function that passes on what it is given, but for its tanh.
    """
    body: Any = model.base_model
    layers = body.encoder.layer
    layer = type(layers[-1])(model.config, layer_idx=len(layers))
    for parameter in layer.parameters():
        parameter.requires_grad = False
    attention = layer.attention
    for linear in (attention.self.query, attention.self.key, layer.intermediate.dense, layer.output.dense):
        linear.weight.zero_()
        linear.bias.zero_()
    for linear, size in ((attention.self.value, 1.0), (attention.output.dense, MEAN_WEIGHT)):
        nn.init.eye_(linear.weight)
        linear.weight.mul_(size)
        linear.bias.zero_()
    layer.to(model.device).train(model.training)
    layers.append(layer)
    model.config.num_hidden_layers = len(layers)
    pooler = getattr(getattr(body, "pooler", None), "dense", None)
    if isinstance(pooler, nn.Linear):
        nn.init.eye_(pooler.weight)
        nn.init.zeros_(pooler.bias)


def is_uniform(attention: nn.Module) -> bool:
    """Whether every token gets the mean of all values: the queries of this BERT-like attention are zero."""
    query = getattr(attention, "query", None)
    return isinstance(query, nn.Linear) and not any(parameter.any() for parameter in query.parameters())
