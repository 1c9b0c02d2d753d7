"""`GET /label/next`: the texts whose labels would teach the most. Their labels come back by `POST /feedback`."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query

from tuneserve.errors import ForbiddenError
from tuneserve.serving.http.schemas import Problem, SuggestionsResponse
from tuneserve.serving.labelling import suggest
from tuneserve.serving.service import Service

MOST_AT_ONCE = 50
MOST_SKIPPED = 200

LABEL_PROBLEMS: dict[int | str, dict[str, Any]] = {
    403: {"model": Problem, "description": "The server has no API key, without which it shows nobody's texts."},
    409: {"model": Problem, "description": "The server keeps no texts: KEEP_TEXTS is not set."},
    503: {"model": Problem, "description": "No model can answer yet, or the texts cannot be read."},
}


def labelling_routes(service: Service, *, keyed: bool) -> APIRouter:
    """Of a server that keeps texts; `keyed` says whether it has an API key, without which nobody may see them."""
    routes = APIRouter(tags=["feedback"])

    @routes.get("/label/next", response_model=SuggestionsResponse, responses=LABEL_PROBLEMS)
    async def following(
        count: Annotated[int, Query(ge=1, le=MOST_AT_ONCE)] = 20,
        skip: Annotated[int, Query(ge=0, le=MOST_SKIPPED, description="How many of the best are left out.")] = 0,
    ) -> dict[str, Any]:
        """Texts that were answered and have no label: unsure ones, like many others, and unlike each other."""
        if not keyed:
            raise ForbiddenError("Texts are only shown where API_KEY is set.")
        return asdict(await suggest(service, count, skip))

    return routes
