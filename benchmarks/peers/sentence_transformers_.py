"""FastAPI around sentence-transformers, as its users put it into a service: `uvicorn sentence_transformers_:app`."""

import os

from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(os.environ["CHECKPOINT"], device="cpu")
app = FastAPI()


class Asked(BaseModel):
    """What is asked."""

    text: str


@app.post("/embed")
def embed(asked: Asked) -> dict[str, list[float]]:
    """Embed a text, on one of FastAPI's threads."""
    return {"vector": model.encode(asked.text, normalize_embeddings=True).tolist()}
