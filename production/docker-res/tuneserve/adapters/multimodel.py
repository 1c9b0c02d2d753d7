"""SageMaker's multi-model endpoints: models that are loaded, listed, asked and unloaded by name.

Source: "Build Your Own Container for SageMaker AI Multi-Model Endpoints", and the reference server's way to page and to
word errors. `POST /invocations` is for whoever is no platform and names the model in the header that callers know.
"""

import asyncio
import csv
import io
import json
from collections.abc import Callable, Coroutine, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field, StringConstraints, ValidationError

from tuneserve.errors import InvalidInputError, InvalidRequestError, TooLargeError, TuneserveError
from tuneserve.serving.http.routes import INFERENCE, to_json, wanted_s
from tuneserve.serving.model import Answers, Model
from tuneserve.serving.registry import Entry, Registry
from tuneserve.serving.service import Service
from tuneserve.tasks.catalog import TASKS
from tuneserve.tasks.task import Asked, Payload, Reply, only

PAGE = 100
"""Models that one answer lists."""

TARGET = "X-Amzn-SageMaker-Target-Model"
JSON = "application/json"
CSV = "text/csv"

Name = Annotated[str, StringConstraints(min_length=1, max_length=500, pattern=r"^[^/\x00-\x1f]+$")]


class LoadRequest(BaseModel):
    """A model's name, and the folder in which the platform has unpacked it; in MODELS its name says where it is."""

    model_name: Name
    url: Annotated[str, Field(max_length=4096, pattern=r"^[^\x00]*$")] = ""


class Spoken(APIRoute):
    """A route whose errors are as the platform and SageMaker's toolkit have them: `{"code", "type", "message"}`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See FastAPI."""
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except RequestValidationError as error:
                return _failed(400, error, "; ".join(f"{one['loc'][-1]}: {one['msg']}" for one in error.errors()[:5]))
            except InvalidInputError as error:
                faults = [f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.faults[:5]]
                return _failed(400, error, "; ".join(faults))
            except TuneserveError as error:
                headers = {"Retry-After": str(getattr(error, "retry_after_s", 5))} if error.status in (429, 503) else {}
                return _failed(error.status, error, str(error), headers)

        return answer


def routes(service: Service) -> APIRouter:
    """The platform's API over a service whose models come and go."""
    assert service.models is not None
    models: Registry = service.models
    router = APIRouter(route_class=Spoken, tags=["models"])

    @router.get("/ping")
    async def ping() -> Response:
        """Whether the server is there; it needs no model for that."""
        return Response()

    @router.post("/models")
    async def load(wanted: LoadRequest) -> dict[str, str]:
        """Load a model; answered once it can be asked."""
        try:
            await asyncio.shield(asyncio.wrap_future(models.load(*models.locate(wanted.model_name, wanted.url))))
        except TuneserveError as error:
            if error.status != 500:
                raise
            raise InvalidRequestError(str(error)) from None  # the model is to blame, and that is the caller's
        return {"status": f"The model {wanted.model_name!r} is loaded."}

    @router.get("/models")
    def listed(next_page_token: str = "") -> dict[str, Any]:
        """The models that are loaded, by name, a hundred at a time; `next_page_token` is the last answer's."""
        left = [one for one in models.entries() if one.name > next_page_token]
        page: dict[str, Any] = {"models": [_shown(models, one) for one in left[:PAGE]]}
        if len(left) > PAGE:
            page["nextPageToken"] = left[PAGE - 1].name
        return page | {"memory": {"used": models.used(), "limit": models.limit, "evictions": models.evicted}}

    @router.get("/models/{name}")
    async def one_model(name: str) -> dict[str, Any]:
        """One of them."""
        return _shown(models, models.entry(name))

    @router.delete("/models/{name}")
    async def unload(name: str) -> dict[str, str]:
        """Unload a model; answered once its memory is given back."""
        await asyncio.shield(asyncio.wrap_future(models.unload(models.entry(name).name)))
        return {"status": f"The model {name!r} is unloaded."}

    async def invoke(name: str, request: Request) -> Response:
        call = Call(await request.body(), request.headers, service.max_inputs)
        answers = await service.answer(
            call.inputs,
            timeout_s=wanted_s(request.scope["headers"], service.timeout_s),
            request_id=request.scope["state"]["request_id"],
            name=name,
        )
        return call.response(answers)

    @router.post("/models/{name}/invoke", tags=[INFERENCE])
    async def invoke_by_path(name: str, request: Request) -> Response:
        """Ask a model in the form of Hugging Face's pipelines: `{"inputs", "parameters"}`, or CSV with such a head."""
        return await invoke(name, request)

    @router.post("/invocations", tags=[INFERENCE])
    async def invoke_by_header(request: Request) -> Response:
        """The same; the header X-Amzn-SageMaker-Target-Model names the model."""
        if not (name := request.headers.get(TARGET, "")):
            raise InvalidRequestError(f"The header {TARGET} says which model is asked; GET /models lists them.")
        return await invoke(name, request)

    return router


