"""What multiplies the matrices: token ids in, logits out. All else of serving stands on this side of the seam."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from tuneserve.hardware import choose_device, gpu_may_be_there
from tuneserve.network.graph import Prepared
from tuneserve.settings import Settings

Array = np.ndarray[Any, np.dtype[Any]]


CPU_BATCH_TOKENS = 1024
GPU_BATCH_TOKENS = 16384
"""Tokens of a batch if the settings do not say: enough to keep the device busy, few enough to be answered soon."""


class Engine(Protocol):
    """One loaded model. One thread uses it; while a batch runs, the same thread may prepare the next."""

    max_batch_tokens: int
    """Tokens that should go through together."""

    def prepare(self, texts: Sequence[Sequence[int]]) -> Prepared:
        """Lay out a batch: the token ids of each text, special tokens included."""
        ...

    def begin(self, prepared: Prepared) -> None:
        """Start to compute it."""
        ...

    def wait(self, seconds: float) -> None:
        """Wait for what was begun, but no longer than this; or not at all, if it cannot be waited for so."""
        ...

    def result(self) -> Array:
        """Wait for what was begun: logits float32 [texts, labels]."""
        ...

    def warm_up(self) -> None:
        """Run what batches will need, so that hardly a user waits for what is set up once."""
        ...


def infer(engine: Engine, texts: Sequence[Sequence[int]]) -> Array:
    """Logits float32 [texts, labels] of one batch, at once."""
    engine.begin(engine.prepare(texts))
    return engine.result()


def is_on_gpu(settings: Settings) -> bool:
    """Whether these settings, on this machine, mean a GPU.

    Raises:
        DeviceError: the device asked for cannot be had.
    """
    return settings.device == "cuda" or (
        settings.device == "auto" and gpu_may_be_there() and choose_device("auto")[0].type == "cuda"
    )
