"""What every request passes before the API sees it: a limit to its size, and a stopwatch."""

import logging
import time
from uuid import uuid4

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tuneserve.errors import ClientGoneError
from tuneserve.serving.metrics import Metrics

logger = logging.getLogger(__name__)

REQUEST_ID = b"x-request-id"
LONGEST_ID = 128


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
