"""The version's own weights, run by torch: on a GPU, and on a CPU where there is no graph.

Texts go through without padding where the model can (see `network.forward`). On a GPU nothing is waited for but a
batch's result: while one batch is computed the next is laid out, and its copies are queued behind it.
"""

import logging
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import logging as transformers_logging

from tuneserve.artifact import Version
from tuneserve.errors import StoreError
from tuneserve.hardware import choose_device, choose_precision
from tuneserve.network import head
from tuneserve.network.attention import upload
from tuneserve.network.forward import LastStates, Packed, Padded, Texts, cast, choose_forward, probe
from tuneserve.network.graph import Prepared
from tuneserve.serving.engines.engine import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS, is_on_gpu
from tuneserve.settings import Settings

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]
Result = TypeVar("Result")

SMALLEST_BATCH = 8
"""Tokens of the smallest batch that is run to warm up."""


class TorchEngine:
    """See `Engine`.

    Args:
        folder: of the version.
        settings: `device` and `precision` are looked at.
        threads: CPU threads to use.
        max_tokens: the longest text.
        max_batch_tokens: tokens that should go through together.
        task: of the version; empty for classification.
        states: whether results are what the head reads, float32 [texts, channels], and not what it makes of it.

    Raises:
        StoreError: the folder's files are damaged.
        DeviceError: the device asked for cannot be had.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        *,
        threads: int,
        max_tokens: int,
        max_batch_tokens: int,
        task: str = "",
        states: bool = False,
    ) -> None:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self.max_batch_tokens = max_batch_tokens
        self._max_tokens = max_tokens
        self._device, _ = choose_device(settings.device)
        self.precision = choose_precision(settings.precision, self._device)
        try:
            model, found = head.network_of(task).from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
            )
            model.to(self._device).eval()
        except Exception as error:  # transformers and safetensors raise whatever met them in a damaged file
            raise StoreError(f"The model in {folder} cannot be loaded: {error}") from error
        if missing := sorted(found["missing_keys"]):  # transformers would start these weights at random
            raise StoreError(f"The model in {folder} has no weights {', '.join(missing)}: it is not of this class.")
        # In fp32 a GPU has no kernel for texts of different lengths; torch's own attention over rows is faster there.
        packs = self._device.type == "cpu" or self.precision == "bf16"
        forward: Packed | Padded = choose_forward(model, learns=False) if packs else Padded(model)
        cast(model, self.precision)
        self._forward = _that_runs(forward)
        self._states = LastStates(model) if states else None
        self._running = Prepared((), 0, 0)
        self._on_its_way: tuple[torch.Tensor, torch.cuda.Event] | None = None

    @property
    def packs(self) -> bool:
        """Whether texts go through without padding."""
        return not self._forward.pads

    @property
    def description(self) -> str:
        """For the log: how texts are laid out, and the number format."""
        return f"{'without padding' if self.packs else 'padded'}, {self.precision}"

    def prepare(self, texts: Sequence[Sequence[int]]) -> Prepared:
        """See `Engine.prepare`; for a GPU the copies are queued, from pinned memory."""
        lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
        input_ids = np.fromiter(chain.from_iterable(texts), dtype=np.int64, count=lengths.sum())
        inputs = self._sparing(lambda: self._forward.lay_out(Texts(upload(input_ids, self._device), lengths)))
        return Prepared(inputs, len(texts), inputs[0].numel())

    def begin(self, prepared: Prepared) -> None:
        """See `Engine.begin`: a GPU's work is queued; a CPU's is done when the result is asked for."""
        self._running = prepared
        if self._device.type == "cuda":
            self._on_its_way = self._sparing(lambda: self._launch(prepared))

    def wait(self, seconds: float) -> None:
        """Not at all: a CPU has not begun, and torch waits for a GPU without an end."""

    def result(self) -> Array:
        """See `Engine.result`."""
        running, self._running = self._running, Prepared((), 0, 0)
        if self._device.type != "cuda":
            computed: Array = self._sparing(lambda: self._compute(running)).numpy()
            return computed
        assert self._on_its_way is not None
        (logits, arrived), self._on_its_way = self._on_its_way, None
        arrived.synchronize()
        copied: Array = logits.numpy().copy()  # the pinned memory is for other batches
        return copied

    def warm_up(self) -> None:
        """See `Engine.warm_up`. The largest batch comes first; if memory does not hold it, batches become smaller."""
        tokens = self.max_batch_tokens
        while tokens >= SMALLEST_BATCH:
            longest = min(tokens, self._max_tokens)
            try:
                self.begin(self.prepare([[0] * longest] * (tokens // longest)))
                self.result()
            except MemoryError:
                if tokens <= self._max_tokens:
                    raise
                self.max_batch_tokens = tokens // 2
                logger.warning("out of memory; batches have %d tokens from now on", self.max_batch_tokens)
            tokens //= 2

    @torch.inference_mode()
    def _compute(self, prepared: Prepared) -> torch.Tensor:
        logits = self._forward.run(*prepared.inputs)
        return (logits if self._states is None else self._states.take()).float()

    def _launch(self, prepared: Prepared) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Queue the work; the logits in pinned memory, and the event after which they are there."""
        logits = self._compute(prepared)
        found = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True)
        found.copy_(logits, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return found, arrived

    def _sparing(self, work: Callable[[], Result]) -> Result:
        """What `work` gives; if memory does not suffice, it is freed before anyone tries again.

        Raises:
            MemoryError: it does not.
        """
        try:
            return work()
        except torch.OutOfMemoryError as error:
            said = str(error)
        torch.cuda.empty_cache()  # here the failed attempt's tensors are gone, which the error's traceback held
        raise MemoryError(f"out of memory: {said}")


@torch.inference_mode()
def _that_runs(forward: Packed | Padded) -> Packed | Padded:
    """The packed way only if its kernel takes this device and number format, which nobody has tried yet."""
    try:
        forward(probe(forward.model))
    except RuntimeError as error:
        if isinstance(forward, Padded):
            raise
        logger.warning("texts are padded, for without padding they cannot be computed here: %s", error)
        forward.remove()
        return Padded(forward.model)
    return forward


def load(version: Version, settings: Settings, *, threads: int, states: bool = False) -> TorchEngine:
    """The engine of a version; see `TorchEngine` for what it raises."""
    on_gpu = is_on_gpu(settings)
    engine = TorchEngine(
        version.folder,
        settings,
        threads=threads,
        max_tokens=version.max_tokens,
        max_batch_tokens=settings.max_batch_tokens or (GPU_BATCH_TOKENS if on_gpu else CPU_BATCH_TOKENS),
        task=version.metadata.get("task", ""),
        states=states,
    )
    logger.info("engine: torch on the %s, %s", "GPU" if on_gpu else "CPU", engine.description)
    return engine
