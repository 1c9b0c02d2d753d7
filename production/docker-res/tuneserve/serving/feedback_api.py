"""Routes by which people say what was right."""

import asyncio
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError

from tuneserve.errors import NotFoundError
from tuneserve.lifecycle.feedback import WRITE_EVERY_S, Feedback
from tuneserve.serving.schemas import FeedbackRequest, Problem
from tuneserve.serving.slot import Slot


def feedback_routes(feedback: Feedback, slot: Slot) -> APIRouter:
    """The routes; their work is done on threads, since it waits for the disk."""
    routes = APIRouter(tags=["feedback"], responses={503: {"model": Problem}})

    @routes.post("/feedback", responses={404: {"model": Problem}})
    async def give(wanted: FeedbackRequest) -> dict[str, bool]:
        """Keep a label. When this is answered it is on disk; `stored` is false if just that was said before."""
        labels = slot.model().classifier.version.labels
        if wanted.label not in labels:
            words = f"should be one of the model's labels: {', '.join(labels[:50])}"
            raise RequestValidationError([{"loc": ("body", "label"), "msg": words, "type": "value_error"}])
        if wanted.text is not None:
            return {"stored": await run_in_threadpool(feedback.label_text, wanted.text, wanted.label)}
        answer = (wanted.request_id or "", wanted.index, wanted.label)
        try:
            return {"stored": await run_in_threadpool(feedback.label_answer, *answer)}
        except NotFoundError:
            await asyncio.sleep(2 * WRITE_EVERY_S)  # perhaps another server of this store is about to write it
            return {"stored": await run_in_threadpool(feedback.label_answer, *answer)}

    @routes.get("/feedback")
    def summary() -> dict[str, Any]:
        """How many labels there are, and the accuracy of the version that answers on the newest of them."""
        accuracy = feedback.accuracy(slot.model().classifier.version.id)
        return {**feedback.counts(), "accuracy": asdict(accuracy) if accuracy is not None else None}

    return routes
