"""What a version with a frozen body is published with, so that one process can serve many heads on one body.

The head is a small file of its own (see `network.numpy_head`), and the metadata name the body by a hash: versions whose
hashes are equal differ in their heads alone.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from tuneserve.artifact import HEAD
from tuneserve.network.forward import choose_forward
from tuneserve.network.numpy_head import ACTIVATIONS, Layer, NumpyHead
from tuneserve.training.features import Encoder, Head, agree
from tuneserve.training.model import DROPOUTS

logger = logging.getLogger(__name__)

PROBES = 64
"""Made-up states on which a head in NumPy is compared with torch's."""

RTOL, ATOL = 1e-4, 1e-5
"""What may lie between them; the functions that are tried differ by more."""

NOT_OF_THE_BODY = {
    *DROPOUTS,
    *("architectures", "dtype", "id2label", "label2id", "num_labels", "problem_type", "transformers_version"),
    *("_name_or_path", "_attn_implementation", "attn_implementation", "classifier_activation", "classifier_bias"),
}
"""Fields of a configuration that are the head's, or change no state."""


def write_head(model: PreTrainedModel, folder: Path) -> dict[str, str] | None:
    """Write the head of a saved classifier into a version's folder; None, and nothing written, if that cannot be.

    Args:
        model: in fp32 on the CPU, as it is saved.
        folder: of the version.

    Returns:
        What `body` of the metadata holds.
    """
    model.eval()
    forward = choose_forward(model, learns=False)
    encoder, head = Encoder(model, forward), Head(model)
    try:
        alone = agree(encoder, head)
    finally:
        encoder.remove()
        forward.remove()
    found = as_numpy(head, model.config.hidden_size) if alone else None
    if found is None:
        logger.info("the head of this model cannot be served by itself: it shares its body with no other version")
        return None
    found.write(folder / HEAD)
    return {"sha256": hash_body(model, head)}


@torch.inference_mode()
def as_numpy(head: Head, channels: int) -> NumpyHead | None:
    """The head in NumPy, found by watching torch's at work; None if it is made of other things than NumPy's knows."""
    states = torch.randn((PROBES, channels), generator=torch.Generator().manual_seed(0))
    calls: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []

    def watch(module: nn.Module, given: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
        calls.append((module, given[0].reshape(PROBES, -1), result.reshape(PROBES, -1)))

    watched = [module for module in head.modules() if isinstance(module, nn.Linear | nn.LayerNorm)]
    hooks = [module.register_forward_hook(watch) for module in watched]
    try:
        logits = head(states)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return None
    finally:
        for hook in hooks:
            hook.remove()
    if {id(one) for module in watched for one in module.parameters()} != {id(one) for one in head.parameters()}:
        return None
    layers, before = [], states
    for module, given, result in calls:
        activation = next((name for name in ACTIVATIONS if _makes(name, before, given)), None)
        if activation is None:
            return None
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if weight is None:
            return None
        layers.append(
            Layer(
                activation,
                weight.numpy().copy(),
                None if bias is None else bias.numpy().copy(),
                module.eps if isinstance(module, nn.LayerNorm) else 0.0,
            )
        )
        before = result
    found = NumpyHead(layers)
    return found if layers and np.allclose(found(states.numpy()), logits.numpy(), rtol=RTOL, atol=ATOL) else None


def _makes(activation: str, before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether this function of what one layer gives is what the next is given."""
    if before.shape != after.shape:
        return False
    return np.allclose(ACTIVATIONS[activation](before.numpy()), after.numpy(), rtol=RTOL, atol=ATOL)


def hash_body(model: PreTrainedModel, head: Head) -> str:
    """The hash of all that makes the states that the head reads: configuration, and the weights' names and bytes."""
    config: dict[str, Any] = model.config.to_dict()
    kept = {name: value for name, value in config.items() if name not in NOT_OF_THE_BODY}
    found = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    of_head = {id(one) for one in head.parameters()}
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if id(tensor) not in of_head:
            found.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            found.update(tensor.detach().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
