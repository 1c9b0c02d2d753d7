"""A model that writes made a version, without training: saved again, with golden prompts that it has written on."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from tuneserve.artifact import Version, write_golden_writings
from tuneserve.code import code_hash
from tuneserve.errors import BaseModelError
from tuneserve.lifecycle.store import Store
from tuneserve.logs import in_one_line
from tuneserve.network.page import Page
from tuneserve.network.wishes import Wishes
from tuneserve.settings import Settings
from tuneserve.training.base_model import BaseModel
from tuneserve.training.publication import GOLDEN_TEXTS, publish_untrained

GOLDEN_TOKENS = 8
"""Tokens written on each golden prompt."""

MOST_TOKENS = 1 << 16
"""Positions of a model that does not say how many it has."""


Golden = tuple[str, list[int], list[int]]
"""A prompt, its token ids, and those of what is written on it."""


def publish(base: BaseModel, settings: Settings, store: Store, *, threads: int) -> Version:
    """The version of this model, made now or found.

    Raises:
        BaseModelError: it cannot be loaded, or does not fit the task.
        StoreError: the store cannot be written.
    """
    began = time.perf_counter()
    content = [settings.task, code_hash("training/writing.py", "network"), base.content]
    fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    if known := store.find(fingerprint):
        return known
    model, tokenizer = load(base.folder, settings.task)
    about = describe(model, tokenizer, settings.task)

    def complete(folder: Path) -> Mapping[str, Any]:
        writings = write_on(model, tokenizer, about, GOLDEN_TEXTS)
        write_golden_writings(folder, [(text, found) for text, _, found in writings])
        rehearse(model, writings, f"{base.name} ({model.config.model_type})")
        return {"writer": about}

    return publish_untrained(
        store, base, settings, model, tokenizer, fingerprint=fingerprint, began=began, complete=complete
    )


def load(folder: Path, task: str) -> tuple[Any, Any]:
    """The model in its own number format on the CPU, and its tokenizer.

    Raises:
        BaseModelError: they cannot be loaded, some weights would have to be made up, or they do not fit the task.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if task == "summarization" and not config.is_encoder_decoder:
            raise BaseModelError(f"{folder} ({config.model_type}) is no encoder-decoder, which TASK={task} wants.")
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        loaded: Any = kind.from_pretrained(folder, dtype="auto", output_loading_info=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, found = loaded
    except BaseModelError:
        raise
    except Exception as error:  # transformers raises whatever met it in files of another kind
        raise BaseModelError(f"{folder} cannot be loaded for TASK={task}: {in_one_line(error)}") from error
    if missing := sorted(found["missing_keys"]):
        raise BaseModelError(f"{folder} has no weights {', '.join(missing[:4])}: it is not for TASK={task}.")
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise BaseModelError(f"The tokenizer in {folder} has no tokenizer.json and cannot be converted to one.")
    return model.eval(), tokenizer


def describe(model: Any, tokenizer: Any, task: str) -> dict[str, Any]:
    """What serving must know of the model."""
    config, generation = model.config, model.generation_config
    ends = generation.eos_token_id if generation.eos_token_id is not None else config.eos_token_id
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or MOST_TOKENS
    of_task = (getattr(config, "task_specific_params", None) or {}).get(task) or {}
    return {
        "encoder_decoder": bool(config.is_encoder_decoder),
        "max_tokens": int(min(positions, tokenizer.model_max_length, MOST_TOKENS)),
        "max_new_tokens": int(min(positions, MOST_TOKENS)) - 1,  # the decoder begins with one
        "prefix": str(of_task.get("prefix", "")),
        "ends": list(ends) if isinstance(ends, list) else [] if ends is None else [ends],
        "length_penalty": float(of_task.get("length_penalty", generation.length_penalty or 1.0)),
    }


@torch.inference_mode()
def write_on(
    model: Any, tokenizer: Any, about: dict[str, Any], texts: Sequence[str]
) -> list[tuple[str, list[int], list[int]]]:
    """Texts, their ids, and those that transformers itself writes on each, always the likeliest."""
    found = []
    for text in texts:
        room = about["max_tokens"] - (0 if about["encoder_decoder"] else GOLDEN_TOKENS)
        ids = tokenizer(about["prefix"] + text, truncation=True, max_length=room, return_tensors="pt").input_ids
        options = {"num_beams": 1, "do_sample": False, "no_repeat_ngram_size": 0, "repetition_penalty": 1.0}
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=GOLDEN_TOKENS,
            min_length=0,
            pad_token_id=about["ends"][0] if about["ends"] else 0,
            **options,
        )[0].tolist()
        found.append((text, ids[0].tolist(), written[1:] if about["encoder_decoder"] else written[ids.shape[1] :]))
    return found


def rehearse(model: Any, writings: Sequence[Golden], name: str) -> None:
    """Write the same all at once, as a server does.

    Raises:
        BaseModelError: it cannot be done with this kind of model, or other texts come of it.
    """
    page = Page(model)
    try:
        texts = page.join([(ids, Wishes(len(wanted))) for _, ids, wanted in writings])
        while not all(text.done for text in texts):
            page.step()
        alike = sum(text.ids[:1] == wanted[:1] for text, (_, _, wanted) in zip(texts, writings, strict=True))
    except Exception as error:  # models of other kinds raise whatever met them
        raise BaseModelError(f"{name} does not write token by token as is done here: {in_one_line(error)}") from error
    if 2 * alike <= len(writings):
        raise BaseModelError(f"{name} writes otherwise among other texts than alone, so it is not served.")
