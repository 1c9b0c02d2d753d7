"""What a client is told when there is no answer."""

import logging
import re
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response

from tuneserve.errors import MAX_FAULTS, InvalidInputError, OverloadedError, TuneserveError, UnauthorizedError

NOT_JSON = "the body was not read as JSON; send it with Content-Type: application/json"

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 5
"""Seconds after which a server without a model, or another than the one that ends, may be asked."""


Wording = Callable[..., Response]
"""Makes the response of an error; its arguments are those of `problem`."""


def wording_by(wordings: Iterable[tuple[re.Pattern[str], Wording]]) -> Callable[[str], Wording]:
    """Of a path, how errors are worded there: as the first pattern that it matches has it, else as everywhere."""
    wordings = tuple(wordings)
    return lambda path: next((wording for pattern, wording in wordings if pattern.match(path)), problem)


def problem(error: TuneserveError | RequestValidationError, *, close: bool = False) -> Response:
    """What a client is told where no adapter says otherwise: `{"detail"}`."""
    headers = headers_of(error, close=close)
    if isinstance(error, RequestValidationError | InvalidInputError):
        faults = error.faults if isinstance(error, InvalidInputError) else error.errors()
        # What was sent is left out: it may be private, and large.
        shown = [{"loc": item["loc"], "msg": _words(item), "type": item["type"]} for item in faults[:MAX_FAULTS]]
        return JSONResponse({"detail": shown}, status_code=422, headers=headers)
    return JSONResponse({"detail": str(error)}, status_code=error.status, headers=headers)


def headers_of(error: TuneserveError | RequestValidationError, *, close: bool) -> dict[str, str]:
    """The headers that an error's response has, however the error is worded."""
    headers = {"Connection": "close"} if close else {}
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(error.retry_after_s)
    elif isinstance(error, TuneserveError) and error.status == 503:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    if isinstance(error, UnauthorizedError):
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def _words(fault: Mapping[str, Any]) -> str:
    """What is wrong; of a body that FastAPI did not take for JSON pydantic only says that it is no object."""
    unread = isinstance(fault.get("input"), bytes) and tuple(fault["loc"]) == ("body",)
    return NOT_JSON if unread else str(fault["msg"])


def unforeseen(error: Exception, request_id: str) -> TuneserveError:
    """What a client may know of an error that nobody foresaw; the log is told where it came from."""
    # Neither the error's words nor its source: they may hold what was sent.
    trace = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request %s failed: %s\n%s", request_id, type(error).__qualname__, trace.rstrip())
    return TuneserveError("Something went wrong inside; the server's log says what.")
