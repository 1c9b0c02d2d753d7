"""What multiplies the matrices: token ids in, logits out. All else of serving stands on this side of the seam."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tuneserve.artifact import Version
from tuneserve.errors import StoreError
from tuneserve.graph import DESCRIPTION, FOLDER, Graph, Prepared
from tuneserve.hardware import Precision, choose_device, choose_precision, cpu_has_bf16, gpu_may_be_there
from tuneserve.settings import Settings

logger = logging.getLogger(__name__)

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

    def result(self) -> Array:
        """Wait for what was begun: logits float32 [texts, labels]."""
        ...

    def warm_up(self) -> None:
        """Run what batches will need, so that no user waits for what is set up once."""
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
        self.warm_up_shapes(self.max_batch_tokens)


class TorchEngine:
    """The version's own weights, run by torch: on a GPU, and on a CPU where there is no graph.

    Raises:
        StoreError: the folder's files are damaged.
    """

    def __init__(self, folder: Path, settings: Settings, *, threads: int, max_batch_tokens: int) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self.max_batch_tokens = max_batch_tokens
        self._torch = torch
        self._device, _ = choose_device(settings.device)
        self._bf16 = choose_precision(settings.precision, self._device) == "bf16"
        try:
            self._model = AutoModelForSequenceClassification.from_pretrained(folder).to(self._device).eval()
        except Exception as error:  # transformers and safetensors raise whatever met them in a damaged file
            raise StoreError(f"The model in {folder} cannot be loaded: {error}") from error
        self._pad_id = self._model.config.pad_token_id or 0
        self._logits: Any = None

    def prepare(self, texts: Sequence[Sequence[int]]) -> Prepared:
        """See `Engine.prepare`."""
        shape = len(texts), max(map(len, texts))
        input_ids = np.full(shape, self._pad_id, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        for row, text in enumerate(texts):
            input_ids[row, : len(text)] = text
            mask[row, : len(text)] = 1
        return Prepared((input_ids, mask), len(texts), input_ids.size)

    def begin(self, prepared: Prepared) -> None:
        """See `Engine.begin`; on a GPU the kernels are only queued."""
        torch = self._torch
        tensors = [torch.from_numpy(one) for one in prepared.inputs]
        if self._device.type == "cuda":
            tensors = [one.pin_memory().to(self._device, non_blocking=True) for one in tensors]
        with torch.inference_mode(), torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            self._logits = self._model(input_ids=tensors[0], attention_mask=tensors[1]).logits.float()

    def result(self) -> Array:
        """See `Engine.result`."""
        logits: Array = self._logits.cpu().numpy()
        self._logits = None
        return logits

    def warm_up(self) -> None:
        """See `Engine.warm_up`."""
        infer(self, [[self._pad_id] * 8] * 4)


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
        logger.info("engine: torch on the %s", "GPU" if on_gpu else "CPU, for this version has no graph")
        return TorchEngine(folder, settings, threads=threads, max_batch_tokens=tokens)
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
