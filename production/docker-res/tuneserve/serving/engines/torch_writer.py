"""A model that writes, run by torch: `network/page.py` on the device and in the number format of the settings."""

import logging
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers import logging as transformers_logging
from transformers.pytorch_utils import Conv1D

from tuneserve.artifact import Version
from tuneserve.errors import StoreError
from tuneserve.hardware import choose_device, choose_precision
from tuneserve.network.forward import cast
from tuneserve.network.page import Page
from tuneserve.settings import Settings

logger = logging.getLogger(__name__)

CPU_TOKENS, GPU_TOKENS = 16384, 131072
"""Tokens that may be under way at a time if the settings do not say, of all texts and beams."""


def load(version: Version, settings: Settings, *, threads: int) -> Page:
    """The writer of a version.

    Raises:
        StoreError: its files are damaged.
        DeviceError: the device asked for cannot be had.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(threads)
    device, _ = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    kind = AutoModelForSeq2SeqLM if version.metadata["writer"]["encoder_decoder"] else AutoModelForCausalLM
    try:
        loaded: Any = kind.from_pretrained(
            version.folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        model, found = loaded
        model.to(device).eval()
    except Exception as error:  # transformers and safetensors raise whatever met them in a damaged file
        raise StoreError(f"The model in {version.folder} cannot be loaded: {error}") from error
    if missing := sorted(found["missing_keys"]):  # transformers would start these weights at random
        raise StoreError(f"The model in {version.folder} has no weights {', '.join(missing)}.")
    cast(model, precision)
    lay_out(model)
    on_gpu = device.type == "cuda"
    tokens = settings.max_batch_tokens or (GPU_TOKENS if on_gpu else CPU_TOKENS)
    logger.info("engine: torch on the %s, %s, %d tokens under way", "GPU" if on_gpu else "CPU", precision, tokens)
    return Page(model, max_tokens=tokens)


def lay_out(model: torch.nn.Module) -> None:
    """Lay the weights out for products with few rows; what is computed stays the same.

    GPT-2's Conv1D, with weights [in, out], become linear layers. On the CPU bf16 layers have their weights in the order
    in which oneDNN reads them, which takes six tenths of the time for one row as for eight.
    """
    for module in list(model.modules()):
        for name, layer in module.named_children():
            linear = _as_linear(layer)
            if linear is not None and _can_pack(linear.weight):
                setattr(module, name, Packed(linear))
            elif linear is not layer and linear is not None:
                setattr(module, name, linear)


class Packed(torch.nn.Module):
    """A linear layer of the CPU, its weights in oneDNN's own order; bf16 in, bf16 out."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = linear.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """States [..., in] → [..., out]."""
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(states, self.weight, self.bias, "none", [], "")
        return product


def can_pack() -> bool:
    """Whether oneDNN computes in bf16 on this CPU: without AVX-512 or its like it refuses, and torch does it itself."""
    ops = torch.ops.mkldnn
    known = torch.backends.mkldnn.is_available() and hasattr(ops, "_linear_pointwise")
    return known and hasattr(ops, "_is_mkldnn_bf16_supported") and bool(ops._is_mkldnn_bf16_supported())


def _can_pack(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and can_pack()


def _as_linear(layer: torch.nn.Module) -> torch.nn.Linear | None:
    """The layer itself, or one that computes what it does; None if it is of another kind."""
    if type(layer) is torch.nn.Linear:
        return layer
    if not isinstance(layer, Conv1D):
        return None
    linear = torch.nn.Linear(1, 1)
    linear.in_features, linear.out_features = layer.weight.shape
    linear.weight = torch.nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=False)
    linear.bias = layer.bias
    return linear
