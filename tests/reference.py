"""What transformers answers with the files of a version, to hold a server's answers against."""

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tuneserve.artifact import Version

TEXTS = ["a great film", "the food was awful", "dull and cold and bad", "it was not good but warm"]
_KNOWN: dict[str, dict[str, dict[str, float]]] = {}


def reference(version: Version) -> dict[str, dict[str, float]]:
    """The probability of each label, by the text; computed once for a version."""
    if version.id not in _KNOWN:
        tokenizer = AutoTokenizer.from_pretrained(version.folder)
        model = AutoModelForSequenceClassification.from_pretrained(version.folder)
        with torch.inference_mode():
            rows = [model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(0).tolist() for text in TEXTS]
        _KNOWN[version.id] = {
            text: dict(zip(version.labels, row, strict=True)) for text, row in zip(TEXTS, rows, strict=True)
        }
    return _KNOWN[version.id]
