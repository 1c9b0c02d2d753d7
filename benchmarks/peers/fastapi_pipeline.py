"""FastAPI with a transformers pipeline in its lifespan: `uvicorn fastapi_pipeline:app`. A request is a call."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from pydantic import BaseModel
from transformers import pipeline


class Review(BaseModel):
    """What is asked."""

    text: str


class Sentiment(BaseModel):
    """What is answered."""

    label: str
    score: float


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    device = os.environ.get("DEVICE", "cpu")
    app.state.classify = pipeline("text-classification", os.environ["CHECKPOINT"], device=device)
    yield


app = FastAPI(lifespan=lifespan)


@app.post("/classify")
def classify(review: Review, request: Request) -> Sentiment:
    """Answer in a thread of FastAPI's pool, which is where it runs what is not a coroutine."""
    [best] = request.app.state.classify(review.text, truncation=True)
    return Sentiment(**best)
