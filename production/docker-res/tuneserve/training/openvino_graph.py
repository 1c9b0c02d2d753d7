"""The engine for CPUs: a trained model as an OpenVINO graph, compared with torch before anyone may serve it.

Where the encoder can be packed (see `forward`), so is the graph; other encoders take a text a row (see `graph`).
"""

import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from tuneserve.files import write_json
from tuneserve.hardware import Precision, cpu_has_bf16
from tuneserve.logs import unchanged
from tuneserve.network.attention import MASKED
from tuneserve.network.embedding import EmbeddingModel
from tuneserve.network.forward import LastStates, Packed, choose_forward
from tuneserve.network.graph import DESCRIPTION, FOLDER, MODEL, Graph, load_openvino
from tuneserve.training.tokens import TokenizedSplit

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]

COMPARED_TEXTS = 64
"""Validation texts on which the graph is compared with torch."""

EXACT = 1e-3
"""Largest difference of a probability, or of a unit vector's value, that the graph in fp32 may show; a right one shows
1e-6."""

SAME_DIRECTION = 0.999
"""Smallest cosine between a text's vectors in fp32 and in a coarser number format."""

MOST_ACCURACY_LOST = 0.003
"""Share of the validation texts that a coarser number format may cost."""

BATCH_TEXTS = 32


def export(
    model: PreTrainedModel, folder: Path, valid: TokenizedSplit, *, threads: int, states: bool = False
) -> dict[str, Any] | None:
    """Write the graph of a model into a version's folder; None, and nothing written, if none agrees with torch.

    Args:
        model: in fp32, on the CPU.
        folder: of the version.
        valid: texts to compare on.
        threads: CPU threads to compare with.
        states: whether the graph also gives what the head reads of each text, as its second output.

    Returns:
        What `engine.json` holds.
    """
    model.eval()
    rows = np.unique(np.linspace(0, len(valid) - 1, min(COMPARED_TEXTS, len(valid))).astype(int))
    rows = np.unique(np.r_[rows, valid.lengths.argmax()])
    texts = [valid.text_ids(row).tolist() for row in rows]
    forward = choose_forward(model, learns=False)
    embeds = isinstance(model, EmbeddingModel)
    shown = _unit if embeds else _probabilities
    try:
        wanted = shown([_by_torch(model, text) for text in texts])
        for layout in ("packed", "padded") if isinstance(forward, Packed) else ("padded",):
            description: dict[str, Any] = {"layout": layout}
            if states:
                description["states"] = True
            if layout == "padded":  # GPT-2's family looks for the last token that is no padding
                description["pad_id"] = model.config.pad_token_id or 0
            try:
                if isinstance(forward, Packed) and layout == "packed":
                    _write(_InRows(forward, states=states), folder)
                else:
                    _write(_InPadding(model, states=states), folder)
                write_json(folder / FOLDER / DESCRIPTION, description)
                found = {one: shown(_by_graph(folder, texts, one, threads)) for one in _formats()}
            except Exception as error:  # the converter raises whatever met it in a model that it does not know
                logger.debug("no %s graph: %s", layout, error)
                continue
            differences = {one: float(np.abs(found[one] - wanted).max()) for one in found}
            if differences["fp32"] <= EXACT:
                description |= _judge(found, wanted, None if embeds else valid.label_ids[rows], differences)
                write_json(folder / FOLDER / DESCRIPTION, description)
                return description
            logger.warning("the %s graph differs from torch by %.2g and is not taken", layout, differences["fp32"])
    finally:
        forward.remove()
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    logger.warning("this model cannot be exported for the CPU engine; it will be served by torch")
    return None


def _formats() -> list[Precision]:
    return ["fp32", "bf16"] if cpu_has_bf16() else ["fp32"]


def _judge(
    found: dict[Precision, Array], wanted: Array, label_ids: Array | None, differences: dict[Precision, float]
) -> dict[str, Any]:
    """Which number formats may serve: bf16 where it was seen to cost nothing, or could not be tried here.

    Of probabilities, where there are label ids, it may cost hardly an answer; unit vectors must keep their direction.
    """
    exact, coarse = found["fp32"], found.get("bf16", found["fp32"])
    if label_ids is None:
        keeps = bool(((coarse * exact).sum(1) >= SAME_DIRECTION).all())
    else:
        right, still = (int((one.argmax(1) == label_ids).sum()) for one in (exact, coarse))
        keeps = right - still <= max(1, MOST_ACCURACY_LOST * len(wanted))
    return {
        "texts_compared": len(wanted),
        "largest_difference": {one: round(difference, 6) for one, difference in differences.items()},
        "formats": ["fp32", "bf16"] if keeps else ["fp32"],
    }


@torch.inference_mode()
def _by_torch(model: PreTrainedModel, text: list[int]) -> Array:
    """Logits [labels] of one text, alone."""
    ids = torch.tensor([text])
    logits: Array = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].numpy()
    return logits


