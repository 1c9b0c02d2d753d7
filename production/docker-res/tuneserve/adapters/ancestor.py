"""What two of the systems answered that this project grew from: the first, and the serverless classifier."""

from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, RootModel

from tuneserve.adapters.openinference import body_of
from tuneserve.errors import TuneserveError, UnauthorizedError
from tuneserve.serving.http.app import PROBLEMS, described
from tuneserve.serving.http.problems import headers_of
from tuneserve.serving.http.routes import INFERENCE, Direct, Worded, inference_routes, read_body, wanted_s
from tuneserve.serving.model import Answers
from tuneserve.serving.service import Service
from tuneserve.tasks.classification import CLASSIFICATION, Text
from tuneserve.tasks.classifier import Prediction
from tuneserve.tasks.task import only

DECIMALS = 4

CORS = {"Access-Control-Allow-Origin": "*", "Access-Control-Allow-Credentials": "true"}
"""Headers of all that the serverless classifier answered."""


class FlatReply(RootModel[dict[str, str]]):
    """Each label's probability, by falling probability: `{"positive": "0.98", "negative": "0.02"}`."""


def routes(service: Service) -> APIRouter:
    """`POST /inference` with each label's probability as a string and nothing else, in the place of the task's own."""
    [one] = [route for route in CLASSIFICATION.routes if route.path == "/inference"]
    task = replace(CLASSIFICATION, routes=[replace(one, response=FlatReply, content=flat)])
    return inference_routes(service, task, PROBLEMS)


def flat(answers: Answers) -> dict[str, Any]:
    """The reply to one text."""
    answer = only(answers, "text")
    assert isinstance(answer, Prediction)
    ranked = sorted(answer.scores.items(), key=lambda pair: -pair[1])
    return {label: str(round(score, DECIMALS)) for label, score in ranked}


class LogRequest(BaseModel):
    """A text, such as the line of a bank's statement."""

    log: Text


class LogReply(BaseModel):
    """Its class."""

    prediction: str


class LogFailure(BaseModel):
    """Whatever went wrong."""

    error: str


def failed(error: TuneserveError | RequestValidationError, *, close: bool = False) -> Response:
    """An error as the serverless classifier worded it: 500, with the exception as Python shows it; see `Wording`.

    Only a missing key, of which it knew nothing, is still a 401.
    """
    status = error.status if isinstance(error, UnauthorizedError) else 500
    return JSONResponse({"error": repr(error)}, status, headers={**headers_of(error, close=close), **CORS})


class Logged(Worded, Direct):
    """A route whose errors are the serverless classifier's."""

    wording = staticmethod(failed)


def serverless_routes(service: Service, *, path: str) -> APIRouter:
    """The serverless classifier's only route, at a path."""
    router = APIRouter(tags=[INFERENCE])

    async def answer(request: Request) -> Response:
        """Classify one text."""
        wanted = read_body(LogRequest, await request.body())
        assert isinstance(wanted, LogRequest)
        timeout_s = wanted_s(request.scope["headers"], service.timeout_s)
        answers = await service.answer([wanted.log], timeout_s=timeout_s, request_id=request.state.request_id)
        found = only(answers, "log")
        assert isinstance(found, Prediction)
        return JSONResponse({"prediction": found.label}, headers=CORS)

    router.add_api_route(
        path.rstrip("/") or "/",  # as the front has it
        answer,
        methods=["POST"],
        name="serverless",
        responses={**described(LogFailure), 200: {"model": LogReply}},
        openapi_extra=body_of(LogRequest),
        route_class_override=Logged,
    )
    return router
