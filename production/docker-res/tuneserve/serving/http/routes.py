"""Every route of ours. An adapter for a platform is like one of these functions: `routes(service) -> APIRouter`."""

import asyncio
import json
import math
import re
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from tuneserve.errors import (
    ForbiddenError,
    InvalidInputError,
    NotFoundError,
    TextError,
    TooLargeError,
    TuneserveError,
)
from tuneserve.lifecycle.trainer import Job, Trainer
from tuneserve.serving.http.front import NOT_UTF8, Handler, is_text
from tuneserve.serving.http.page import index_page
from tuneserve.serving.http.problems import RETRY_AFTER_S, Wording
from tuneserve.serving.http.request_log import Headers
from tuneserve.serving.http.schemas import FeedbackRequest, Health, Index, Problem, Readiness
from tuneserve.serving.model import Answer, Answers
from tuneserve.serving.service import Service
from tuneserve.tasks.task import Route, Task

CSV = "text/csv; charset=utf-8"
CSV_RESPONSE: dict[int | str, dict[str, Any]] = {200: {"content": {"text/csv": {"schema": {"type": "string"}}}}}
METRICS_RESPONSE: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
METRICS = "text/plain; version=0.0.4; charset=utf-8"

NO_MODEL: dict[str, Any] = {"model": Problem, "description": "No model can answer yet; see Retry-After."}

INFERENCE = "inference"
"""The tag of routes whose answers come from the model: they are refused before their body is read while it has no room,
and dropped when the client disconnects. An adapter's routes want it too."""

HEALTH = "health"
"""The tag of an adapter's routes that say whether the server is well, and that want no API key for it."""

MANY_ANSWERS = 256
"""Answers of one request that are too many to be written as JSON by the event loop."""

to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
"""Kept: `json.dumps` with options makes an encoder for each answer."""


class Direct(APIRoute):
    """A route whose function reads the request itself: FastAPI finds and describes it, and does nothing else."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The function as it is; its dependencies only stand in the description."""
        handler: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return handler


class Worded(APIRoute):
    """A route of an adapter that words errors in its own way, those too that the front raises before FastAPI is asked.

    An adapter makes a subclass that has a `wording`, as a staticmethod, and hands it to its APIRouter.
    """

    wording: ClassVar[Wording]


def inference_routes(service: Service, task: Task, responses: dict[int | str, dict[str, Any]]) -> APIRouter:
    """What the model is asked: each of the task's routes, with and without a slash at its end.

    Args:
        service: that answers.
        task: whose routes these are.
        responses: that each of them may have, for the description.
    """
    routes = APIRouter(route_class=Direct, tags=[INFERENCE])
    for route in task.routes:
        handler = answering(service, route)
        schema = {"application/json": {"schema": schema_of(route.request)}}
        routes.post(
            route.path,
            name=route.name,
            description=route.doc,
            responses={200: {"model": route.response}, **responses},
            openapi_extra={"requestBody": {"required": True, "content": schema}},
        )(handler)
        routes.post(f"{route.path}/", include_in_schema=False)(handler)
    return routes


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a body without references: none would be found from within the API's description."""
    schema = model.model_json_schema()
    known = schema.pop("$defs", {})

    def inlined(part: Any) -> Any:
        if isinstance(part, dict):
            return (
                inlined(known[part["$ref"].rpartition("/")[2]])
                if "$ref" in part
                else {name: inlined(one) for name, one in part.items()}
            )
        return [inlined(one) for one in part] if isinstance(part, list) else part

    found: dict[str, Any] = inlined(schema)
    return found


def answering(service: Service, route: Route) -> Handler:
    """The way from a request's body to its response."""
    max_inputs = service.max_inputs

    async def answer(request: Request) -> Response:
        wanted = read_body(route.request, await request.body())
        inputs = route.inputs(wanted)
        if len(inputs) > max_inputs:
            raise TooLargeError(f"The request has {len(inputs)} texts; {max_inputs} are the most this server takes.")
        timeout_s = wanted_s(request.scope["headers"], service.timeout_s)
        if (event := route.events(wanted)) is not None:
            return await streamed(service.stream(inputs[0], timeout_s=timeout_s), event, route.headers)
        if route.consult is not None:
            answers = await service.consult(partial(route.consult, wanted), timeout_s=timeout_s)
        else:
            answers = await service.answer(inputs, timeout_s=timeout_s, request_id=request.scope["state"]["request_id"])
        content = write(answers) if len(answers) < MANY_ANSWERS else await asyncio.to_thread(write, answers)
        return Response(content, headers=dict(route.headers(answers)), media_type="application/json")

    def write(answers: Answers) -> bytes:
        content = route.content(answers)
        return content if isinstance(content, bytes) else to_json(content).encode()

    return answer


