"""The HTTP API over a slot: its routes."""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader, HTTPBearer
from fastapi.telemetry import TelemetryConfig
from pydantic import BaseModel
from starlette.types import Lifespan

import tuneserve
from tuneserve.errors import TuneserveError
from tuneserve.lifecycle.feedback import Feedback
from tuneserve.lifecycle.trainer import Trainer
from tuneserve.serving.backpressure import Backoff, Backpressure
from tuneserve.serving.drift_api import drift_routes
from tuneserve.serving.feedback_api import feedback_routes
from tuneserve.serving.front import OPEN_PATHS, Drain, Front, Handler
from tuneserve.serving.inference import Inference
from tuneserve.serving.problems import RETRY_AFTER_S, problem
from tuneserve.serving.request_log import RequestLog
from tuneserve.serving.schemas import (
    BatchRequest,
    BatchResponse,
    InferenceRequest,
    PredictionResponse,
    Problem,
    Problems,
    Readiness,
)
from tuneserve.serving.slot import Slot
from tuneserve.serving.traces import SILENT
from tuneserve.serving.training_api import training_routes
from tuneserve.settings import Settings

KEYS = [Security(HTTPBearer(auto_error=False)), Security(APIKeyHeader(name="X-API-Key", auto_error=False))]
"""How the API's description says what a key is shown in."""


class Direct(APIRoute):
    """A route whose function reads the request itself: FastAPI finds and describes it, and does nothing else."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The function as it is; its dependencies only stand in the description."""
        handler: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return handler


def create_app(
    settings: Settings,
    slot: Slot,
    trainer: Trainer | None = None,
    feedback: Feedback | None = None,
    *,
    lifespan: Lifespan[FastAPI] | None = None,
    telemetry: TelemetryConfig = SILENT,
    drain: Drain | None = None,
    listener: socket.socket | None = None,
) -> FastAPI:
    """The ASGI application; it loads no model, whoever fills the slot does.

    Args:
        settings: of the server.
        slot: whose model answers.
        trainer: that `POST /retrain` asks; None for a server that only serves.
        feedback: where answers are remembered and labels kept; None for nowhere.
        lifespan: of the application.
        telemetry: FastAPI's, which makes the spans of requests.
        drain: told when the server shuts down.
        listener: the socket on which connections arrive, if it is known.
    """
    metrics = slot.metrics
    inference = Inference(settings, slot, feedback)
    key = settings.api_key.get_secret_value().encode()
    problems: dict[int | str, dict[str, Any]] = {
        401: {"model": Problem, "description": "The API key is not there or not right, where one is wanted."},
        408: {"model": Problem, "description": "The body did not come in time."},
        413: {"model": Problem, "description": "The request is larger than this server takes."},
        422: {"model": Problems, "description": "The request is not as it should be; each fault is named."},
        429: {"model": Problem, "description": "Too much waits; Retry-After says for how long."},
        500: {"model": Problem, "description": "Something went wrong inside, or the model gave no number."},
        503: {"model": Problem, "description": "No model can answer yet; see Retry-After."},
        504: {"model": Problem, "description": "There was no answer in time."},
    }
    app = FastAPI(
        title="tuneserve",
        version=tuneserve.__version__,
        summary="A text classifier, fine-tuned and served by one container.",
        lifespan=lifespan,
        telemetry=telemetry,
    )

    handlers: dict[str, Handler] = {}
    backpressure = Backpressure(slot)
    app.add_middleware(
        Front,
        # FastAPI's router names the spans, so where there are some it is FastAPI that finds the handlers.
        handlers=handlers if telemetry == SILENT else {},
        backpressure=backpressure,
        backoff=Backoff(backpressure, listener),
        request_log=RequestLog(metrics, logs=settings.access_log),
        drain=drain or Drain(),
        key=key,
        open_paths=OPEN_PATHS if settings.api_key_guards == "api" else frozenset(),
        max_body_bytes=settings.max_body_kb * 1024,
        timeout_s=settings.request_timeout_s,
    )
    _translate_errors(app)
    direct = APIRouter(route_class=Direct, tags=["inference"], dependencies=KEYS)
    for path, handler, answer, schema in (
        ("/inference", inference.one, PredictionResponse, InferenceRequest),
        ("/inference/batch", inference.batch, BatchResponse, BatchRequest),
    ):
        about: dict[str, Any] = {"responses": {200: {"model": answer}, **problems}, "openapi_extra": _body(schema)}
        direct.post(path, **about)(handler)
        direct.post(f"{path}/", include_in_schema=False)(handler)
        handlers |= {path: handler, f"{path}/": handler}
    app.include_router(direct)

    @app.get("/model", tags=["model"], dependencies=KEYS, responses={503: problems[503]})
    async def model() -> dict[str, Any]:
        """The metadata of the version that answers: labels, settings, metrics, data, versions."""
        version = slot.model().classifier.version
        return {"version": version.id, **version.metadata}

    @app.get("/livez", tags=["operations"])
    async def livez(response: Response) -> dict[str, str]:
        """Whether the process is worth keeping; 503 once the engine has died."""
        if slot.phase == "failed":
            response.status_code = 503
            return {"status": "failed"}
        return {"status": "alive"}

    @app.get("/readyz", tags=["operations"], response_model_exclude_none=True, responses={503: {"model": Readiness}})
    async def readyz(response: Response) -> Readiness:
        """Whether a model can answer; 503 until then, with how far the first training is."""
        if slot.phase != "ready":
            response.status_code = 503
            response.headers["Retry-After"] = str(RETRY_AFTER_S)
            training = trainer.progress() if trainer is not None and slot.phase == "empty" else {}
            return Readiness.model_validate({"phase": slot.phase, **training})
        return Readiness(phase=slot.phase, model_version=slot.model().classifier.version.id)

    if feedback is not None:
        app.include_router(feedback_routes(feedback, slot), dependencies=KEYS)
    app.include_router(drift_routes(slot), dependencies=KEYS, responses={503: problems[503]})
    if trainer is not None:
        app.include_router(training_routes(trainer, keyed=bool(key)), dependencies=KEYS)

    @app.get("/metrics", tags=["operations"])
    async def prometheus() -> Response:
        """Figures for Prometheus."""
        report = None
        if slot.phase == "ready":
            report = await asyncio.to_thread(slot.model().monitor.report)
        metrics.model.clear()
        if report is not None and slot.phase == "ready":
            model = slot.model()
            metrics.model.labels(model.classifier.version.id).set(1)
            metrics.queue_tokens.set(model.batcher.tokens_waiting)
            if feedback is not None:
                await asyncio.to_thread(metrics.show_feedback, feedback, model.classifier.version.id)
            metrics.show_drift(report)
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> dict[str, str]:
        return {"name": "tuneserve", "version": tuneserve.__version__, "docs": "/docs", "model": "/model"}

    return app


def _body(schema: type[BaseModel]) -> dict[str, Any]:
    """What the API's description says of a body that the route reads itself."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema.model_json_schema()}}}}


def _translate_errors(app: FastAPI) -> None:
    @app.exception_handler(TuneserveError)
    async def known(request: Request, error: TuneserveError) -> Response:
        return problem(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return problem(error)
