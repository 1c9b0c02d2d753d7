"""Training the head alone: a frozen body's work is done once, and what the head reads of every text is kept on disk.

With TRAIN_BODY=0 the body gives the same states in every epoch and every run; so each text goes through it once, and
what is left to train reads a table. Other data of the same body, with some texts more, get a table of their own, into
which the rows of texts that another one has are copied.

A folder holds `features.npy` (a row for each text), `texts.npy` (the texts' hashes), `order.npy` (rows, in the order in
which they were filled) and `encoded.txt` (how many of them were). Its name begins with a hash of what made the rows.
The tables and the head that reads them know each other well, which makes the module a little long.
"""

import copy
import hashlib
import itertools
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
from tuneserve.files import CACHED, mark_used
from tuneserve.hardware import Precision
from tuneserve.network.forward import PROBE_TOLERANCE, Forward, LastStates, Texts, cast, choose_forward, probe
from tuneserve.progress import counted
from tuneserve.training.checkpoint import Position
from tuneserve.training.loop import Recipe, Run, fit, fit_model
from tuneserve.training.model import freeze_body
from tuneserve.training.tokens import Array, TokenizedSplit, collate, sorted_batches

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid")
TABLE, TEXTS, ORDER, NOTE = "features.npy", "texts.npy", "order.npy", "encoded.txt"
KIND_DIGITS = 16
"""Of a folder's name: equal ones have tables that the same body and code made."""

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
    encoder = separate(model, precision)
    if encoder is None:
        logger.info("the head of this model cannot be trained by itself: every pass goes through the body")
        return fit_model(model, tokens, labels, recipe, run, precision=precision)
    tables = {}
    for name in SPLITS:
        tables[name] = encode_once(encoder, tokens[name], body=body, cache=cache, stopping=run.stopping)
        if run.stopping():
            return Position()
    encoded_s = time.perf_counter() - began
    head = Head(model)
    forward = LookUp(head, tables, model.device)
    recipe = replace(recipe, epochs=max(HEAD_PASSES, recipe.epochs), patience=recipe.patience or HEAD_PATIENCE)
    seen = fit(head, forward, as_splits(tokens), labels, recipe, run, precision="fp32")
    count = int(tokens["train"].starts[-1])
    return replace(seen, fit_s=seen.fit_s + encoded_s, tokens=count, padded_tokens=count)


def separate(model: PreTrainedModel, precision: Precision) -> "Encoder | None":
    """A copy of the model's body, to compute in this precision; None if body and head are not two by themselves."""
    frozen = copy.deepcopy(model).eval()
    encoder = Encoder(frozen, choose_forward(frozen, learns=False), precision)
    if not agree(encoder, Head(model)):
        return None
    cast(frozen, precision)
    return encoder


def encode_once(
    encoder: "Encoder", split: TokenizedSplit, *, body: str, cache: Path, stopping: Callable[[], bool] = lambda: False
) -> Array:
    """The features of a split as `encode`, in the folder of the cache that is theirs; `body` names the encoder's."""
    return encode(encoder, split, cache / "features" / _key(body, encoder.precision, split), stopping=stopping)


def _key(body: str, precision: Precision, split: TokenizedSplit) -> str:
    kind, content = hashlib.sha256(f"{body} {precision} {code_hash(*CODE)}".encode()), hashlib.sha256()
    for array in (split.starts, split.ids):
        content.update(np.ascontiguousarray(array).view(np.uint8).data)
    return kind.hexdigest()[:KIND_DIGITS] + content.hexdigest()[:16]


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

    def __init__(self, model: PreTrainedModel, forward: Forward, precision: Precision = "fp32") -> None:
        self.model, self.forward, self.precision = model, forward, precision
        self._states = LastStates(model)

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

    Texts that are in another table of this kind beside `folder`, and what was encoded before an interruption, are not
    encoded again; it is cut short when `stopping` says yes.

    Raises:
        StoreError: the disk refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        order, done = _read_progress(folder)
        if len(order) != len(split) or done < len(split):
            _encode(encoder, split, folder, stopping)
        else:
            logger.info("%d texts are encoded already", len(split))
        mark_used(folder)
        features: Array = np.load(folder / TABLE, mmap_mode="r")
    except OSError as error:
        raise StoreError(f"{folder} cannot be written to: {error}") from error
    return features


