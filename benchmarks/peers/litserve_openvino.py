"""LitServe as an expert tunes it: OpenVINO, padded batches and raw tokenizers, `python litserve_openvino.py`.

`python litserve_openvino.py export FOLDER` converts the checkpoint before that, so that no server holds torch.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import litserve
import numpy as np
import openvino
from tokenizers import Tokenizer


def export(checkpoint: str, folder: str) -> None:
    """Write the checkpoint as an OpenVINO model whose batches may have any size."""
    import torch
    from transformers import AutoModelForSequenceClassification

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    example = {name: torch.ones(2, 8, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    shape = openvino.PartialShape([-1, -1])
    kinds = [(name, shape, openvino.Type.i64) for name in example]
    openvino.save_model(openvino.convert_model(Logits(), example_input=example, input=kinds), Path(folder, "model.xml"))


class Sentiment(litserve.LitAPI):
    """A batch is whatever waits, up to 32 texts, which are sorted by length and padded in groups of 8."""

    def setup(self, device: str) -> None:
        """Load the model, once a worker."""
        checkpoint = Path(os.environ["CHECKPOINT"])
        names = json.loads((checkpoint / "config.json").read_text())["id2label"]
        self.labels = [names[str(number)] for number in range(len(names))]
        self.tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        about = json.loads((checkpoint / "tokenizer_config.json").read_text())
        self.tokenizer.enable_truncation(about["model_max_length"])
        self.tokenizer.no_padding()
        compiled = openvino.Core().compile_model(Path(os.environ["EXPORT"], "model.xml"), device.upper())
        self.request = compiled.create_infer_request()

    def decode_request(self, request: dict[str, str]) -> str:
        """Take the text out of a request."""
        return request["text"]

    def predict(self, texts: list[str]) -> list[dict[str, Any]]:
        """Classify a batch."""
        ids = [one.ids for one in self.tokenizer.encode_batch_fast(texts)]
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        answers: list[dict[str, Any]] = [{} for _ in texts]
        for first in range(0, len(order), 8):
            group = order[first : first + 8]
            width = len(ids[group[-1]])
            rows = np.zeros((len(group), width), dtype=np.int64)
            mask = np.zeros_like(rows)
            for row, number in enumerate(group):
                rows[row, : len(ids[number])] = ids[number]
                mask[row, : len(ids[number])] = 1
            [logits] = self.request.infer({"input_ids": rows, "attention_mask": mask}).values()
            odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
            for number, scores in zip(group, odds / odds.sum(axis=-1, keepdims=True), strict=True):
                best = int(scores.argmax())
                answers[number] = {"label": self.labels[best], "score": float(scores[best])}
        return answers

    def encode_response(self, best: dict[str, Any]) -> dict[str, Any]:
        """Answer one of them."""
        return best


if __name__ == "__main__":
    if sys.argv[1:2] == ["export"]:
        export(os.environ["CHECKPOINT"], sys.argv[2])
    else:
        server = litserve.LitServer(Sentiment(max_batch_size=32), accelerator="cpu", fast_queue=True)
        server.run(host="127.0.0.1", port=int(os.environ["PORT"]), generate_client_file=False)
