"""FastAPI around `generate`, as the service that this project grew from: `gunicorn -k uvicorn.workers.UvicornWorker`.

One worker, one request at a time: the route is a coroutine that computes.
"""

import json
import os
from typing import Any

import torch
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

CHECKPOINT = os.environ["CHECKPOINT"]
OPTIONS: dict[str, Any] = json.loads(os.environ["GENERATE"])
PAIR = AutoConfig.from_pretrained(CHECKPOINT).is_encoder_decoder
tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
model = (AutoModelForSeq2SeqLM if PAIR else AutoModelForCausalLM).from_pretrained(CHECKPOINT)
app = FastAPI()


class Asked(BaseModel):
    """What is asked."""

    text: str


@app.post("/write")
async def write(asked: Asked) -> dict[str, str]:
    """Write on a text."""
    read = tokenizer(asked.text, truncation=True, max_length=1024, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(read.input_ids, attention_mask=read.attention_mask, **OPTIONS)[0]
    return {"text": tokenizer.decode(ids if PAIR else ids[read.input_ids.shape[1] :], skip_special_tokens=True)}
