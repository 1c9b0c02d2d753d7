"""LitServe with a transformers pipeline and its batching: `python litserve_.py`."""

import os
from typing import Any

import litserve
from transformers import pipeline


class Sentiment(litserve.LitAPI):
    """A batch is whatever waits, up to 32 texts."""

    def setup(self, device: str) -> None:
        """Load the model, once a worker."""
        self.classify = pipeline("text-classification", os.environ["CHECKPOINT"], device=device)

    def decode_request(self, request: dict[str, str]) -> str:
        """Take the text out of a request."""
        return request["text"]

    def predict(self, texts: list[str]) -> list[dict[str, Any]]:
        """Classify a batch."""
        return self.classify(texts, batch_size=len(texts), truncation=True)

    def encode_response(self, best: dict[str, Any]) -> dict[str, Any]:
        """Answer one of them."""
        return best


if __name__ == "__main__":
    server = litserve.LitServer(Sentiment(max_batch_size=32), accelerator="cpu")
    server.run(host="127.0.0.1", port=int(os.environ["PORT"]), generate_client_file=False)