class Call:
    """One request to a model of which only the name is known until it is held."""

    def __init__(self, body: bytes, headers: Mapping[str, str], max_inputs: int) -> None:
        self._body, self._max_inputs = body, max_inputs
        self._type = headers.get("Content-Type") or JSON
        self._accept = headers.get("Accept") or "*/*"
        self._asked: Asked | None = None

    def inputs(self, model: Model) -> list[Any]:
        """What this model is asked.

        Raises:
            InvalidInputError: that is not to be read in the body.
            TooLargeError: it is too much.
        """
        task = TASKS.get(model.task)
        if task is None or task.ask is None:
            return [Payload(self._body, self._type, self._accept)]
        try:
            self._asked = task.ask(read(self._body, self._type))
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False, include_context=False)
            raise InvalidInputError(*((("body", *one["loc"]), one["msg"], one["type"]) for one in found)) from None
        inputs = list(self._asked.inputs)
        if len(inputs) > self._max_inputs:
            raise TooLargeError(f"The request has {len(inputs)} inputs; {self._max_inputs} are the most.")
        return inputs

    def response(self, answers: Answers) -> Response:
        """What is made of the answers."""
        if self._asked is None:
            reply = only(answers, "")
            assert isinstance(reply, Reply)
            return Response(reply.body, media_type=reply.content_type)
        content = self._asked.content(answers)
        return Response(content if isinstance(content, bytes) else to_json(content), media_type=JSON)


def read(body: bytes, content_type: str) -> Mapping[str, Any]:
    """`{"inputs", "parameters"}` of a body, as SageMaker's toolkit decodes it.

    Other keys are dropped, and what has no `inputs` is them itself.

    Raises:
        InvalidInputError: it is not to be read.
    """
    kind = content_type.partition(";")[0].strip().lower()
    try:
        text = body.decode()
        if kind == CSV:
            rows = list(csv.DictReader(io.StringIO(text), strict=True))
            if not rows or "inputs" not in rows[0]:
                raise ValueError("a table has a row `inputs` for its head, and a text in each row below")
            return {"inputs": [row["inputs"] for row in rows]}
        if kind not in (JSON, "application/x-www-form-urlencoded"):  # the latter is what curl says of anything
            raise ValueError(f"this model reads {JSON} and {CSV}, not {kind[:100]}")
        found = json.loads(text)
    except (ValueError, RecursionError, csv.Error) as error:
        raise InvalidInputError((("body", "content"), str(error)[:200], "value_error")) from None
    if not isinstance(found, dict) or "inputs" not in found:
        return {"inputs": found}
    return {name: found[name] for name in ("inputs", "parameters") if name in found}


def _shown(models: Registry, entry: Entry) -> dict[str, Any]:
    task = entry.slot.model().task if entry.slot is not None and entry.slot.ready is not None else None
    return {
        "modelName": entry.name,
        "modelUrl": str(entry.folder),
        "state": entry.state,
        "task": task,
        "bytes": entry.bytes,
        "hits": entry.hits,
        "pinned": entry.name in models.pinned,
    }


def _failed(status: int, error: Exception, message: str, headers: Mapping[str, str] | None = None) -> Response:
    content = {"code": status, "type": type(error).__name__, "message": message}
    return Response(to_json(content), status, headers=dict(headers or {}), media_type=JSON)
