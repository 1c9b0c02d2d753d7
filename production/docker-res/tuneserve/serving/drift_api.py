"""Routes that say whether the texts that are served are still like those the model was tested on."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Response

from tuneserve.serving.slot import Slot

CSV = "text/csv; charset=utf-8"


def drift_routes(slot: Slot) -> APIRouter:
    """The routes. They are no coroutines, so that threads of their own answer them."""
    routes = APIRouter(tags=["drift"])

    @routes.get("/drift")
    def drift() -> dict[str, Any]:
        """Each figure with its threshold and what it means, of the last texts answered; a few seconds old at most."""
        model = slot.model()
        return {"model_version": model.classifier.version.id, **asdict(model.monitor.report())}

    @routes.get("/drift/window", response_class=Response, responses={200: {"content": {"text/csv": {}}}})
    def window() -> Response:
        """The answers to the last texts as CSV, a row each, and no text."""
        return Response(slot.model().monitor.window_csv(), media_type=CSV)

    @routes.get("/drift/reference", response_class=Response, responses={200: {"content": {"text/csv": {}}}})
    def reference() -> Response:
        """The answers that the window is compared with, in the same columns but for the time."""
        return Response(slot.model().monitor.reference_csv(), media_type=CSV)

    return routes
