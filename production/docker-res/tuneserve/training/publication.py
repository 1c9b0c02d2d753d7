"""A trained model made a version: calibrated, saved, loaded again as anyone would, and tested."""

import copy
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from scipy.special import softmax
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import tuneserve
from tuneserve.artifact import (
    METADATA,
    REPORT_LOSSES,
    Golden,
    Version,
    describe_files,
    new_version,
    read_version,
    write_golden,
)
from tuneserve.files import write_json
from tuneserve.hardware import Precision
from tuneserve.lifecycle.drift import Answers, write_reference
from tuneserve.lifecycle.store import Store
from tuneserve.network import head
from tuneserve.network.forward import cast, choose_forward
from tuneserve.settings import Settings
from tuneserve.text import TextEncoder
from tuneserve.training import abstention, calibration
from tuneserve.training.base_model import BaseModel
from tuneserve.training.evaluation import Array, expected_calibration_error, predict_logits, score
from tuneserve.training.exporters import Exporter, Saved, export
from tuneserve.training.few import HeldOut
from tuneserve.training.shared_body import write_head
from tuneserve.training.tokens import TokenizedSplit

logger = logging.getLogger(__name__)


def publish(
    store: Store,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Mapping[str, TokenizedSplit],
    metadata: dict[str, Any],
    *,
    precision: Precision,
    exporters: Sequence[Exporter],
    began: float,
    temperature: float | None = None,
    tested: bool = True,
    shares: bool = False,
    losses: Sequence[tuple[int, float]] = (),
    held_out: HeldOut | None = None,
    describe: Callable[[Mapping[str, Array]], Mapping[str, Any]] = lambda logits: {},
) -> Version:
    """Calibrate the model, save it, load it again as anyone would, test what was loaded, and export it.

    Args:
        store: where the version is put.
        model: trained, in fp32.
        tokenizer: the model's.
        tokens: the splits by name.
        metadata: what is known of the run.
        precision: of the device's products.
        exporters: of the forms that engines run.
        began: when the run did, by `time.perf_counter()`.
        temperature: that is folded into the model already; None to fit it to the validation texts.
        tested: whether the splits have labels to test with.
        shares: whether the body is as it was in the base model, so that other versions may have the same.
        losses: of some of the steps, by their numbers; for the report.
        held_out: what cross-validation answered to training texts, which then stand for validation texts.
        describe: told the calibrated logits of each split but the training texts; what it returns joins the metadata.

    Raises:
        StoreError: the store cannot be written.
    """
    created, seed = datetime.now(UTC), metadata["settings"]["seed"]
    folder = store.free_folder(f"{created:%Y%m%dT%H%M%SZ}-{metadata['fingerprint'][:8]}")
    known: dict[str, Array] = {}
    if held_out is not None:
        tokens = {**tokens, "valid": tokens["train"].select(held_out.rows)}
        metadata = metadata | {"cross_validation": held_out.record()}
    if temperature is None:
        uncalibrated = held_out.logits if held_out is not None else _logits(model, tokens["valid"], precision)
        temperature = fold_fitted(model, uncalibrated, tokens["valid"].label_ids)
        known["valid"] = uncalibrated / temperature
    with new_version(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        saved = head.NETWORK.from_pretrained(temporary, dtype=torch.float32, trust_remote_code=False)
        saved.to(model.device)
        logits = known | {
            name: _logits(saved, tokens[name], precision) for name in tokens if name not in {"train", *known}
        }
        metrics, errors = test(logits if tested else {}, tokens, metadata["labels"], temperature)
        encoder = TextEncoder.from_json(
            tokenizer.backend_tokenizer.to_str(), max_tokens=int(tokenizer.model_max_length)
        )
        golden = golden_answers(saved.cpu(), encoder, metadata["labels"])
        write_golden(temporary, golden)
        body = write_head(saved, temporary) if shares else None
        threads = torch.get_num_threads()
        shown = Saved(saved, tokens, golden, encoder, seed, threads, shares=body is not None)
        engine = export(exporters, shown, temporary)
        promised: dict[str, Any] = {}
        if (max_error := metadata["settings"].get("max_error", 0)) > 0:
            test_ids = tokens["test"].label_ids if tested else None
            promised["abstention"] = abstention.promise(
                logits["valid"], tokens["valid"].label_ids, logits["test"], test_ids, max_error
            )
        answers = answers_to([tokens["valid"], tokens["test"]], [logits["valid"], logits["test"]], encoder)
        write_reference(temporary, answers, seed=seed)
        (temporary / "report").mkdir()
        for name, figures in metrics.items():
            write_json(temporary / "report" / f"{name}.json", figures)
        if losses:
            write_json(temporary / REPORT_LOSSES, losses)
        metadata = metadata | {
            # The matrix of a thousand labels has a million figures; it stays in the report.
            "metrics": {
                name: {k: v for k, v in one.items() if k != "confusion_matrix"} for name, one in metrics.items()
            },
            "calibration": {"temperature": temperature, "ece_before": errors},
            **promised,
            **describe(logits),
            "engine": engine,
            **({"body": body} if body is not None else {}),
            **describe_files(temporary),
            "versions": versions(),
            "created_at": created.isoformat(timespec="seconds"),
            "duration_s": round(time.perf_counter() - began, 3),
        }
        write_json(temporary / METADATA, metadata)
    version = read_version(folder)
    if "feedback" in metrics:
        logger.info("feedback_accuracy=%.4f; of the texts held out of the feedback", metrics["feedback"]["accuracy"])
    if tested:
        logger.info(
            "test_accuracy=%.4f; test_macro_f1=%.4f; test_log_loss=%.4f; test_ece=%.4f; "
            "test_ece_before_calibration=%.4f;",
            *(metrics["test"][name] for name in ("accuracy", "macro_f1", "log_loss", "ece")),
            errors["test"],
        )
    logger.info("version %s saved in %s after %.1f s", version.id, folder, metadata["duration_s"])
    return version


def publish_untrained(
    store: Store,
    base: BaseModel,
    settings: Settings,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    fingerprint: str,
    began: float,
    complete: Callable[[Path], Mapping[str, Any]],
) -> Version:
    """Save a model as it is, with what its task needs beside it.

    Args:
        store: where the version is put.
        base: where the model comes from.
        settings: of the run.
        model: that is saved, of transformers.
        tokenizer: the model's.
        fingerprint: of all that decides what the version is.
        began: when the run did, by `time.perf_counter()`.
        complete: writes its golden answers, and what else is needed, into the folder that the model was saved in, and
            returns what the metadata shall say besides, or instead.

    Raises:
        StoreError: the store cannot be written.
    """
    created = datetime.now(UTC)
    folder = store.free_folder(f"{created:%Y%m%dT%H%M%SZ}-{fingerprint[:8]}")
    with new_version(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        metadata = {
            "task": settings.task,
            "fingerprint": fingerprint,
            "labels": [],
            "settings": settings.public(),
            "base_model": base.record(),
            "imported": True,
            **complete(temporary),
            **describe_files(temporary),
            "versions": versions(),
            "created_at": created.isoformat(timespec="seconds"),
            "duration_s": round(time.perf_counter() - began, 3),
        }
        write_json(temporary / METADATA, metadata)
    logger.info("version %s saved in %s after %.1f s", folder.name, folder, metadata["duration_s"])
    return read_version(folder)


GOLDEN_TEXTS = (
    "Good.",
    "The parcel came two days late, and the box was torn, but what was in it is exactly what I had hoped for.",
    "I would not go there again: slow service, cold soup, and nobody who wanted to hear of it.",
    "¿Dónde está la estación? – 電影很好看 – 12,50 € <br /> (see #4)",
    "First it seemed to me that nothing would ever happen, and then everything did. " * 40,
)
"""Short and long, plain and strange, and none of anybody's data."""


@torch.inference_mode()
def golden_answers(saved: PreTrainedModel, encoder: TextEncoder, labels: list[str]) -> Golden:
    """What the model, in fp32 on the CPU, says to the golden texts."""
    scores = []
    for tokens in encoder.encode(GOLDEN_TEXTS):
        ids = torch.tensor([tokens.ids])
        logits = saved(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double()
        scores.append(dict(zip(labels, logits.softmax(0).tolist(), strict=True)))
    return Golden(list(GOLDEN_TEXTS), scores)


def fold_fitted(model: PreTrainedModel, logits: Array, label_ids: Array) -> float:
    """Fold the temperature that fits these answers into the model; return it, 1 if nothing was changed."""
    temperature = calibration.fit_temperature(logits, label_ids)
    return temperature if calibration.fold(model, temperature) else 1.0


def test(
    logits: Mapping[str, Array], tokens: Mapping[str, TokenizedSplit], labels: list[str], temperature: float
) -> tuple[dict[str, Any], dict[str, float]]:
    """The figures of each split by name, and the calibration errors that there were before the temperature."""
    metrics, errors = {}, {}
    for name, rows in logits.items():
        metrics[name] = score(rows, tokens[name].label_ids, labels)
        errors[name] = expected_calibration_error(softmax(rows * temperature, axis=1), tokens[name].label_ids)
    return metrics, errors


def answers_to(splits: Sequence[TokenizedSplit], logits: Sequence[Array], encoder: TextEncoder) -> Answers:
    """What a server would note of these texts, whose logits are float [texts, labels]."""
    rows = np.concatenate(logits)
    unknown = encoder.unknown_id
    return Answers(
        label_ids=rows.argmax(axis=1),
        confidences=softmax(rows.astype(np.float64), axis=1).max(axis=1),
        tokens=np.concatenate([split.lengths for split in splits]),
        unknown=np.array(
            [np.count_nonzero(split.text_ids(row) == unknown) for split in splits for row in range(len(split))]
            if unknown is not None
            else np.zeros(len(rows)),
            dtype=np.int64,
        ),
        truncated=np.concatenate([split.truncated for split in splits]),
    )


def _logits(model: PreTrainedModel, split: TokenizedSplit, precision: Precision) -> Array:
    """Logits of a split, computed as the device computes, by a copy; the model itself stays fp32."""
    model = copy.deepcopy(model).eval()
    forward = choose_forward(model, learns=False)
    cast(model, precision)
    return predict_logits(forward, split, labels=int(model.config.num_labels or 0), device=model.device)


def versions() -> dict[str, str]:
    """What a run was made with."""
    return {
        "tuneserve": tuneserve.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