async def streamed(
    pieces: AsyncGenerator[Answer],
    event: Callable[[Any, Any], Any],
    headers: Callable[[Answers], Mapping[str, str]],
) -> StreamingResponse:
    """An answer as server-sent events, as it comes to be. What goes wrong before the first is answered as usual.

    Args:
        pieces: the answer, again and again.
        event: makes the JSON of an event of an answer and the one before; see `Route`.
        headers: of the response, by the first.
    """
    try:
        first = await anext(pieces)
    except TextError as error:
        raise InvalidInputError((("body", "inputs", 0), str(error), "value_error")) from None

    async def lines() -> AsyncGenerator[bytes]:
        before, answer = None, first
        async with aclosing(pieces):
            try:
                yield event_of(event(answer, before))
                async for following in pieces:
                    before, answer = answer, following
                    yield event_of(event(answer, before))
            except TuneserveError as error:
                yield event_of({"error": str(error), "error_type": type(error).__name__})

    found = {"Cache-Control": "no-cache", **headers([first])}
    return StreamingResponse(lines(), headers=found, media_type="text/event-stream")


def event_of(content: Any) -> bytes:
    """A server-sent event of JSON."""
    return b"data:%b\n\n" % to_json(content).encode()


def read_body(schema: type[BaseModel], body: bytes) -> BaseModel:
    """A body as its schema wants it.

    Raises:
        InvalidInputError: it is not so.
    """
    try:
        try:
            return schema.model_validate_json(body)
        except ValidationError as error:
            if error.errors()[0]["type"] != "json_invalid":
                raise
            return schema.model_validate(_lenient(body, error))
    except ValidationError as error:
        raise invalid(error) from None


def invalid(error: ValidationError) -> InvalidInputError:
    """What a body's schema finds wrong with it."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    return InvalidInputError(*((("body", *_fields(one["loc"])), one["msg"], one["type"]) for one in found))


def _fields(loc: Sequence[int | str]) -> list[int | str]:
    """Where a fault is, without pydantic's own names for the members of a union, which say nothing to a client."""
    return [part for part in loc if not (isinstance(part, str) and "[" in part)]


def _lenient(body: bytes, error: ValidationError) -> Any:
    """JSON that Python reads and pydantic does not: halves of surrogate pairs, which are one text's fault.

    Raises:
        InvalidInputError: this is not even text.
    """
    if not is_text(body):
        raise InvalidInputError((("body",), NOT_UTF8, "json_invalid"))
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise error from None


def wanted_s(headers: Headers, timeout_s: float) -> float:
    """Seconds that a request may take: the client may ask for less than the server allows.

    Raises:
        InvalidInputError: it asks for what is no number of seconds.
    """
    asked = next((value for name, value in headers if name == b"x-request-timeout-s"), b"")
    if not asked:
        return timeout_s
    try:
        seconds = float(asked) if b"_" not in asked else math.nan  # Python's own way to write figures
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise InvalidInputError((("header", "X-Request-Timeout-S"), "should be seconds above 0", "value_error"))
    return min(seconds, timeout_s)


FEEDBACK_PROBLEMS: dict[int | str, dict[str, Any]] = {
    404: {"model": Problem, "description": "No such answer is remembered."},
    409: {"model": Problem, "description": "Several answers are remembered by this id."},
}


def feedback_routes(service: Service) -> APIRouter:
    """By which people say what was right; the work is done on threads, since it waits for the disk."""
    routes = APIRouter(tags=["feedback"], responses={503: {"model": Problem, "description": "Labels cannot be kept."}})

    @routes.post("/feedback", responses=FEEDBACK_PROBLEMS)
    async def give(wanted: FeedbackRequest, request: Request) -> dict[str, bool]:
        """Keep a label. When this is answered it is on disk; `stored` is false if just that was said before.

        Labels given to a server without an API key are kept apart: no model is trained or tested with them.
        """
        labels = service.model().labels
        if wanted.label not in labels:
            words = f"should be one of the model's labels: {', '.join(labels[:50])}"
            raise InvalidInputError((("body", "label"), words, "value_error"))
        stored = await service.label(
            wanted.label,
            text=wanted.text,
            request_id=wanted.request_id or "",
            index=wanted.index,
            client=request.client.host if request.client is not None else "",
        )
        return {"stored": stored}

    @routes.get("/feedback")
    def summary() -> dict[str, Any]:
        """How many labels there are, how many are kept apart, and the accuracy of the version that answers on them."""
        return service.labels_kept()

    return routes


def drift_routes(service: Service) -> APIRouter:
    """Whether the texts that are served are still like those the model was tested on."""
    routes = APIRouter(tags=["drift"], responses={503: NO_MODEL})

    @routes.get("/drift")
    def drift() -> dict[str, Any]:
        """Each figure with its threshold and what it means, of the last texts answered; a few seconds old at most."""
        monitor = service.monitor()
        return {"model_version": monitor.model_version, **asdict(monitor.report())}

    @routes.get("/drift/window", response_class=Response, responses=CSV_RESPONSE)
    def window() -> Response:
        """The answers to the last texts as CSV, a row each, and no text."""
        return Response(service.monitor().window_csv(), media_type=CSV)

    @routes.get("/drift/reference", response_class=Response, responses=CSV_RESPONSE)
    def reference() -> Response:
        """The answers that the window is compared with, in the same columns but for the time."""
        return Response(service.monitor().reference_csv(), media_type=CSV)

    return routes


