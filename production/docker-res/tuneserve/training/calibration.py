"""Probabilities that mean something: one temperature, fitted on the validation texts, folded into the head.

Guo et al., 1706.04599. Dividing all logits by a number changes no prediction; as the last layer is linear, dividing its
weights does the same, and so every program that loads the model gets calibrated probabilities without knowing of it.
"""

from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from torch import nn
from transformers import PreTrainedModel

Array = np.ndarray[Any, np.dtype[Any]]

BOUNDS = (0.5, 10.0)
"""Temperatures that are believed; below, a few validation texts that are all right would make the model cocksure."""


def fit_temperature(logits: Array, label_ids: Array) -> float:
    """The temperature that gives the least log loss on these texts: logits float [texts, labels], ids int [texts]."""
    places = np.arange(len(label_ids))

    def loss(log_temperature: float) -> float:
        tempered = logits.astype(np.float64) / np.exp(log_temperature)
        return float(-log_softmax(tempered, axis=1)[places, label_ids].mean())

    found = minimize_scalar(loss, bounds=np.log(BOUNDS), method="bounded")
    return float(np.exp(found.x)) if found.fun < loss(0.0) else 1.0


@torch.no_grad()
def fold(model: PreTrainedModel, temperature: float) -> bool:
    """Divide the last linear layer by the temperature; False, and nothing changed, if the model has none such."""
    layers = [
        one for one in model.modules() if isinstance(one, nn.Linear) and one.out_features == model.config.num_labels
    ]
    if not layers:
        return False
    for parameter in layers[-1].parameters():
        parameter.div_(temperature)
    return True
