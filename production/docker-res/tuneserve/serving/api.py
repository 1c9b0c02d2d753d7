"""The HTTP API over a slot: routes, and every error's translation."""

import hmac
import logging
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.types import Lifespan

import tuneserve
from tuneserve.errors import TooLargeError, TuneserveError, UnauthorizedError
from tuneserve.serving.classifier import Prediction
from tuneserve.serving.metrics import Metrics
from tuneserve.serving.middleware import BodyLimit, Stopwatch
from tuneserve.serving.schemas import (
    BatchRequest,
    BatchResponse,
    InferenceRequest,
    PredictionResponse,
    Problem,
    Readiness,
)
from tuneserve.serving.slot import Slot
from tuneserve.serving.turns import Turns
from tuneserve.settings import Settings

logger = logging.getLogger(__name__)

SHOWN_PROBLEMS = 20
"""Most problems that a 422 lists."""

RETRY_AFTER_S = {429: "1", 503: "5"}


def create_app(settings: Settings, slot: Slot, *, lifespan: Lifespan[FastAPI] | None = None) -> FastAPI:
    """The ASGI application; it does not load the model, whoever made the slot does."""
    metrics = Metrics()
    turns = Turns(max_waiting=settings.max_waiting)
    key = settings.api_key.get_secret_value()

    async def authorize(
        bearer: Annotated[HTTPAuthorizationCredentials | None, Security(HTTPBearer(auto_error=False))],
        header: Annotated[str | None, Security(APIKeyHeader(name="X-API-Key", auto_error=False))],
    ) -> None:
        shown = [one.encode("latin-1") for one in (bearer and bearer.credentials, header) if one]  # as headers are read
        if key and not any(hmac.compare_digest(one, key.encode()) for one in shown):
            raise UnauthorizedError("This server wants its API key as `Authorization: Bearer ...` or `X-API-Key`.")

    async def predict(texts: Sequence[str]) -> list[Prediction]:
        classifier = slot.classifier()
        return await turns.run(lambda: classifier.predict(texts))

    problems: dict[int | str, dict[str, Any]] = {
        413: {"model": Problem, "description": "The request is larger than this server takes."},
        429: {"model": Problem, "description": "Too many requests are waiting; see Retry-After."},
        503: {"model": Problem, "description": "No model can answer yet; see Retry-After."},
    }
    app = FastAPI(
        title="tuneserve",
        version=tuneserve.__version__,
        summary="A text classifier, fine-tuned and served by one container.",
        lifespan=lifespan,
    )
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_kb * 1024)
    app.add_middleware(Stopwatch, metrics=metrics)
    _translate_errors(app)
    guarded = [Depends(authorize)]

    @app.post("/inference/", include_in_schema=False, dependencies=guarded, response_model=PredictionResponse)
    @app.post(
        "/inference", tags=["inference"], dependencies=guarded, responses=problems, response_model=PredictionResponse
    )
    async def inference(request: InferenceRequest) -> Prediction:
        """Classify one text."""
        return (await predict([request.text]))[0]

    @app.post("/inference/batch/", include_in_schema=False, dependencies=guarded, response_model=BatchResponse)
    @app.post(
        "/inference/batch", tags=["inference"], dependencies=guarded, responses=problems, response_model=BatchResponse
    )
    async def inference_batch(request: BatchRequest) -> dict[str, list[Prediction]]:
        """Classify several texts; the predictions come in their order."""
        if len(request.texts) > settings.max_batch_texts:
            raise TooLargeError(f"{len(request.texts)} texts; {settings.max_batch_texts} in one request are the most.")
        return {"predictions": await predict(request.texts)}

    @app.get("/model", tags=["model"], dependencies=guarded, responses={503: problems[503]})
    async def model() -> dict[str, Any]:
        """The metadata of the version that answers: labels, settings, metrics, data, versions."""
        version = slot.classifier().version
        return {"version": version.id, **version.metadata}

    @app.head("/livez", include_in_schema=False)
    @app.get("/livez", tags=["operations"])
    async def livez() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "alive"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", tags=["operations"], responses={503: {"model": Readiness}})
    async def readyz(response: Response) -> Readiness:
        """Whether a model can answer; 503 until then."""
        if slot.phase != "ready":
            response.status_code = 503
            response.headers["Retry-After"] = RETRY_AFTER_S[503]
            return Readiness(phase=slot.phase)
        return Readiness(phase=slot.phase, model_version=slot.classifier().version.id)

    @app.get("/metrics", tags=["operations"])
    async def prometheus() -> Response:
        """Figures for Prometheus."""
        metrics.model.clear()
        if slot.phase == "ready":
            metrics.model.labels(slot.classifier().version.id).set(1)
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> dict[str, str]:
        return {"name": "tuneserve", "version": tuneserve.__version__, "docs": "/docs", "model": "/model"}

    return app


def _translate_errors(app: FastAPI) -> None:
    @app.exception_handler(TuneserveError)
    async def known(request: Request, error: TuneserveError) -> JSONResponse:
        headers = {}
        if error.status in RETRY_AFTER_S:
            headers["Retry-After"] = RETRY_AFTER_S[error.status]
        if isinstance(error, UnauthorizedError):
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"detail": str(error)}, status_code=error.status, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # What was sent is left out: it may be private, and large.
        detail = [{key: item[key] for key in ("loc", "msg", "type")} for item in error.errors()[:SHOWN_PROBLEMS]]
        return JSONResponse({"detail": detail}, status_code=422)

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": "Something went wrong inside; the server's log says what."}, status_code=500)
