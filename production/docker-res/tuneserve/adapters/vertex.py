"""Vertex AI's prediction containers: a health and a prediction route, where `AIP_*` says; `AIP_HTTP_PORT` is the port.

Source: "Custom container requirements for inference". A request has `{"instances", "parameters"}`, as the Open
Inference Protocol's version 1 has it, and no more.
"""

from fastapi import APIRouter, Request, Response

from tuneserve.adapters.openinference import (
    Failure,
    Inferred,
    PredictRequest,
    PredictResponse,
    Ready,
    Said,
    body_of,
    predicted,
)
from tuneserve.serving.http.app import described
from tuneserve.serving.http.routes import HEALTH, INFERENCE
from tuneserve.serving.service import Service


def routes(service: Service, *, health: str, predict: str) -> APIRouter:
    """The two routes, each where it has a path."""
    router = APIRouter(route_class=Said, tags=["vertex"])
    health, predict = (path and (path.rstrip("/") or "/") for path in (health, predict))  # as the front has them
    if health:

        @router.get(health, tags=[HEALTH], name="vertex_health", responses={503: {"model": Ready}})
        async def ready(response: Response) -> Ready:
            """Whether a model can answer."""
            response.status_code = 200 if (found := service.phase() == "ready") else 503
            return Ready(ready=found)

    async def answer(request: Request) -> Response:
        """Ask the model; a bad text's prediction is its error."""
        return await predicted(service, request)

    if predict:
        router.add_api_route(
            predict,
            answer,
            methods=["POST"],
            tags=[INFERENCE],
            name="vertex_predict",
            responses={**described(Failure), 200: {"model": PredictResponse}},
            openapi_extra=body_of(PredictRequest),
            route_class_override=Inferred,
        )
    return router
