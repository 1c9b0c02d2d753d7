"""BentoML with a transformers pipeline and its adaptive batching: `bentoml serve bentoml_:Sentiment`."""

import os
from typing import Any

import bentoml


@bentoml.service
class Sentiment:
    """Batches grow and shrink with what BentoML learns about their duration, up to 32 texts."""

    def __init__(self) -> None:
        from transformers import pipeline

        self.classify_texts = pipeline("text-classification", os.environ["CHECKPOINT"], device="cpu")

    @bentoml.api(batchable=True, max_batch_size=32)
    def classify(self, texts: list[str]) -> list[dict[str, Any]]:
        """Answers in the order of the texts."""
        return self.classify_texts(texts, batch_size=len(texts), truncation=True)