RETRAIN_PROBLEMS: dict[int | str, dict[str, Any]] = {
    403: {"model": Problem, "description": "The server has no API key, without which nobody may start a training."},
    409: {"model": Problem, "description": "A training is running."},
}


def training_routes(trainer: Trainer, *, keyed: bool) -> APIRouter:
    """Of a server that also trains; `keyed` says whether it has an API key, without which nobody may start one."""
    routes = APIRouter(tags=["training"])

    def shown(job: Job) -> dict[str, Any]:
        running = trainer.running
        return asdict(job) | ({"progress": trainer.progress()} if running is not None and running.id == job.id else {})

    @routes.post("/retrain", status_code=202, responses=RETRAIN_PROBLEMS)
    def retrain(response: Response) -> dict[str, Any]:
        """Start a training beside the model that answers; 409 while one is running."""
        if not keyed:
            raise ForbiddenError("A training can only be asked for where API_KEY is set.")
        job = trainer.start("POST /retrain")
        response.headers["Location"] = f"/jobs/{job.id}"
        return asdict(job)

    @routes.get("/jobs")
    def jobs() -> list[dict[str, Any]]:
        """The trainings that this store's servers have started, newest first."""
        return [shown(job) for job in trainer.jobs()]

    @routes.get("/jobs/{name}", responses={404: {"model": Problem, "description": "There is no job of this name."}})
    def one_job(name: str) -> dict[str, Any]:
        """One training: how far it is, or how it ended."""
        job = trainer.job(name)
        if job is None:
            raise NotFoundError(f"There is no job {name!r}; GET /jobs lists them.")
        return shown(job)

    return routes


def model_routes(service: Service) -> APIRouter:
    """What the model says of itself."""
    routes = APIRouter(tags=["model"])

    @routes.get("/model", responses={503: NO_MODEL})
    async def model() -> dict[str, Any]:
        """The metadata of the version that answers: labels, settings, metrics, data, versions."""
        answering = service.model()
        return {"version": answering.id, **answering.metadata}

    return routes


WELCOME = "This is tuneserve. GET /docs describes what may be asked here."


def prefers_html(accept: str) -> bool:
    """Whether an Accept header names HTML, and JSON not before it; what names neither wants JSON."""
    weights = {"text/html": 0.0, "application/json": 0.0}
    for one in accept.split(","):
        kind, *parameters = (part.strip().lower() for part in one.split(";"))
        weight = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        if kind in weights:
            weights[kind] = float(weight) if re.fullmatch(r"[01](\.\d{0,3})?", weight) else 0.0
    return weights["text/html"] > weights["application/json"]


def operations_routes(service: Service, trainer: Trainer | None) -> APIRouter:
    """For whoever keeps the server running."""
    routes = APIRouter(tags=["operations"])

    @routes.get(
        "/livez", responses={503: {"model": Health, "description": "The engine or the store's follower failed."}}
    )
    async def livez(response: Response) -> Health:
        """Whether the process is worth keeping; 503 once the engine has died, or while the store cannot be followed."""
        if not service.is_alive():
            response.status_code = 503
            return Health(status="failed")
        return Health(status="alive")

    @routes.get(
        "/readyz",
        response_model_exclude_none=True,
        responses={503: {"model": Readiness, "description": "No model can answer yet; see Retry-After."}},
    )
    async def readyz(response: Response) -> Readiness:
        """Whether a model can answer; 503 until then, with how far the first training is."""
        if (phase := service.phase()) != "ready":
            response.status_code = 503
            response.headers["Retry-After"] = str(RETRY_AFTER_S)
            training = trainer.progress() if trainer is not None and phase == "empty" else {}
            return Readiness.model_validate({"phase": phase, "reason": service.reason(), **training})
        return Readiness(phase=phase, model_version=service.version_id())

    @routes.get("/metrics", response_class=Response, responses=METRICS_RESPONSE)
    def prometheus() -> Response:
        """Figures for Prometheus."""
        return Response(service.render_metrics(), media_type=METRICS)

    @routes.get(
        "/",
        response_model=Index,
        responses={
            200: {"content": {"text/html": {"schema": {"type": "string"}}}},
            503: {"model": Index, "description": "The engine or the store's follower failed."},
        },
    )
    async def index(request: Request) -> Response:
        """For a browser, by its Accept header, a page; for everybody else JSON that says whether the server is well."""
        varies = {"Vary": "Accept"}
        if prefers_html(request.headers.get("accept", "")):
            return index_page(request.scope.get("root_path", ""))
        alive = service.is_alive()
        about = Index(status="alive" if alive else "failed", message=WELCOME if alive else "The engine has failed.")
        return JSONResponse(about.model_dump(), 200 if alive else 503, headers=varies)

    return routes
