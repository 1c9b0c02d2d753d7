"""Training the head alone: a frozen body's work is done once, and what the head reads of every text is kept on disk.

With TRAIN_BODY=0 the body gives the same states in every epoch and every run; so each text goes through it once, and
what is left to train reads a table.
"""

import copy
import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tuneserve.code import code_hash
from tuneserve.errors import StoreError
from tuneserve.files import mark_used
from tuneserve.hardware import Precision
from tuneserve.network.forward import PROBE_TOLERANCE, Forward, LastStates, Texts, cast, choose_forward, probe
from tuneserve.progress import counted
from tuneserve.training.checkpoint import Position
from tuneserve.training.loop import Recipe, Run, fit, fit_model
from tuneserve.training.model import freeze_body
from tuneserve.training.tokens import Array, TokenizedSplit, collate, sorted_batches

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid")

CODE = ("text.py", "network", *(f"training/{name}.py" for name in ("features", "model", "tokens")))
"""What makes the features; an edit in it makes them anew."""
HEAD_PASSES = 100
"""Most passes over the features; N_EPOCHS may ask for more."""
HEAD_PATIENCE = 5
"""Passes without a better validation after which the head has converged."""

WINDOW_TEXTS = 8192
"""Texts that are encoded, sorted by length, between two notes of how far the table has come."""
ENCODING_TOKENS = 4096
"""Tokens that go through the model at once."""


def fit_head(
    model: PreTrainedModel,
    tokens: Mapping[str, TokenizedSplit],
    labels: Sequence[str],
    recipe: Recipe,
    run: Run,
    *,
    precision: Precision,
    body: str,
    cache: Path,
) -> Position:
    """Train what follows the body's last hidden state, as `loop.fit_model` trains the whole model.

    Passes go on until the validation has not improved for a while: they cost next to nothing.

    Args:
        model: in fp32; its body stays as it is.
        tokens: the splits by name.
        labels: names by id.
        recipe: epochs, rates, seed.
        run: checkpoints, signals, trackers.
        precision: in which the body computes.
        body: what names it among the features that are kept.
        cache: folder that they are kept in.

    Raises:
        TrainingError: as `loop.fit`.
        StoreError: features or a checkpoint cannot be written.
    """
    freeze_body(model)
    began = time.perf_counter()
    frozen = copy.deepcopy(model).eval()
    encoder, head = Encoder(frozen, choose_forward(frozen, learns=False)), Head(model)
    if not agree(encoder, head):
        logger.info("the head of this model cannot be trained by itself: every pass goes through the body")
        return fit_model(model, tokens, labels, recipe, run, precision=precision)
    cast(frozen, precision)
    tables = {}
    for name in SPLITS:
        folder = cache / "features" / _key(body, precision, tokens[name])
        tables[name] = encode(encoder, tokens[name], folder, stopping=run.stopping)
        if run.stopping():
            return Position()
    encoded_s = time.perf_counter() - began
    forward = LookUp(head, tables, model.device)
    recipe = replace(recipe, epochs=max(HEAD_PASSES, recipe.epochs), patience=recipe.patience or HEAD_PATIENCE)
    seen = fit(head, forward, as_splits(tokens), labels, recipe, run, precision="fp32")
    count = int(tokens["train"].starts[-1])
    return replace(seen, fit_s=seen.fit_s + encoded_s, tokens=count, padded_tokens=count)


def _key(body: str, precision: Precision, split: TokenizedSplit) -> str:
    key = hashlib.sha256(f"{body} {precision} {code_hash(*CODE)}".encode())
    for array in (split.starts, split.ids):
        key.update(np.ascontiguousarray(array).view(np.uint8).data)
    return key.hexdigest()[:32]


class Head(nn.Module):
    """What follows the body's last hidden state, as a module of its own that shares the model's weights."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.shell = copy.copy(model)
        modules = dict(model._modules)
        modules[model.base_model_prefix] = _GivenBody(getattr(model.base_model, "pooler", None))
        self.shell._modules = modules

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features [texts, channels] → logits [texts, labels]."""
        logits = self.shell(inputs_embeds=features[:, None]).logits
        assert isinstance(logits, torch.Tensor)
        return logits


class _GivenBody(nn.Module):
    """Stands where the body was, and gives what it would have given."""

    def __init__(self, pooler: nn.Module | None) -> None:
        super().__init__()
        self.pooler = pooler

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> BaseModelOutputWithPooling:
        pooled = None if self.pooler is None else self.pooler(inputs_embeds)
        return BaseModelOutputWithPooling(last_hidden_state=inputs_embeds, pooler_output=pooled)


