"""An encoder whose output is one vector a text: the mean of its tokens' last states, or the first token's.

Shaped as transformers' classifiers are, so that it is packed, exported and run as they are: `logits` are the vectors.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from tuneserve.errors import BaseModelError

POOLING = "classifier_pooling"
"""The field of `config.json` that says how; ModernBERT's classifiers have the same."""


class EmbeddingModel(nn.Module):
    """See the module.

    Args:
        body: a transformers encoder; its configuration names the pooling, `mean` or `cls`.
    """

    def __init__(self, body: PreTrainedModel) -> None:
        super().__init__()
        self.body = body
        if getattr(body, "pooler", None) is not None:
            setattr(body, "pooler", None)  # noqa: B010  nothing reads it; mypy takes every attribute for a module
        if not hasattr(body.config, POOLING):
            setattr(body.config, POOLING, "mean")

    @classmethod
    def from_pretrained(
        cls, folder: Path, *, dtype: torch.dtype, output_loading_info: bool = False, trust_remote_code: bool = False
    ) -> Any:
        """As transformers' classes; with `output_loading_info` a pair."""
        pooling = read_pooling(folder)
        body, found = AutoModel.from_pretrained(folder, dtype=dtype, output_loading_info=True, trust_remote_code=False)
        missing = [name for name in found["missing_keys"] if not name.startswith("pooler.")]
        if pooling:
            setattr(body.config, POOLING, pooling)
        model = cls(body)
        return (model, {**found, "missing_keys": missing}) if output_loading_info else model

    def save_pretrained(self, folder: Path) -> None:
        """Write the body and its configuration, the pooling in it."""
        self.body.save_pretrained(folder)

    @property
    def config(self) -> Any:
        """The body's."""
        return self.body.config

    @property
    def base_model(self) -> PreTrainedModel:
        """The body."""
        return self.body

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.body.device

    @property
    def _supports_attention_backend(self) -> bool:
        return bool(getattr(self.body, "_supports_attention_backend", False))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **rest: Any) -> Any:
        """Vectors float [texts, channels] of padded rows; without a mask the body's states are pooled already."""
        states = self.body(input_ids=input_ids, attention_mask=attention_mask, **rest).last_hidden_state
        if attention_mask is None or getattr(self.config, POOLING) == "cls":
            return SimpleNamespace(logits=states[:, 0])
        shares = attention_mask[:, :, None].to(states.dtype)
        return SimpleNamespace(logits=(states * shares).sum(1) / shares.sum(1))


def read_pooling(folder: Path) -> str:
    """How a folder in sentence-transformers' layout pools; empty if it does not say.

    Raises:
        BaseModelError: it pools in another way, or there is a layer behind the pooling.
    """
    modules = _read(folder / "modules.json") or []
    paths = [str(one.get("path", "")) for one in modules]
    kinds = [str(one.get("type", "")).rsplit(".", 1)[-1] for one in modules]
    if others := sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"}):
        raise BaseModelError(
            f"{folder} has layers behind its encoder that this job does not know: {', '.join(others)}."
        )
    pooling = next((path for path, kind in zip(paths, kinds, strict=True) if kind == "Pooling"), "1_Pooling")
    said = _read(folder / pooling / "config.json") or {}
    ways = [name.removeprefix("pooling_mode_") for name, wanted in said.items() if wanted is True]
    ways = [way for way in ways if way in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")] or [
        way for name, way in said.items() if name == "pooling_mode"
    ]
    if not ways:
        return ""
    way = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls"}.get(ways[0])
    if way is None or len(ways) > 1:
        raise BaseModelError(f"{folder} pools by {' and '.join(ways)}; this job knows the mean and the first token.")
    return way


def read_limit(folder: Path) -> int | None:
    """Tokens that a folder in sentence-transformers' layout wants to be read; None if it does not say."""
    found = (_read(folder / "sentence_bert_config.json") or {}).get("max_seq_length")
    return int(found) if isinstance(found, int) else None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
