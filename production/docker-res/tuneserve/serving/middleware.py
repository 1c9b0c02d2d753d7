"""What every request passes before the API sees it: a stopwatch, perhaps a lock, a limit to size."""

import asyncio
import hmac
import logging
import os
import time
from collections.abc import Iterable, Iterator

from prometheus_client import Counter, Histogram
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tuneserve.errors import BodyTimeoutError, ClientGoneError, LeavingError, OverloadedError, UnauthorizedError
from tuneserve.serving.metrics import Metrics
from tuneserve.serving.problems import problem, unforeseen

logger = logging.getLogger(__name__)

ENGINE_PATHS = {
    "/inference": "/inference",
    "/inference/": "/inference",
    "/inference/batch": "/inference/batch",
    "/inference/batch/": "/inference/batch",
}
"""Paths that the engine answers, and the route of each."""

NO_ROUTE = "(none)"
"""Where a request is counted that came to no route."""

REQUEST_ID = b"x-request-id"
LONGEST_ID = 128
ID_BYTES = 16


NO_KEY = "This server wants its API key as `Authorization: Bearer ...` or `X-API-Key`."


def has_key(headers: Iterable[tuple[bytes, bytes]], key: bytes) -> bool:
    """Whether one of a request's headers is the key; how long it takes tells nothing of the key."""
    shown = []
    for name, value in headers:
        if name == b"x-api-key":
            shown.append(value)
        elif name == b"authorization" and value[:7].lower() == b"bearer ":
            shown.append(value[7:].strip())
    return any(hmac.compare_digest(one, key) for one in shown)


class Lock:
    """Answers 401 to whatever comes without the API key, before anything else is read of it."""

    def __init__(self, app: ASGIApp, *, key: bytes) -> None:
        self.app, self.key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass if it shows the key."""
        if scope["type"] != "http" or has_key(scope["headers"], self.key):
            await self.app(scope, receive, send)
            return
        await problem(UnauthorizedError(NO_KEY))(scope, receive, send)


class BodyLimit:
    """Answers 413 as soon as a body is known to be too large, declared or counted, 408 if it does not come."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_s: float) -> None:
        self.app, self.max_bytes, self.timeout_s = app, max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hold the body back until it is whole and small enough."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        body = b""
        more = True
        too_large = int(declared) > self.max_bytes
        try:
            async with asyncio.timeout(self.timeout_s):
                while more and not too_large:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    too_large = len(body) > self.max_bytes
        except TimeoutError:
            late = problem(BodyTimeoutError(self.timeout_s))
            late.headers["Connection"] = "close"
            await late(scope, receive, send)
            return
        if too_large:
            limit = f"The body is larger than {self.max_bytes // 1024} KiB, the most this server takes."
            await JSONResponse({"detail": limit}, status_code=413)(scope, receive, send)
            return
        held = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return held.pop() if held else await receive()

        await self.app(scope, replay, send)


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The id that the client gave its request, or a new one."""
    sent = next((value for name, value in headers if name == REQUEST_ID), b"")
    return sent if 0 < len(sent) <= LONGEST_ID and sent.isascii() else next(_new_ids)


def _make_ids() -> Iterator[bytes]:
    """Ids that nobody can guess. Each call of the system gives up the interpreter, and so serves for many."""
    while True:
        block = os.urandom(256 * ID_BYTES)
        for begin in range(0, len(block), ID_BYTES):
            yield block[begin : begin + ID_BYTES].hex().encode()


_new_ids = _make_ids()


class Journal:
    """Where every request that was answered is counted and timed by its route and status, and perhaps logged."""

    def __init__(self, metrics: Metrics, *, logs: bool = False) -> None:
        self.metrics, self.logs = metrics, logs
        self._figures: dict[tuple[str, int], tuple[Counter, Histogram]] = {}

    def note(self, route: str, status: int, seconds: float, request_id: str) -> None:
        """Note an answer. A refusal is counted and not timed: it would hide how long answers take."""
        count, time_taken = self._figures.get((route, status)) or self._find(route, status)
        count.inc()
        if status != OverloadedError.status:
            time_taken.observe(seconds)
        if self.logs:
            shown = {"route": route, "status": status, "ms": round(seconds * 1000, 1), "id": request_id}
            logger.info("%(route)s %(status)d %(ms).1f ms %(id)s", shown, extra={"request": shown})

    def _find(self, route: str, status: int) -> tuple[Counter, Histogram]:
        """Looked up once: to find a figure by its labels costs more than to count it."""
        found = self.metrics.requests.labels(route, str(status)), self.metrics.seconds.labels(route)
        self._figures[route, status] = found
        return found


class Stopwatch:
    """Lets every request be noted with how it was answered and after how long, and gives each an id.

    What nobody foresaw is a 500 here, and what uvicorn cancels because the server must leave is a 503. HEAD is answered
    as GET; the server leaves the body out.
    """

    def __init__(self, app: ASGIApp, *, journal: Journal) -> None:
        self.app, self.journal = app, journal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and note how it was answered."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        began = time.perf_counter()
        status = 0
        request_id = request_id_of(scope["headers"])
        scope.setdefault("state", {})["request_id"] = request_id.decode()

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (REQUEST_ID, request_id)]
            await send(message)

        try:
            await self.app(scope, receive, note)
        except asyncio.CancelledError:
            if status:
                raise
            await problem(LeavingError())(scope, receive, note)
        except Exception as error:
            answer = unforeseen(error, request_id.decode())
            if not status:
                await answer(scope, receive, note)
        finally:
            if not status:  # the client hung up before there was an answer
                status = ClientGoneError.status
            # Only routes that exist become labels: paths are the client's to invent.
            found = getattr(scope.get("route"), "path", None) or ENGINE_PATHS.get(scope["path"], NO_ROUTE)
            route = found.rstrip("/") or "/"
            self.journal.note(route, status, time.perf_counter() - began, request_id.decode())
