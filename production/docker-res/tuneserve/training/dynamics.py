"""What the model said of its training texts each time just before it learned from them.

A text's answers over the epochs tell whether its label fits: what is general is learned first, and a wrong label is
contradicted until it is known by heart (area under the margin: Pleiss et al., 2001.10528). They cost nothing, for the
loop has them anyway.
"""

from typing import Any

import numpy as np
import torch

from tuneserve.training.tokens import Array, TokenizedSplit
from tuneserve.training.world import World

MOST_TEXTS = 20_000
"""Training texts whose answers are kept; of more, a sample is drawn."""


class Dynamics:
    """The sums of the probabilities that some training texts were given.

    Args:
        train: all training texts.
        labels: how many there are.
        seed: of the sample.
    """

    def __init__(self, train: TokenizedSplit, labels: int, seed: int) -> None:
        self.rows = draw_rows(len(train), seed)
        """int [texts kept], ascending: which of the training texts they are."""
        self._sums = torch.zeros(len(self.rows), labels)
        self._counts = torch.zeros(len(self.rows))

    def see(self, rows: Array, logits: torch.Tensor) -> None:
        """Add the logits, float [rows, labels], that these training texts have before they are learned from."""
        places = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        kept = self.rows[places] == rows
        self._sums[places[kept]] += logits.float().softmax(1).cpu()[kept]
        self._counts[places[kept]] += 1

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of it."""
        return {"dynamics.sums": self._sums, "dynamics.counts": self._counts}

    def mean(self, world: World) -> tuple[Array, Array]:
        """Of all processes: the training texts that were answered, int [texts], and float [texts, labels] for them."""
        sums, counts = self._sums.clone(), self._counts.clone()
        world.add_up(sums)
        world.add_up(counts)
        seen: np.ndarray[Any, np.dtype[np.bool_]] = counts.numpy() > 0
        return self.rows[seen], (sums / counts[:, None].clamp(min=1)).numpy()[seen]


def draw_rows(texts: int, seed: int, *, most: int = MOST_TEXTS) -> Array:
    """So many of the rows of a split at most, int, ascending."""
    rows: Array = np.arange(texts)
    if texts > most:
        rows = np.sort(np.random.default_rng([seed, 4]).choice(rows, most, replace=False))
    return rows
