"""The HTTP application: the front, and behind it the routes over a service."""

import socket
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader, HTTPBearer
from fastapi.telemetry import TelemetryConfig
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Lifespan

import tuneserve
from tuneserve.errors import TuneserveError
from tuneserve.lifecycle.store import Store
from tuneserve.lifecycle.trainer import Trainer
from tuneserve.serving.http.backoff import Backoff
from tuneserve.serving.http.events import events_routes
from tuneserve.serving.http.front import NOSNIFF, OPEN_PATHS, Drain, Front
from tuneserve.serving.http.labelling import labelling_routes
from tuneserve.serving.http.page import page_routes
from tuneserve.serving.http.problems import wording_by
from tuneserve.serving.http.request_log import REQUEST_ID, RequestLog, request_id_of
from tuneserve.serving.http.routes import (
    HEALTH,
    INFERENCE,
    NO_MODEL,
    Direct,
    Worded,
    drift_routes,
    feedback_routes,
    inference_routes,
    model_routes,
    operations_routes,
    training_routes,
)
from tuneserve.serving.http.schemas import Problem, Problems
from tuneserve.serving.http.traces import SILENT
from tuneserve.serving.http.versions import version_routes
from tuneserve.serving.http.viewer import viewer_routes
from tuneserve.serving.service import Service
from tuneserve.settings import Settings
from tuneserve.tasks.task import Task

Adapter = Callable[[Service], APIRouter]
"""A platform's routes over the service."""

KEYS = [Security(HTTPBearer(auto_error=False)), Security(APIKeyHeader(name="X-API-Key", auto_error=False))]
"""How the API's description says what a key is shown in."""

COMMON: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The request is not HTTP, or not JSON where it should be."},
    401: {"model": Problem, "description": "The API key is not there or not right, where one is wanted."},
    408: {"model": Problem, "description": "The body did not come in time."},
    413: {"model": Problem, "description": "The request is larger than this server takes."},
    415: {"model": Problem, "description": "The body's Content-Encoding is another than gzip."},
    422: {"model": Problems, "description": "The request is not as it should be; each fault is named."},
    429: {"model": Problem, "description": "Too much waits; Retry-After says for how long."},
    431: {"model": Problem, "description": "The headers are larger than this server takes."},
    500: {"model": Problem, "description": "Something went wrong inside, or the model gave no number."},
    501: {"model": Problem, "description": "The body's Transfer-Encoding is another than chunked."},
    503: {"model": Problem, "description": "The server is about to end; see Retry-After."},
}
"""What any request may be answered."""

SUMMARIES = {"text-classification": "A text classifier, fine-tuned and served by one container."}

PROBLEMS: dict[int | str, dict[str, Any]] = {
    503: NO_MODEL,
    504: {"model": Problem, "description": "There was no answer in time."},
}


def described(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The statuses that any request may have, for the description of an adapter's routes, whose errors are these."""
    return {status: {**one, "model": model} for status, one in {**COMMON, **PROBLEMS}.items()}


def leave_first(routers: Sequence[APIRouter]) -> None:
    """Take out of the routers what an earlier one answers already: an adapter that was asked for replaces a route."""
    taken: set[tuple[str, str]] = set()
    for router in routers:
        for route in list(router.routes):
            keys = {(route.path, method) for method in route.methods or ()} if isinstance(route, APIRoute) else set()
            if keys & taken:
                router.routes.remove(route)
            taken |= keys


class Cors(CORSMiddleware):
    """Starlette's, whose own answers to preflights have what all answers have."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """See Starlette."""
        response = super().preflight_response(request_headers)
        response.raw_headers += [NOSNIFF, (REQUEST_ID, request_id_of(request_headers.raw))]
        return response


def create_app(
    settings: Settings,
    service: Service,
    task: Task | None,
    trainer: Trainer | None = None,
    *,
    adapters: Sequence[Adapter] = (),
    lifespan: Lifespan[FastAPI] | None = None,
    telemetry: TelemetryConfig = SILENT,
    drain: Drain | None = None,
    listener: socket.socket | None = None,
    store: Store | None = None,
) -> FastAPI:
    """The ASGI application; it loads no model.

    Args:
        settings: of the server.
        service: that answers.
        task: whose routes there are; None where all models come and go, and the adapters ask them.
        trainer: that `POST /retrain` asks; None for a server that only serves.
        adapters: of the platforms that this server speaks to.
        lifespan: of the application.
        telemetry: FastAPI's, which makes the spans of requests.
        drain: told when the server shuts down.
        listener: the socket on which connections arrive, if it is known.
        store: whose champion answers; None where no version may be chosen.
    """
    drain = drain or Drain()
    key = settings.api_key.get_secret_value().encode()
    app = FastAPI(
        title="tuneserve",
        version=tuneserve.__version__,
        summary=SUMMARIES.get(task.name, f"A model for {task.name}, served by one container.")
        if task is not None
        else "Many models, served by one container.",
        lifespan=lifespan,
        responses=COMMON,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry=telemetry,
    )
    routers = [
        *(adapter(service) for adapter in adapters),
        *([inference_routes(service, task, PROBLEMS)] if task is not None else []),
        *([model_routes(service)] if task is not None else []),
        viewer_routes(),
        page_routes(),
    ]
    if task is not None and task.labels:
        routers.append(drift_routes(service))
    if service.feedback is not None:
        routers += [feedback_routes(service), labelling_routes(service, keyed=bool(key))]
    if trainer is not None:
        routers.append(training_routes(trainer, keyed=bool(key)))
    if store is not None and task is not None:
        routers.append(version_routes(service, store, task, keyed=bool(key)))
    if task is not None:
        routers.append(events_routes(service, trainer, key=key, task=task, drain=drain))
    operations = operations_routes(service, trainer)
    leave_first([*routers, operations])
    for router in routers:
        app.include_router(router, dependencies=KEYS)
    app.include_router(operations)
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    models = [route for route in routes if INFERENCE in route.tags]
    wording = wording_by((route.path_regex, route.wording) for route in routes if isinstance(route, Worded))
    app.add_middleware(
        Front,
        model_paths=frozenset(route.path for route in models),
        named_routes=[route for route in models if route.param_convertors],
        # FastAPI's router names the spans, so where there are some it is FastAPI that finds the handlers.
        handlers={one.path: one.endpoint for one in models if isinstance(one, Direct)} if telemetry == SILENT else {},
        room=service.room,
        wording=wording,
        backoff=Backoff(service.drain_s, listener),
        request_log=RequestLog(service.metrics, logs=settings.access_log),
        drain=drain,
        key=key,
        open_paths=OPEN_PATHS.union(route.path for route in routes if HEALTH in route.tags)
        if settings.api_key_guards == "api"
        else frozenset(),
        max_body_bytes=settings.max_body_kb * 1024,
        timeout_s=settings.request_timeout_s,
    )

    if settings.cors_origins:  # around the front: a browser's preflight brings no key, and its answer needs none
        app.add_middleware(
            Cors,
            allow_origins=settings.cors_origins.split(","),
            allow_methods=["GET", "POST"],
            allow_headers=[
                "Authorization",
                "Content-Encoding",
                "Content-Type",
                "X-API-Key",
                "X-Request-Id",
                "X-Request-Timeout-S",
            ],
            expose_headers=["Location", "Retry-After", "X-Request-Id"],
        )

    @app.exception_handler(TuneserveError)
    async def known(request: Request, error: TuneserveError) -> Response:
        return wording(request.scope["path"])(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return wording(request.scope["path"])(error)

    return app
