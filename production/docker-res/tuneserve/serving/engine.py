"""What multiplies the matrices: token ids in, logits out. All else of serving stands on this side of the seam."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tuneserve.artifact import Version
from tuneserve.hardware import Precision, choose_device, cpu_has_bf16, gpu_may_be_there
from tuneserve.network.graph import DESCRIPTION, FOLDER, Graph, Prepared
from tuneserve.settings import Settings

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]

CPU_BATCH_TOKENS = 1024
GPU_BATCH_TOKENS = 16384
"""Tokens of a batch if the settings do not say: enough to keep the device busy, few enough to be answered soon."""

WARM_UP_S = 0.75
"""Seconds of a start that the shapes of batches may take. A CPU with bf16 runs nearly all in that. On one without
it would be products for the most part, and what a shape needs once is some 10 ms."""


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


class GraphEngine(Graph):
    """The exported graph, on a CPU."""

    def __init__(
        self,
        folder: Path,
        *,
        precision: Precision,
        threads: int,
        max_tokens: int,
        max_batch_tokens: int,
        int8: bool = False,
    ) -> None:
        super().__init__(folder, precision=precision, threads=threads, max_tokens=max_tokens, int8=int8)
        self.max_batch_tokens = max_batch_tokens

    def warm_up(self) -> None:
        """See `Engine.warm_up`."""
        if left := self.warm_up_shapes(self.max_batch_tokens, seconds=WARM_UP_S):
            logger.info("%d shapes of batches are set up when they are first needed", left)


def load_engine(version: Version, settings: Settings, *, threads: int) -> Engine:
    """The fastest engine that this machine and version allow; for PRECISION=int8 see `load_int8_engine`.

    Raises:
        StoreError: the version's files are damaged.
        DeviceError: the device asked for cannot be had.
    """
    folder = version.folder
    on_gpu = _is_on_gpu(settings)
    tokens = settings.max_batch_tokens or (GPU_BATCH_TOKENS if on_gpu else CPU_BATCH_TOKENS)
    if on_gpu or not (folder / FOLDER / DESCRIPTION).exists():
        from tuneserve.serving.torch_engine import TorchEngine  # here, for it loads torch

        engine_of_torch = TorchEngine(
            folder,
            settings,
            threads=threads,
            max_tokens=version.metadata["settings"]["num_max_positions"],
            max_batch_tokens=tokens,
        )
        logger.info("engine: torch on the %s, %s", "GPU" if on_gpu else "CPU", engine_of_torch.description)
        return engine_of_torch
    engine = _graph_engine(version, settings, threads, int8=False)
    logger.info("engine: OpenVINO, %s, %s, %d threads", engine.description["layout"], engine.precision, threads)
    return engine


def load_int8_engine(version: Version, settings: Settings, *, threads: int) -> Engine | None:
    """The int8 graph if it is asked for and was accepted when the version was saved; else the log says why not.

    Raises:
        StoreError: its files are damaged.
        DeviceError: the device asked for cannot be had.
    """
    if settings.precision != "int8":
        return None
    found = (version.metadata.get("engine") or {}).get("int8")
    if _is_on_gpu(settings):
        obstacle = "it is for CPUs"
    elif found is None:
        obstacle = "this version was trained without it"
    elif not found["accepted"]:
        obstacle = f"it was refused when this version was saved: {found['reason']}"
    else:
        engine = _graph_engine(version, settings, threads, int8=True)
        logger.info("engine: OpenVINO, %s, int8, %d threads", engine.description["layout"], threads)
        return engine
    logger.warning("PRECISION=int8 has no int8 graph to serve, and serves as `auto`: %s", obstacle)
    return None


def _is_on_gpu(settings: Settings) -> bool:
    return settings.device == "cuda" or (
        settings.device == "auto" and gpu_may_be_there() and choose_device("auto")[0].type == "cuda"
    )


def _graph_engine(version: Version, settings: Settings, threads: int, *, int8: bool) -> GraphEngine:
    return GraphEngine(
        version.folder,
        precision=_cpu_precision(settings),
        threads=threads,
        max_tokens=version.metadata["settings"]["num_max_positions"],
        max_batch_tokens=settings.max_batch_tokens or CPU_BATCH_TOKENS,
        int8=int8,
    )


def _cpu_precision(settings: Settings) -> Precision:
    if settings.precision == "auto" or settings.precision == "int8":
        return "bf16" if cpu_has_bf16() else "fp32"
    return settings.precision
