"""What decides the weights that training ends with, the model and the texts aside."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How to train; `learning_rate` is the body's peak, `class_weights` go by label id.

    `patience` counts epochs without a better validation after which training ends; 0 is never.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    max_norm: float
    seed: int
    class_weights: Sequence[float] | None = None
    label_smoothing: float = 0.0
    patience: int = 0