def _read_progress(folder: Path) -> tuple[Array, int]:
    """The order in which rows are filled, and how many are; none of a folder that has no table or is damaged."""
    try:
        done = int((folder / NOTE).read_text())  # it is empty if the process was killed while it wrote
        order: Array = np.load(folder / ORDER)
        if len(order) == len(np.load(folder / TABLE, mmap_mode="r")):
            return order, done
    except (OSError, ValueError, EOFError):
        pass
    return np.zeros(0, dtype=np.int64), 0


def _encode(encoder: Encoder, split: TokenizedSplit, folder: Path, stopping: Callable[[], bool]) -> None:
    device = encoder.model.device
    order, done = _read_progress(folder)
    if not done or len(order) != len(split):
        order, done = _begin(encoder, split, folder)
    if done:
        logger.info("%d of %d texts are encoded already", done, len(split))
    features = np.load(folder / TABLE, mmap_mode="r+")
    for begin in range(done, len(split), WINDOW_TEXTS):
        window = order[begin : begin + WINDOW_TEXTS]
        for rows in counted(sorted_batches(split.lengths[window], ENCODING_TOKENS), "encoding"):
            if stopping():
                return
            features[window[rows]] = encoder(collate(split, window[rows], device))[0].cpu().numpy()
        features.flush()
        (folder / NOTE).write_text(str(begin + len(window)))
        logger.info("encoded %d of %d texts", begin + len(window), len(split))


def _begin(encoder: Encoder, split: TokenizedSplit, folder: Path) -> tuple[Array, int]:
    """Make a table with the rows that others have; the order of all rows, and how many there are already."""
    texts = _hash_texts(split)
    known = _find_known(texts, folder)
    channels = (known[0][0] if known else encoder(collate(split, [0], encoder.model.device))[0]).shape[1]
    (folder / NOTE).unlink(missing_ok=True)  # it is of a table that is gone
    shape = (len(split), channels)
    features = np.lib.format.open_memmap(folder / TABLE, mode="w+", dtype=np.float32, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with (folder / TABLE).open("r+b") as file:  # on a full disk, an error; writing to the map would end the process
            os.posix_fallocate(file.fileno(), 0, (folder / TABLE).stat().st_size)
    for table, theirs, ours in known:
        for begin in range(0, len(ours), WINDOW_TEXTS):
            part = slice(begin, begin + WINDOW_TEXTS)
            features[ours[part]] = table[theirs[part]]
    features.flush()
    filled = np.concatenate([np.zeros(0, dtype=np.int64), *(ours for _, _, ours in known)])
    order = np.r_[filled, np.setdiff1d(np.arange(len(split)), filled)]
    np.save(folder / TEXTS, texts)
    np.save(folder / ORDER, order)
    (folder / NOTE).write_text(str(len(filled)))
    return order, len(filled)


def _hash_texts(split: TokenizedSplit) -> Array:
    """A hash of each text's token ids, uint64 [texts]."""
    ids, starts = np.asarray(split.ids), split.starts.tolist()
    hashes = (
        hashlib.blake2b(ids[begin:end].tobytes(), digest_size=8).digest() for begin, end in itertools.pairwise(starts)
    )
    return np.frombuffer(b"".join(hashes), dtype=np.uint64)


def _find_known(texts: Array, folder: Path) -> list[tuple[Array, Array, Array]]:
    """Tables of this kind beside the folder, each with rows to be taken from it, and the rows here that they become."""
    found: list[tuple[Array, Array, Array]] = []
    missing = np.arange(len(texts))
    if not CACHED.fullmatch(folder.name):  # it is no cache's folder, and has none beside it
        return []
    for other in sorted(folder.parent.glob(f"{folder.name[:KIND_DIGITS]}*")):
        order, done = _read_progress(other)
        if other == folder or not done or not len(missing):
            continue
        try:
            rows, theirs = order[:done], np.load(other / TEXTS)[order[:done]]
            table = np.load(other / TABLE, mmap_mode="r")
        except (OSError, ValueError, EOFError, IndexError) as error:  # it is damaged, or was just removed
            logger.info("features in %s cannot be read: %s", other, error)
            continue
        by_hash = np.argsort(theirs)
        index = np.searchsorted(theirs, texts[missing], sorter=by_hash)
        index = by_hash[np.minimum(index, len(theirs) - 1)]
        same = theirs[index] == texts[missing]
        if same.any():
            found.append((table, rows[index[same]], missing[same]))
            missing = missing[~same]
    return found


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
