"""The exported graph with int8 products: quantized after training, and accepted only if it hardly costs accuracy.

NNCF measures on training texts in what ranges the graph computes, evens them out between activations and weights (Xiao
et al., SmoothQuant, 2023) and corrects the biases.
"""

import io
import json
import logging
import time
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from tuneserve.artifact import Golden
from tuneserve.files import write_json
from tuneserve.hardware import Precision, cpu_has_bf16
from tuneserve.logs import unchanged
from tuneserve.network.graph import DESCRIPTION, FOLDER, INT8, MODEL, Graph, load_openvino
from tuneserve.text import TextEncoder, split_by_tokens
from tuneserve.training.openvino_graph import MOST_ACCURACY_LOST
from tuneserve.training.tokens import TokenizedSplit

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]

CALIBRATION_TEXTS = 300
TEXTS_TOGETHER = 10
"""Texts of a calibration batch: enough to fill rows as a server's batches do."""

BATCH_TOKENS = 1024


def quantize(
    folder: Path,
    train: TokenizedSplit,
    valid: TokenizedSplit,
    *,
    threads: int,
    seed: int,
    most_accuracy_lost: float = MOST_ACCURACY_LOST,
) -> dict[str, Any]:
    """Write the int8 graph beside a version's graph; nothing of it stays if it costs too much or cannot be made.

    Args:
        folder: of the version, with its graph.
        train: texts to measure ranges on.
        valid: texts to compare all answers on.
        threads: CPU threads to use.
        seed: of the choice of training texts.
        most_accuracy_lost: share of the validation texts; as much as this is too much.

    Returns:
        What `engine.json` holds, `int8` included.
    """
    path = folder / FOLDER / INT8
    began = time.perf_counter()
    try:
        _write(folder, _sample(train, seed), path, threads)
        found = _compare(folder, valid, threads, most_accuracy_lost)
    except Exception as error:  # NNCF raises whatever met it in a graph that it does not know
        logger.debug("no int8 graph", exc_info=True)
        found = {"accepted": False, "reason": f"it cannot be made ({type(error).__name__})"}
    if found["accepted"]:
        found["bytes"] = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    else:
        path.unlink(missing_ok=True)
        path.with_suffix(".bin").unlink(missing_ok=True)
    logger.info(
        "int8 graph %s: %s (%.0f s)",
        "accepted" if found["accepted"] else "refused, the other one serves",
        found["reason"],
        time.perf_counter() - began,
    )
    description: dict[str, Any] = json.loads((folder / FOLDER / DESCRIPTION).read_text(encoding="utf-8"))
    description["int8"] = found
    write_json(folder / FOLDER / DESCRIPTION, description)
    return description


def golden_answers(folder: Path, golden: Golden, encoder: TextEncoder, *, threads: int) -> Golden:
    """What the int8 graph itself says to the golden texts: torch's answers would tell nothing about its files.

    It differs from torch by more than a damaged file might, so it is held to its own answers, as closely as the others.
    """
    texts, limit = [one.ids for one in encoder.encode(golden.texts)], encoder.max_tokens
    rows = softmax(graph_logits(folder, texts, int8=True, threads=threads, max_tokens=limit).astype(np.float64), axis=1)
    labels = golden.scores[0]
    return Golden(golden.texts, [dict(zip(labels, row.tolist(), strict=True)) for row in rows])


def graph_logits(folder: Path, texts: Sequence[Any], *, int8: bool, threads: int, max_tokens: int) -> Array:
    """Logits float32 [texts, labels] of one of a version's graphs, in batches of like length as a server makes them.

    A text is a sequence of token ids.
    """
    graph = Graph(folder, precision=_precision(), threads=threads, max_tokens=max_tokens, int8=int8)
    order = sorted(range(len(texts)), key=lambda text: len(texts[text]))
    parts: list[Array] = []
    for batch in split_by_tokens([len(texts[text]) for text in order], BATCH_TOKENS):
        graph.begin(graph.prepare([texts[text] for text in order[batch]]))
        parts.append(graph.result())
    logits: Array = np.concatenate(parts)[np.argsort(order)]
    return logits


def _sample(split: TokenizedSplit, seed: int) -> list[list[int]]:
    rows = np.random.default_rng(seed).permutation(len(split))[:CALIBRATION_TEXTS]
    return [split.text_ids(int(row)).tolist() for row in rows]


def _write(folder: Path, texts: list[list[int]], path: Path, threads: int) -> None:
    """Quantize what the version's graph computes on these texts, laid out as a server lays them out."""
    openvino = load_openvino()
    graph = Graph(folder, precision="fp32", threads=threads, max_tokens=max(map(len, texts)))
    batches = [
        graph.prepare(texts[begin : begin + TEXTS_TOGETHER]).inputs for begin in range(0, len(texts), TEXTS_TOGETHER)
    ]
    model = openvino.Core().read_model(folder / FOLDER / MODEL)
    names = [one.get_any_name() for one in model.inputs]
    kind = logging.getLoggerClass()
    # NNCF draws its bars on standard output, and its import changes the class of everybody's loggers.
    with redirect_stdout(io.StringIO()), unchanged():
        warnings.simplefilter("ignore")
        try:
            import nncf
        finally:
            logging.setLoggerClass(kind)
        logging.getLogger("nncf").setLevel(logging.ERROR)
        quantized = nncf.quantize(
            model,
            nncf.Dataset([dict(zip(names, inputs, strict=True)) for inputs in batches]),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(batches),
        )
    openvino.save_model(quantized, path, compress_to_fp16=False)


def _compare(folder: Path, valid: TokenizedSplit, threads: int, most_lost: float) -> dict[str, Any]:
    """The accuracy of both graphs on the validation texts, and whether the difference is small enough."""
    texts = [valid.text_ids(row) for row in range(len(valid))]
    longest = int(valid.lengths.max())
    before, after = (
        softmax(graph_logits(folder, texts, int8=int8, threads=threads, max_tokens=longest).astype(np.float64), axis=1)
        for int8 in (False, True)
    )
    return judge(before, after, valid.label_ids, most_lost)


def judge(before: Array, after: Array, label_ids: Array, most_lost: float) -> dict[str, Any]:
    """Whether int8 may serve: probabilities float [texts, labels] of the graph and of its int8 one, and the truth."""
    right, right_after = (int((one.argmax(1) == label_ids).sum()) for one in (before, after))
    finite = bool(np.isfinite(after).all())
    accepted = finite and right - right_after < most_lost * len(label_ids)
    return {
        "accepted": accepted,
        "reason": (
            f"accuracy {right_after / len(label_ids):.2%} where {right / len(label_ids):.2%} was, on {len(label_ids)} "
            f"validation texts, and less than {100 * most_lost:g} points may be lost"
        ),
        "valid_accuracy": round(right / len(label_ids), 6),
        "valid_accuracy_int8": round(right_after / len(label_ids), 6),
        "difference": round((right_after - right) / len(label_ids), 6),
        "largest_difference": round(float(np.abs(after - before).max()), 6) if finite else None,
    }


def _precision() -> Precision:
    """What a server with PRECISION=int8 asks for beside int8."""
    return "bf16" if cpu_has_bf16() else "fp32"
