"""A model that writes, run by torch: the searches of all texts, and the decoder whose rows they share."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers import logging as transformers_logging

from tuneserve.artifact import Version
from tuneserve.errors import StoreError
from tuneserve.hardware import choose_device, choose_precision
from tuneserve.network.decoder import Decoder
from tuneserve.network.forward import cast
from tuneserve.network.search import Limits, Search, search
from tuneserve.network.wishes import Wishes
from tuneserve.serving.engines.writing import Writing
from tuneserve.settings import Settings

logger = logging.getLogger(__name__)

CPU_TOKENS, GPU_TOKENS = 16384, 131072
"""Tokens that may be under way at a time if the settings do not say, of all texts and beams."""


class TorchWriter:
    """See `WritingEngine`.

    Args:
        model: of transformers, in evaluation mode, on its device.
        max_tokens: that may be under way at a time.
    """

    def __init__(self, model: Any, *, max_tokens: int) -> None:
        self.max_tokens, self.device, self.sound = max_tokens, str(model.device.type), True
        self._decoder = Decoder(model)
        self._model = model
        config = model.generation_config
        ends = config.eos_token_id if config.eos_token_id is not None else model.config.eos_token_id
        self._ends = tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)
        start = config.decoder_start_token_id
        self._begin = [start if start is not None else config.bos_token_id] if self._decoder.pairs else []
        self._texts: list[tuple[Writing, Search]] = []
        self._tokens: list[int] = []

    def join(self, prompts: Sequence[tuple[Sequence[int], Wishes]]) -> list[Writing]:
        """See `WritingEngine`."""
        begun = []
        for (ids, wishes), read in zip(
            prompts, self._decoder.read([ids for ids, _ in prompts], self._begin), strict=True
        ):
            made = search(self._begin or ids, wishes, self._limits(ids, wishes), read.logits.device)
            begun.append((read, made, made.advance(read.logits)))
        texts = []
        with self._changing():
            for read, made, (tokens, parents) in begun:
                row = self._decoder.rows
                self._decoder.join(read)
                self._decoder.select([*range(row), *(row + parent for parent in parents)])
                self._tokens += tokens
                texts.append((Writing(), made))
        self._texts += texts
        self._tell()
        return [writing for writing, _ in texts]

    def _limits(self, ids: Sequence[int], wishes: Wishes) -> Limits:
        config, start = self._model.generation_config, len(self._begin or ids)
        return Limits(
            self._ends,
            start + wishes.min_new_tokens,
            start + wishes.max_new_tokens,
            forced_first=config.forced_bos_token_id if self._decoder.pairs else None,
            forced_last=config.forced_eos_token_id,
        )

    def step(self) -> None:
        """See `WritingEngine`."""
        with self._changing():
            logits = self._decoder.step(self._tokens)
            self._tokens, index, row = [], [], 0
            for _, made in self._texts:
                rows = made.rows
                tokens, parents = made.advance(logits[row : row + rows])
                self._tokens += tokens
                index += [row + parent for parent in parents]
                row += rows
            self._decoder.select(index)
        self._tell()

    def drop(self, writings: Sequence[Writing]) -> None:
        """See `WritingEngine`."""
        row, texts = 0, []
        kept: list[int] = []
        for text, made in self._texts:
            if text not in writings:
                kept += range(row, row + made.rows)
                texts.append((text, made))
            row += made.rows
        with self._changing():
            self._texts, self._tokens = texts, [self._tokens[one] for one in kept]
            self._decoder.select(kept)

    def clear(self) -> None:
        """See `WritingEngine`."""
        self._texts, self._tokens = [], []
        self._decoder.clear()
        self.sound = True

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """What fails in here leaves rows, searches and tokens that do not fit each other."""
        self.sound = False
        yield
        self.sound = True

    @torch.inference_mode()
    def _tell(self) -> None:
        for text, made in self._texts:
            text.done = made.done
            if made.done or made.streams:
                text.ids = made.ids
        self._texts = [one for one in self._texts if not one[1].done]


def load(version: Version, settings: Settings, *, threads: int) -> TorchWriter:
    """The writer of a version.

    Raises:
        StoreError: its files are damaged.
        DeviceError: the device asked for cannot be had.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(threads)
    device, _ = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    kind = AutoModelForSeq2SeqLM if version.metadata["writer"]["encoder_decoder"] else AutoModelForCausalLM
    try:
        loaded: Any = kind.from_pretrained(
            version.folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        model, found = loaded
        model.to(device).eval()
    except Exception as error:  # transformers and safetensors raise whatever met them in a damaged file
        raise StoreError(f"The model in {version.folder} cannot be loaded: {error}") from error
    if missing := sorted(found["missing_keys"]):  # transformers would start these weights at random
        raise StoreError(f"The model in {version.folder} has no weights {', '.join(missing)}.")
    cast(model, precision)
    on_gpu = device.type == "cuda"
    tokens = settings.max_batch_tokens or (GPU_TOKENS if on_gpu else CPU_TOKENS)
    logger.info("engine: torch on the %s, %s, %d tokens under way", "GPU" if on_gpu else "CPU", precision, tokens)
    return TorchWriter(model, max_tokens=tokens)
