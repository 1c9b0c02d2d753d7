"""An embedding model made a version, without training: loaded, packed, exported, with golden vectors of its own."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tuneserve.artifact import Version, write_golden_vectors
from tuneserve.code import code_hash
from tuneserve.errors import BaseModelError
from tuneserve.lifecycle.store import Store
from tuneserve.logs import in_one_line
from tuneserve.network.embedding import EmbeddingModel, read_limit
from tuneserve.settings import Settings
from tuneserve.text import TextEncoder
from tuneserve.training import openvino_graph
from tuneserve.training.base_model import BaseModel
from tuneserve.training.model import load_tokenizer, require_embeddings
from tuneserve.training.publication import GOLDEN_TEXTS, publish_untrained
from tuneserve.training.tokens import TokenizedSplit


def publish(base: BaseModel, settings: Settings, store: Store, *, threads: int) -> Version:
    """The version of this model, made now or found.

    Raises:
        BaseModelError: it is no encoder that can be loaded.
        StoreError: the store cannot be written.
    """
    began = time.perf_counter()
    said = settings.num_max_positions if "num_max_positions" in settings.model_fields_set else read_limit(base.folder)
    tokenizer = load_tokenizer(base.folder, max_tokens=said)
    max_tokens = int(tokenizer.model_max_length)
    content = ["embedding", code_hash("text.py", "training", "network"), base.content, max_tokens]
    fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    if known := store.find(fingerprint):
        return known
    model = load(base.folder)
    require_embeddings(model, max_tokens)
    encoder = TextEncoder.from_json(tokenizer.backend_tokenizer.to_str(), max_tokens=max_tokens, clean=str.strip)
    texts = [tokens.ids for tokens in encoder.encode(GOLDEN_TEXTS)]

    def complete(folder: Path) -> Mapping[str, Any]:
        saved = EmbeddingModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        write_golden_vectors(folder, list(GOLDEN_TEXTS), [_vector(saved, ids) for ids in texts])
        return {
            "settings": settings.public() | {"num_max_positions": max_tokens},
            "engine": openvino_graph.export(saved, folder, _as_split(texts), threads=threads),
        }

    return publish_untrained(
        store, base, settings, model, tokenizer, fingerprint=fingerprint, began=began, complete=complete
    )


def load(folder: Path) -> EmbeddingModel:
    """The encoder in fp32 on the CPU.

    Raises:
        BaseModelError: it cannot be loaded, or some of its weights would have to be made up.
    """
    try:
        model, found = EmbeddingModel.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except BaseModelError:
        raise
    except Exception as error:  # transformers raises whatever met it in files of another kind
        raise BaseModelError(f"{folder} cannot be loaded as an encoder: {in_one_line(error)}") from error
    if model.config.is_encoder_decoder:
        raise BaseModelError(f"{folder} is an encoder-decoder ({model.config.model_type}), which embeds no text.")
    if missing := found["missing_keys"]:
        raise BaseModelError(f"{folder} has no weights {', '.join(sorted(missing)[:4])}: it cannot be served as it is.")
    embedder: EmbeddingModel = model.eval()
    return embedder


@torch.inference_mode()
def _vector(model: EmbeddingModel, ids: Sequence[int]) -> list[float]:
    row = torch.tensor([list(ids)])
    vector: list[float] = model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0].tolist()
    return vector


def _as_split(texts: Sequence[Sequence[int]]) -> TokenizedSplit:
    return TokenizedSplit(
        ids=np.concatenate([np.array(ids, dtype=np.int32) for ids in texts]),
        starts=np.r_[0, np.cumsum([len(ids) for ids in texts])],
        label_ids=np.zeros(len(texts), dtype=np.int64),
        truncated=np.zeros(len(texts), dtype=bool),
    )
