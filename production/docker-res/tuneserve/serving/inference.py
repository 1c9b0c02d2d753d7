"""What `POST /inference` and `/inference/batch` answer, whoever brings the request: a FastAPI route, or the door."""

import json
import math
import time
from collections.abc import Sequence
from itertools import islice
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError

from tuneserve.errors import TextError, TuneserveError, UnauthorizedError
from tuneserve.lifecycle.feedback import Feedback
from tuneserve.serving.classifier import Prediction
from tuneserve.serving.middleware import NO_KEY, has_key
from tuneserve.serving.problems import SHOWN_PROBLEMS, problem, unforeseen
from tuneserve.serving.schemas import BatchRequest, InferenceRequest
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings

Schema = TypeVar("Schema", bound=BaseModel)
Headers = Sequence[tuple[bytes, bytes]]
"""Names in lower case, and values."""


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
        self._key = settings.api_key.get_secret_value().encode()

    async def answer(self, route: str, headers: Headers, body: bytes | bytearray, request_id: str) -> Response:
        """The response to a request of one of the two routes, whatever became of it; only a cancellation is raised."""
        try:
            self.require_key(headers)
            return await (self._one if route == "/inference" else self._batch)(headers, body, request_id)
        except (TuneserveError, RequestValidationError) as error:
            return problem(error)
        except Exception as error:
            return unforeseen(error, request_id)

    async def _one(self, headers: Headers, body: bytes | bytearray, request_id: str) -> Response:
        wanted = _parse(InferenceRequest, body)
        [answer] = await self._predict([wanted.text], headers, request_id)
        if isinstance(answer, TextError):
            raise RequestValidationError([{"loc": ("body", "text"), "msg": str(answer), "type": "value_error"}])
        if isinstance(answer, TuneserveError):
            raise answer
        return _json(_shown(answer))

    async def _batch(self, headers: Headers, body: bytes | bytearray, request_id: str) -> Response:
        wanted = _parse(BatchRequest, body)
        faults = (place for place, text in enumerate(wanted.texts) if not isinstance(text, str))
        if listed := list(islice(faults, SHOWN_PROBLEMS)):
            raise RequestValidationError(
                [
                    {"loc": ("body", "texts", at), "msg": "Input should be a valid string", "type": "string_type"}
                    for at in listed
                ]
            )
        answers = await self._predict(wanted.texts, headers, request_id)
        return _json({"predictions": [_shown(one) for one in answers]})

    def require_key(self, headers: Headers) -> None:
        """Refuse whoever does not show the API key, where one is wanted.

        Raises:
            UnauthorizedError: the key is missing or another.
        """
        if self._key and not has_key(headers, self._key):
            raise UnauthorizedError(NO_KEY)

    async def _predict(
        self, texts: Sequence[str], headers: Headers, request_id: str
    ) -> list[Prediction | TuneserveError]:
        began = time.perf_counter()
        answers = await self._slot.model().predict(texts, timeout_s=self._wanted_s(headers))
        if self._slot.shadow is not None:
            self._slot.shadow(texts, answers, time.perf_counter() - began)
        if self._feedback is not None:
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


def _parse(schema: type[Schema], body: bytes | bytearray) -> Schema:
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


def _lenient(body: bytes | bytearray, error: ValidationError) -> Any:
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