class Encoder:
    """The frozen body: a batch to what the head reads of it. The model is the encoder's own."""

    def __init__(self, model: PreTrainedModel, forward: Forward) -> None:
        self.model, self.forward, self._states = model, forward, LastStates(model)

    @torch.inference_mode()
    def __call__(self, batch: Texts) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [texts, channels] and, by the way, the logits [texts, labels], both fp32."""
        logits = self.forward(batch)
        return self._states.take().float(), logits.float()

    def remove(self) -> None:
        """Leave the model as it was, but for what the forward pass has changed."""
        self._states.remove()


@torch.inference_mode()
def agree(encoder: Encoder, head: Head) -> bool:
    """Whether body and head, one after the other, give what the whole model gives; both in fp32."""
    states, logits = encoder(probe(encoder.model))
    try:
        return torch.allclose(head(states), logits, rtol=1e-4, atol=PROBE_TOLERANCE)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False


def encode(encoder: Encoder, split: TokenizedSplit, folder: Path, *, stopping: Callable[[], bool]) -> Array:
    """The features of a split, float32 [texts, channels], memory-mapped; found again if `folder` has them.

    What was encoded before an interruption is not encoded again; it is cut short when `stopping` says yes.

    Raises:
        StoreError: the disk refuses.
    """
    table, note = folder / "features.npy", folder / "encoded.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        said = note.read_text() if note.exists() and table.exists() else ""
        done = int(said) if said.isdecimal() else 0  # a note is empty if the process was killed while it wrote
        if done < len(split):
            if done:
                logger.info("%d of %d texts are encoded already", done, len(split))
            _encode(encoder, split, table, note, done, stopping)
        else:
            logger.info("%d texts are encoded already", len(split))
        mark_used(folder)
        features: Array = np.load(table, mmap_mode="r")
    except OSError as error:
        raise StoreError(f"{folder} cannot be written to: {error}") from error
    return features


def _encode(
    encoder: Encoder,
    split: TokenizedSplit,
    table: Path,
    note: Path,
    done: int,
    stopping: Callable[[], bool],
) -> None:
    device = encoder.model.device
    channels = encoder(collate(split, [0], device))[0].shape[1]
    mode = "r+" if done else "w+"
    features = np.lib.format.open_memmap(table, mode=mode, dtype=np.float32, shape=(len(split), channels))
    if hasattr(os, "posix_fallocate"):
        with table.open("r+b") as file:  # on a full disk, this is an error; writing to the map would end the process
            os.posix_fallocate(file.fileno(), 0, table.stat().st_size)
    for begin in range(done, len(split), WINDOW_TEXTS):
        end = min(begin + WINDOW_TEXTS, len(split))
        for rows in counted(sorted_batches(split.lengths[begin:end], ENCODING_TOKENS), "encoding"):
            if stopping():
                return
            features[begin + rows] = encoder(collate(split, begin + rows, device))[0].cpu().numpy()
        features.flush()
        note.write_text(str(end))
        logger.info("encoded %d of %d texts", end, len(split))


def as_splits(tokens: Mapping[str, TokenizedSplit]) -> dict[str, TokenizedSplit]:
    """The training and validation texts as texts of one token, their row among all features: what `LookUp` takes."""
    splits, begin = {}, 0
    for name in SPLITS:
        size = len(tokens[name])
        ids = np.arange(begin, begin + size, dtype=np.int32)
        splits[name] = TokenizedSplit(ids, np.arange(size + 1), tokens[name].label_ids, tokens[name].truncated)
        begin += size
    return splits


class LookUp:
    """The head over tables of features; the batch's token ids are rows of the training texts', then of the others'."""

    pads = False

    def __init__(self, head: Head, tables: Mapping[str, Array], device: torch.device) -> None:
        self.head, self.device = head, device
        self.tables = [tables[name] for name in SPLITS]

    def __call__(self, batch: Texts) -> torch.Tensor:
        """Logits of each text."""
        rows = batch.input_ids.cpu().numpy()
        table, begin = self.tables[0], 0
        if rows[0] >= len(table):
            table, begin = self.tables[1], len(table)
        logits = self.head(torch.from_numpy(table[rows - begin]).to(self.device))
        assert isinstance(logits, torch.Tensor)
        return logits

    def remove(self) -> None:
        """Nothing was changed."""
