"""The exported graph on a CPU, run by OpenVINO: as it is, or with int8 products."""

import logging
from pathlib import Path

from tuneserve.artifact import Version
from tuneserve.hardware import Precision, cpu_has_bf16
from tuneserve.network.graph import DESCRIPTION, FOLDER, Graph
from tuneserve.serving.engines.engine import CPU_BATCH_TOKENS, Engine, is_on_gpu
from tuneserve.settings import Settings

logger = logging.getLogger(__name__)

WARM_UP_S = 0.75
"""Seconds of a start that the shapes of batches may take. A CPU with bf16 runs nearly all in that. On one without
it would be products for the most part, and what a shape needs once is some 10 ms."""


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
        states: bool = False,
    ) -> None:
        super().__init__(folder, precision=precision, threads=threads, max_tokens=max_tokens, int8=int8, states=states)
        self.max_batch_tokens = max_batch_tokens

    def warm_up(self) -> None:
        """See `Engine.warm_up`."""
        if left := self.warm_up_shapes(self.max_batch_tokens, seconds=WARM_UP_S):
            logger.info("%d shapes of batches are set up when they are first needed", left)


def load_graph_engine(version: Version, settings: Settings, *, threads: int, states: bool = False) -> Engine | None:
    """The graph, if there is one and no GPU to prefer.

    Raises:
        StoreError: its files are damaged.
        DeviceError: the device asked for cannot be had.
    """
    if is_on_gpu(settings) or not (version.folder / FOLDER / DESCRIPTION).exists():
        return None
    return _load(version, settings, threads, states=states)


def load_int8_engine(version: Version, settings: Settings, *, threads: int) -> Engine | None:
    """The int8 graph, if it is asked for and was accepted when the version was saved; else the log says why not.

    Raises:
        StoreError: its files are damaged.
        DeviceError: the device asked for cannot be had.
    """
    if settings.precision != "int8":
        return None
    found = (version.metadata.get("engine") or {}).get("int8")
    if is_on_gpu(settings):
        obstacle = "it is for CPUs"
    elif found is None:
        obstacle = "this version was trained without it"
    elif not found["accepted"]:
        obstacle = f"it was refused when this version was saved: {found['reason']}"
    else:
        return _load(version, settings, threads, int8=True)
    logger.warning("PRECISION=int8 has no int8 graph to serve, and serves as `auto`: %s", obstacle)
    return None


def _load(
    version: Version, settings: Settings, threads: int, *, int8: bool = False, states: bool = False
) -> GraphEngine:
    precision = settings.precision
    if precision == "auto" or precision == "int8":
        precision = "bf16" if cpu_has_bf16() else "fp32"
    engine = GraphEngine(
        version.folder,
        precision=precision,
        threads=threads,
        max_tokens=version.max_tokens,
        max_batch_tokens=settings.max_batch_tokens or CPU_BATCH_TOKENS,
        int8=int8,
        states=states,
    )
    shown = "int8" if int8 else engine.precision
    logger.info("engine: OpenVINO, %s, %s, %d threads", engine.description["layout"], shown, threads)
    return engine
