"""How good a model is: its logits on a split, and the metrics that follow from them.

The place for a metric of your own: `score` is what a test reports, `validate` what an epoch does, by which SELECT_BY
chooses the best one. No other module of training defines metrics.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss, precision_recall_fscore_support

from tuneserve.network.forward import Forward
from tuneserve.progress import counted
from tuneserve.training.tokens import TokenizedSplit, collate, sorted_batches
from tuneserve.training.world import ALONE, World

Array = np.ndarray[Any, np.dtype[Any]]

EVALUATION_TOKENS = 4096
"""Tokens that go through the model at once."""
CALIBRATION_BINS = 15


@torch.inference_mode()
def predict_logits(
    forward: Forward,
    split: TokenizedSplit,
    *,
    labels: int,
    device: torch.device,
    stopping: Callable[[], bool] = lambda: False,
    world: World = ALONE,
) -> Array:
    """Logits of every text, float32 [texts, labels], in the split's order; zeros from where `stopping` said yes."""
    logits = torch.zeros((len(split), labels), device=device)
    batches = sorted_batches(split.lengths, EVALUATION_TOKENS)
    for rows in counted(batches[world.rank :: world.size], "evaluating"):
        if stopping():
            break
        logits[rows] = forward(collate(split, rows, device)).float()
    world.add_up(logits)
    return logits.cpu().numpy()


def score(logits: Array, label_ids: Array, labels: Sequence[str]) -> dict[str, Any]:
    """The figures of one split.

    Args:
        logits: float [texts, labels].
        label_ids: the true ids, int [texts].
        labels: names by id.

    Returns:
        `accuracy`, `macro_f1`, `log_loss` (nats), `ece`; `per_class` precision, recall, f1 and texts; and the
        `confusion_matrix` with true labels as rows.
    """
    probabilities = softmax(logits.astype(np.float64), axis=1)
    predicted = probabilities.argmax(axis=1)
    ids = list(range(len(labels)))
    precision, recall, f1, texts = precision_recall_fscore_support(label_ids, predicted, labels=ids, zero_division=0.0)
    return {
        "accuracy": float(accuracy_score(label_ids, predicted)),
        "macro_f1": float(f1_score(label_ids, predicted, labels=ids, average="macro", zero_division=0.0)),
        "log_loss": float(log_loss(label_ids, probabilities, labels=ids)),
        "ece": expected_calibration_error(probabilities, label_ids),
        "per_class": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "texts": int(n)}
            for name, p, r, f, n in zip(labels, precision, recall, f1, texts, strict=True)
        },
        "confusion_matrix": confusion_matrix(label_ids, predicted, labels=ids).tolist(),
    }


def validate(
    forward: Forward,
    split: TokenizedSplit,
    labels: Sequence[str],
    *,
    device: torch.device,
    stopping: Callable[[], bool],
    world: World,
) -> dict[str, float]:
    """The metrics of an epoch, by the names that SELECT_BY knows behind `validation_`; see `predict_logits`."""
    logits = predict_logits(forward, split, labels=len(labels), device=device, stopping=stopping, world=world)
    figures = score(logits, split.label_ids, labels)
    return {
        "validation_loss": figures["log_loss"],
        "validation_accuracy": figures["accuracy"],
        "validation_macro_f1": figures["macro_f1"],
    }


def expected_calibration_error(probabilities: Array, label_ids: Array) -> float:
    """Mean gap between confidence and accuracy over 15 equal-width bins of confidence (Guo et al., 1706.04599)."""
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == label_ids
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = [abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(sum(gaps))