def _by_graph(folder: Path, texts: list[list[int]], precision: Precision, threads: int) -> Array:
    graph = Graph(folder, precision=precision, threads=threads, max_tokens=max(map(len, texts)))
    parts = []
    for begin in range(0, len(texts), BATCH_TEXTS):
        graph.begin(graph.prepare(texts[begin : begin + BATCH_TEXTS]))
        parts.append(graph.result())
    return np.concatenate(parts)


def _probabilities(logits: Any) -> Array:
    found: Array = softmax(np.asarray(logits, dtype=np.float64), axis=1)
    return found


def _unit(vectors: Any) -> Array:
    given = np.asarray(vectors, dtype=np.float64)
    found: Array = given / np.linalg.norm(given, axis=1, keepdims=True)
    return found


def _write(module: "_InRows | _InPadding", folder: Path) -> None:
    """Trace a module and write its graph, weights in fp32."""
    (folder / FOLDER).mkdir(exist_ok=True)
    if isinstance(module, _InRows):
        grid = torch.zeros((2, 8), dtype=torch.int64)
        example: dict[str, torch.Tensor] = {"input_ids": grid, "positions": grid, "owners": grid, "first": grid[0, :2]}
    else:
        grid = torch.ones((2, 8), dtype=torch.int64)
        example = {"input_ids": grid, "attention_mask": grid}
    with unchanged(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer's, on shapes that it takes for constants: the comparison tells
        try:
            graph = load_openvino().convert_model(module, example_input=example)
        finally:
            module.remove()
    load_openvino().save_model(graph, folder / FOLDER / MODEL, compress_to_fp16=False)


class Rows:
    """The layout of the graph: tokens [rows · width], of which each belongs to the text that `owners` names.

    Args:
        positions: int64 [rows, width], each token's position in its text.
        owners: int64 [rows, width]; tokens of one text have the same number, padding has -1.
        first: int64 [texts], the index of each text's first token.
    """

    def __init__(self, positions: torch.Tensor, owners: torch.Tensor, first: torch.Tensor) -> None:
        self.positions = positions.reshape(-1)
        self.first = first
        self._owners = owners
        self._masks: dict[int, torch.Tensor] = {}
        flat = owners.reshape(-1)
        self._of_first = flat[first][:, None] == flat[None, :]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        window: int = -1,
        first_only: bool = False,
    ) -> torch.Tensor:
        """See `Layout.attend`."""
        if first_only:
            mask = _added(self._of_first)[None, None]
            three = [states.transpose(0, 1)[None] for states in (query, key, value)]
        else:
            mask = self._mask(window)
            rows, width = self._owners.shape
            three = [states.view(rows, width, *states.shape[1:]).transpose(1, 2) for states in (query, key, value)]
        found = functional.scaled_dot_product_attention(three[0], three[1], three[2], attn_mask=mask, scale=scaling)
        return found.transpose(1, 2).reshape(query.shape)

    def attend_together(self, joint: torch.Tensor, *, scaling: float) -> torch.Tensor:
        """See `Layout.attend_together`."""
        query, key, value = joint.unbind(1)
        return self.attend(query, key, value, scaling=scaling)

    def mean(self, states: torch.Tensor) -> torch.Tensor:
        """See `Layout.mean`."""
        shares = self._of_first.to(states.dtype)
        return (shares / shares.sum(1, keepdim=True)) @ states

    def _mask(self, window: int) -> torch.Tensor:
        """What is added to the scores, float [rows, 1, width, width]; the layers share it."""
        if window not in self._masks:
            seen = self._owners[:, :, None] == self._owners[:, None, :]
            if window >= 0:
                index = torch.arange(self._owners.shape[1])
                seen = seen & ((index[:, None] - index[None, :]).abs() <= window)
            self._masks[window] = _added(seen)[:, None]
        return self._masks[window]


def _added(seen: torch.Tensor) -> torch.Tensor:
    return torch.where(seen, 0.0, MASKED)


class _Traced(nn.Module):
    """A model as a function of a graph's inputs, to its logits, and with `states` to what the head reads too."""

    def __init__(self, model: PreTrainedModel, *, states: bool) -> None:
        super().__init__()
        self.model = model
        self._states = LastStates(model) if states else None

    def _results(self, logits: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return logits if self._states is None else (logits, self._states.take())

    def remove(self) -> None:
        """Leave the model as it was."""
        if self._states is not None:
            self._states.remove()


class _InRows(_Traced):
    """The packed model."""

    def __init__(self, forward: Packed, *, states: bool) -> None:
        super().__init__(forward.model, states=states)
        self._forward = forward

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, owners: torch.Tensor, first: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return self._results(self._forward.run(input_ids.reshape(-1), Rows(positions, owners, first)))


class _InPadding(_Traced):
    """The model in padded rows."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        assert isinstance(logits, torch.Tensor)
        return self._results(logits)
