"""mosec with a transformers pipeline and its batching: `python mosec_.py --port 8000`."""

import os
from typing import Any

from mosec import Server, Worker
from transformers import pipeline


class Sentiment(Worker):
    """A batch is what came within mosec's 10 ms, up to 32 texts."""

    def __init__(self) -> None:
        self.classify = pipeline("text-classification", os.environ["CHECKPOINT"], device="cpu")

    def forward(self, data: list[dict[str, str]]) -> list[dict[str, Any]]:
        """Classify a batch."""
        return self.classify([one["text"] for one in data], batch_size=len(data), truncation=True)


if __name__ == "__main__":
    server = Server()
    server.append_worker(Sentiment, max_batch_size=32, max_wait_time=10)
    server.run()
