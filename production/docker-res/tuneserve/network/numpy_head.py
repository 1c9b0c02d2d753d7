"""A classification head in NumPy: what follows the body's last state, small enough that one process holds thousands.

In `head.safetensors` are the layers' weights, fp32; how they follow each other is in the file's own metadata.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tuneserve.errors import StoreError
from tuneserve.files import open_regular

Array = np.ndarray[Any, np.dtype[Any]]


_erf = np.vectorize(math.erf, otypes=[np.float64])  # a server does without SciPy


def _gelu(values: Array) -> Array:
    found: Array = (values * (1 + _erf(values / math.sqrt(2))) / 2).astype(values.dtype)
    return found


def _gelu_tanh(values: Array) -> Array:
    found: Array = values * (1 + np.tanh(math.sqrt(2 / math.pi) * (values + 0.044715 * values**3))) / 2
    return found


def _silu(values: Array) -> Array:
    found: Array = values * (1 + np.tanh(values / 2)) / 2
    return found


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda values: values,
    "tanh": np.tanh,
    "relu": lambda values: np.maximum(values, 0),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
}
"""What may stand between two layers; each is a function of every value alone."""


@dataclass(frozen=True)
class Layer:
    """A linear layer, or a layer norm, on what the activation makes of its input.

    `weight` is float32 [values out, values in], or [values] of a layer norm, which `epsilon` is for; `bias` float32
    [values out] or None.
    """

    activation: str
    weight: Array
    bias: Array | None = None
    epsilon: float = 0.0

    def __call__(self, values: Array) -> Array:
        """Values float32 [texts, values in] → [texts, values out]."""
        values = ACTIVATIONS[self.activation](values)
        if self.weight.ndim == 2:
            values = values @ self.weight.T
        else:
            values = values - values.mean(axis=1, keepdims=True)
            values = values / np.sqrt((values**2).mean(axis=1, keepdims=True) + np.float32(self.epsilon)) * self.weight
        return values if self.bias is None else values + self.bias


class NumpyHead:
    """See the module."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = list(layers)

    def __call__(self, states: Array) -> Array:
        """States float32 [texts, channels] → logits float32 [texts, labels]."""
        for layer in self.layers:
            states = layer(states)
        return states

    def write(self, path: Path) -> None:
        """Write it as one file."""
        from safetensors.numpy import save_file

        tensors = {f"{index}.weight": np.ascontiguousarray(one.weight) for index, one in enumerate(self.layers)}
        tensors |= {f"{index}.bias": one.bias for index, one in enumerate(self.layers) if one.bias is not None}
        shape = [{"activation": one.activation, "epsilon": one.epsilon} for one in self.layers]
        save_file(tensors, path, metadata={"layers": json.dumps(shape)})

    @classmethod
    def read(cls, path: Path) -> "NumpyHead":
        """Read such a file.

        Raises:
            StoreError: it is missing or damaged.
        """
        from safetensors.numpy import load

        try:
            with open_regular(path) as file:
                content = file.read()
            tensors = load(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            layers = [
                Layer(str(one["activation"]), tensors[f"{index}.weight"], tensors.get(f"{index}.bias"), one["epsilon"])
                for index, one in enumerate(json.loads(header["__metadata__"]["layers"]))
            ]
            if not layers or any(one.activation not in ACTIVATIONS for one in layers):
                raise ValueError("it has no layers, or other ones than this release knows")
        except Exception as error:  # safetensors has an exception of its own for a damaged file
            raise StoreError(f"{path} cannot be read: {error}") from error
        return cls(layers)
