"""Probabilities that mean something: one temperature, fitted on the validation texts, folded into the head.

Guo et al., 1706.04599. Dividing all logits by a number changes no prediction; as the last layer is linear, dividing its
weights does the same, and so every program that loads the model gets calibrated probabilities without knowing of it.
"""

from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from transformers import PreTrainedModel

from tuneserve.training.evaluation import expected_calibration_error
from tuneserve.training.model import last_linear

Array = np.ndarray[Any, np.dtype[Any]]

BOUNDS = (0.05, 20.0)
"""Temperatures that are accepted: a model that has hardly learned is far less sure than it is right. What keeps a few
validation texts that are all right from making it overconfident is the prior."""

PRIOR = 0.5
"""How far, as a standard deviation of its logarithm, a temperature is expected from 1 before a text was seen: a handful
of texts moves it little, hundreds move it freely."""


def fit_temperature(logits: Array, label_ids: Array) -> float:
    """The most likely temperature after these texts: logits float [texts, labels], ids int [texts].

    It is 1, which changes nothing, where the other would not lessen the calibration error: a model that has hardly
    learned is wrong by more than its scale, and the log loss alone would make it surer than it is right.
    """
    rows = np.arange(len(label_ids))

    def logarithms(log_temperature: float) -> Array:
        found: Array = log_softmax(logits.astype(np.float64) / np.exp(log_temperature), axis=1)
        return found

    def loss(log_temperature: float) -> float:
        surprise = -logarithms(log_temperature)[rows, label_ids].sum()
        return float(surprise + (log_temperature / PRIOR) ** 2 / 2)

    def error(log_temperature: float) -> float:
        return expected_calibration_error(np.exp(logarithms(log_temperature)), label_ids)

    found = float(minimize_scalar(loss, bounds=np.log(BOUNDS), method="bounded").x)
    return float(np.exp(found)) if loss(found) < loss(0.0) and error(found) < error(0.0) else 1.0


@torch.no_grad()
def fold(model: PreTrainedModel, temperature: float) -> bool:
    """Divide the last linear layer by the temperature; False, and nothing changed, if the model has none such."""
    layer = last_linear(model)
    if layer is None:
        return False
    for parameter in layer.parameters():
        parameter.div_(temperature)
    return True
