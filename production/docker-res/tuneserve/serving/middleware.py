"""What every request passes before the API sees it: a stopwatch, perhaps a lock, the queue, a limit to size."""

import hmac
import logging
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from uuid import uuid4

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tuneserve.errors import ClientGoneError, OverloadedError
from tuneserve.serving.metrics import Metrics

logger = logging.getLogger(__name__)

REQUEST_ID = b"x-request-id"
LONGEST_ID = 128


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
        headers = {"WWW-Authenticate": "Bearer"}
        await JSONResponse({"detail": NO_KEY}, status_code=401, headers=headers)(scope, receive, send)


@dataclass(frozen=True, slots=True)
class Refused:
    """The route of a request that never came to the router, for the figures."""

    path: str


class Admission:
    """Answers 429 before anything of a request is read, as long as too much waits: a refusal must cost next to nothing.

    Args:
        app: that gets what is admitted.
        paths: of the routes that the engine answers.
        key: the API key; whoever does not show it is the API's to refuse.
        require_room: raises while too much waits.
    """

    def __init__(self, app: ASGIApp, *, paths: Collection[str], key: bytes, require_room: Callable[[], None]) -> None:
        self.app, self.paths, self.key, self.require_room = app, paths, key, require_room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass if it can be answered soon."""
        if scope["type"] == "http" and scope["path"] in self.paths and scope["method"] == "POST":
            try:
                self.require_room()
            except OverloadedError as error:
                if not self.key or has_key(scope["headers"], self.key):
                    scope["route"] = Refused(scope["path"])
                    headers = {"Retry-After": str(error.retry_after_s)}
                    await JSONResponse({"detail": str(error)}, error.status, headers)(scope, receive, send)
                    return
        await self.app(scope, receive, send)


class BodyLimit:
    """Answers 413 as soon as a request's body is known to be too large, declared or counted."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hold the body back until it is whole and small enough."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        body = b""
        more = True
        too_large = int(declared) > self.max_bytes
        while more and not too_large:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            too_large = len(body) > self.max_bytes
        if too_large:
            limit = f"The body is larger than {self.max_bytes // 1024} KiB, the most this server takes."
            await JSONResponse({"detail": limit}, status_code=413)(scope, receive, send)
            return
        held = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return held.pop() if held else await receive()

        await self.app(scope, replay, send)


class Stopwatch:
    """Counts and times requests by route and status, and gives each an id: the client's, or a new one."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, logs: bool = False) -> None:
        self.app, self.metrics, self.logs = app, metrics, logs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and note how it was answered."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 0
        sent = next((value for name, value in scope["headers"] if name == REQUEST_ID), b"")
        request_id = sent if 0 < len(sent) <= LONGEST_ID and sent.isascii() else uuid4().hex.encode()

        scope.setdefault("state", {})["request_id"] = request_id.decode()

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (REQUEST_ID, request_id)]
            await send(message)

        try:
            await self.app(scope, receive, note)
        finally:
            if not status:  # the client hung up before there was an answer
                status = ClientGoneError.status
            # Only routes that exist become labels: paths are the client's to invent.
            route = getattr(scope.get("route"), "path", "(none)").rstrip("/") or "/"
            self.metrics.requests.labels(route, str(status)).inc()
            seconds = time.perf_counter() - began
            self.metrics.seconds.labels(route).observe(seconds)
            if self.logs:
                shown = {"route": route, "status": status, "ms": round(seconds * 1000, 1), "id": request_id.decode()}
                logger.info("%(route)s %(status)d %(ms).1f ms %(id)s", shown, extra={"request": shown})
