"""SageMaker's multi-model endpoints: models that are loaded, listed, asked and unloaded by name.

Source: "Build Your Own Container for SageMaker AI Multi-Model Endpoints", and the reference server's way to page and to
word errors. `POST /invocations` is for whoever is no platform and names the model in the header that callers know.
"""

import asyncio
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, StringConstraints

from tuneserve.adapters.invocations import PlatformRoute, answered
from tuneserve.errors import InvalidRequestError, TuneserveError
from tuneserve.serving.http.routes import INFERENCE
from tuneserve.serving.registry import Entry, Registry
from tuneserve.serving.service import Service

PAGE = 100
"""Models that one answer lists."""

TARGET = "X-Amzn-SageMaker-Target-Model"

Name = Annotated[str, StringConstraints(min_length=1, max_length=500, pattern=r"^[^/\x00-\x1f]+$")]


class LoadRequest(BaseModel):
    """A model's name, and the folder in which the platform has unpacked it; in MODELS its name says where it is."""

    model_name: Name
    url: Annotated[str, Field(max_length=4096, pattern=r"^[^\x00]*$")] = ""


def routes(service: Service) -> APIRouter:
    """The platform's API over a service whose models come and go."""
    assert service.models is not None
    models: Registry = service.models
    router = APIRouter(route_class=PlatformRoute, tags=["models"])

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

    @router.post("/models/{name}/invoke", tags=[INFERENCE])
    async def invoke_by_path(name: str, request: Request) -> Response:
        """Ask a model in the form of Hugging Face's pipelines: `{"inputs", "parameters"}`, or CSV with such a head."""
        return await answered(service, request, name=name)

    @router.post("/invocations", tags=[INFERENCE])
    async def invoke_by_header(request: Request) -> Response:
        """The same; the header X-Amzn-SageMaker-Target-Model names the model."""
        if not (name := request.headers.get(TARGET, "")):
            raise InvalidRequestError(f"The header {TARGET} says which model is asked; GET /models lists them.")
        with suppress(UnicodeError):  # HTTP's headers are read as Latin-1, and names of files are UTF-8
            name = name.encode("latin-1").decode()
        return await answered(service, request, name=name)

    return router


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
