"""What multiplies the matrices: token ids in, logits out. All else of serving stands on this side of the seam."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tuneserve.errors import StoreError
from tuneserve.hardware import choose_device, choose_precision
from tuneserve.settings import Settings

Array = np.ndarray[Any, np.dtype[Any]]


class Engine(Protocol):
    """One loaded model."""

    def infer(self, input_ids: Array, attention_mask: Array) -> Array:
        """Logits float32 [texts, labels] of padded texts, both arguments being int64 [texts, tokens]."""
        ...


class TorchEngine:
    """The version's own weights, run by torch on the GPU or CPU.

    Raises:
        StoreError: the folder's files are damaged.
    """

    def __init__(self, folder: Path, settings: Settings, *, threads: int) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._torch = torch
        self._device, _ = choose_device(settings.device)
        self._bf16 = choose_precision(settings.precision, self._device) == "bf16"
        try:
            self._model = AutoModelForSequenceClassification.from_pretrained(folder).to(self._device).eval()
        except Exception as error:  # transformers and safetensors raise whatever met them in a damaged file
            raise StoreError(f"The model in {folder} cannot be loaded: {error}") from error

    def infer(self, input_ids: Array, attention_mask: Array) -> Array:
        """See `Engine.infer`."""
        torch = self._torch
        with torch.inference_mode(), torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            output = self._model(
                input_ids=torch.from_numpy(input_ids).to(self._device),
                attention_mask=torch.from_numpy(attention_mask).to(self._device),
            )
        logits: Array = output.logits.float().cpu().numpy()
        return logits
