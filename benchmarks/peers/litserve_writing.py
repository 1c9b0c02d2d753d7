"""LitServe around `generate`, with its batching: `python litserve_writing.py`."""

import json
import os
from typing import Any

import litserve
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

CHECKPOINT = os.environ["CHECKPOINT"]
OPTIONS: dict[str, Any] = json.loads(os.environ["GENERATE"])


class Writing(litserve.LitAPI):
    """A batch is whatever came within a hundredth of a second, up to 8 texts."""

    def setup(self, device: str) -> None:
        """Load the model, once a worker."""
        self.pair = AutoConfig.from_pretrained(CHECKPOINT).is_encoder_decoder
        self.tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, padding_side="right" if self.pair else "left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        kind = AutoModelForSeq2SeqLM if self.pair else AutoModelForCausalLM
        self.model = kind.from_pretrained(CHECKPOINT).to(device)

    def decode_request(self, request: dict[str, str]) -> str:
        """Take the text out of a request."""
        return request["text"]

    def predict(self, texts: list[str]) -> list[str]:
        """Write on a batch."""
        read = self.tokenizer(texts, truncation=True, max_length=1024, padding=True, return_tensors="pt")
        with torch.inference_mode():
            ids = self.model.generate(read.input_ids, attention_mask=read.attention_mask, **OPTIONS)
        return self.tokenizer.batch_decode(ids if self.pair else ids[:, read.input_ids.shape[1] :])

    def encode_response(self, text: str) -> dict[str, str]:
        """Answer one of them."""
        return {"text": text}


if __name__ == "__main__":
    api = Writing(max_batch_size=8, batch_timeout=0.01)
    server = litserve.LitServer(api, accelerator="cpu", timeout=600)
    server.run(host="127.0.0.1", port=int(os.environ["PORT"]), generate_client_file=False)
