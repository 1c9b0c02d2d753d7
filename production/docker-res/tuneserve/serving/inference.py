"""What `POST /inference` and `POST /inference/batch` answer."""

import json
import math
import time
from collections.abc import Sequence
from itertools import islice
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from tuneserve.errors import TextError, TuneserveError
from tuneserve.lifecycle.feedback import Feedback
from tuneserve.serving.classifier import Prediction
from tuneserve.serving.problems import SHOWN_PROBLEMS
from tuneserve.serving.request_log import Headers
from tuneserve.serving.schemas import BatchRequest, InferenceRequest
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings

Schema = TypeVar("Schema", bound=BaseModel)

_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
"""Kept: `json.dumps` with options makes an encoder for each answer."""


class Inference:
    """The way from a request's body to its response.

    Args:
        settings: of the server.
        slot: whose model answers.
        feedback: where answers are remembered; None for nowhere.
    """

    def __init__(self, settings: Settings, slot: Slot, feedback: Feedback | None) -> None:
        self._slot, self._feedback = slot, feedback
        self._timeout_s = settings.request_timeout_s

    async def one(self, request: Request) -> Response:
        """Classify one text.

        Raises:
            RequestValidationError: the request is not as it should be.
            TuneserveError: the text could not be classified.
        """
        wanted = _parse(InferenceRequest, await request.body())
        [answer] = await self._predict([wanted.text], request)
        if isinstance(answer, TextError):
            raise RequestValidationError([{"loc": ("body", "text"), "msg": str(answer), "type": "value_error"}])
        if isinstance(answer, TuneserveError):
            raise answer
        return _json(_shown(answer))

    async def batch(self, request: Request) -> Response:
        """Classify several texts; the predictions come in their order, a bad text's being its error.

        Raises:
            RequestValidationError: the request is not as it should be.
            TuneserveError: no text could be classified.
        """
        wanted = _parse(BatchRequest, await request.body())
        faults = (place for place, text in enumerate(wanted.texts) if not isinstance(text, str))
        if listed := list(islice(faults, SHOWN_PROBLEMS)):
            raise RequestValidationError(
                [
                    {"loc": ("body", "texts", at), "msg": "Input should be a valid string", "type": "string_type"}
                    for at in listed
                ]
            )
        answers = await self._predict(wanted.texts, request)
        return _json({"predictions": [_shown(one) for one in answers]})

    async def _predict(self, texts: Sequence[str], request: Request) -> list[Prediction | TuneserveError]:
        began = time.perf_counter()
        answers = await self._slot.model().predict(texts, timeout_s=self._wanted_s(request.scope["headers"]))
        if self._slot.shadow is not None:
            self._slot.shadow(texts, answers, time.perf_counter() - began)
        if self._feedback is not None:
            request_id = request.scope["state"]["request_id"]
            for place, (text, one) in enumerate(zip(texts, answers, strict=True)):
                if isinstance(one, Prediction):
                    score = one.scores[one.label]
                    self._feedback.remember(request_id, place, one.model_version, one.label, score, text)
        return answers

    def _wanted_s(self, headers: Headers) -> float:
        """Seconds that this request may take: the client may ask for less than the server allows."""
        asked = next((value for name, value in headers if name == b"x-request-timeout-s"), b"")
        if not asked:
            return self._timeout_s
        try:
            seconds = float(asked) if b"_" not in asked else math.nan  # Python's own way to write figures
        except ValueError:
            seconds = math.nan
        if not seconds > 0:
            raise RequestValidationError(
                [{"loc": ("header", "X-Request-Timeout-S"), "msg": "should be seconds above 0", "type": "value_error"}]
            )
        return min(seconds, self._timeout_s)


def _parse(schema: type[Schema], body: bytes) -> Schema:
    try:
        try:
            return schema.model_validate_json(body)
        except ValidationError as error:
            if error.errors()[0]["type"] != "json_invalid":
                raise
            return schema.model_validate(_lenient(body, error))
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in problems]) from None


def _lenient(body: bytes, error: ValidationError) -> Any:
    """JSON that Python reads and pydantic does not: halves of surrogate pairs, which are one text's fault."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise error from None


def _shown(prediction: Prediction | TuneserveError) -> dict[str, Any]:
    if isinstance(prediction, TuneserveError):
        return {"error": str(prediction)}
    return {
        "label": prediction.label,
        "scores": prediction.scores,
        "tokens": prediction.tokens,
        "truncated": prediction.truncated,
        "model_version": prediction.model_version,
    }


def _json(content: Any) -> Response:
    return Response(_to_json(content).encode(), media_type="application/json")
