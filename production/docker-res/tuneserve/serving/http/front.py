"""The front of the HTTP application: what every request passes.

Pure ASGI around the FastAPI application: id, API key, backpressure, the body within its bounds, cancellation when the
client disconnects, metrics and access log. Requests to the model's routes are handed to their handlers from a table,
without FastAPI's routing, which costs as much as the rest of a small request; without the table FastAPI finds the same
handlers.
"""

import asyncio
import hmac
import json
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tuneserve.errors import (
    BodyTimeoutError,
    ClientGoneError,
    EncodingError,
    FramingError,
    InvalidInputError,
    InvalidRequestError,
    LeavingError,
    OverloadedError,
    TooLargeError,
    TuneserveError,
    UnauthorizedError,
)
from tuneserve.hardware import give_memory_back
from tuneserve.serving.http import page, viewer
from tuneserve.serving.http.backoff import Backoff
from tuneserve.serving.http.problems import Wording, unforeseen
from tuneserve.serving.http.request_log import NO_ROUTE, REQUEST_ID, Headers, RequestLog, request_id_of

Handler = Callable[[Request], Awaitable[Response]]
Result = TypeVar("Result")

OPEN_PATHS = frozenset({"/", "/events", "/livez", "/readyz", "/metrics", "/openapi.json", *viewer.PATHS, *page.PATHS})
"""What an API key does not guard unless API_KEY_GUARDS=everything: health, metrics, the documentation and the page's
files; `/events` says without it no more than `/readyz`. So are the routes of adapters with the tag HEALTH."""

DRAIN_BODY_S = 2.0
"""Seconds that a body may still take once the server drains."""

ENDING = (BodyTimeoutError, FramingError, InvalidRequestError, LeavingError)
"""Errors after which the rest of a body may still come, so that the connection cannot be kept."""

BODIES_BYTES = 16 << 20
"""Bytes that the bodies of all requests may hold together, from before they are read until they are answered.

Small ones may hold as many again, so that a few clients with large ones do not keep the others out."""

SMALL_BYTES = 64 << 10

TRIM_S = 2.0
"""Seconds after a large body was answered in which more may come, before its memory is given back."""

GZIP = (b"gzip", b"x-gzip")
"""The content encoding that is read, by both its names."""

NOSNIFF = (b"x-content-type-options", b"nosniff")
NOT_UTF8 = "the body is not UTF-8"
NO_KEY = "This server wants its API key as `Authorization: Bearer ...` or `X-API-Key`."


class Drain:
    """Tells requests whose body is still on its way that the server is shutting down."""

    def __init__(self) -> None:
        self._began = asyncio.Event()
        self._timeouts: set[asyncio.Timeout] = set()

    @property
    def began(self) -> bool:
        """Whether it has begun."""
        return self._began.is_set()

    async def begins_within(self, seconds: float) -> bool:
        """Wait for so long, or until it begins; whether it has."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._began.wait(), seconds)
        return self.began

    def begin(self) -> None:
        """Wait for no body longer than DRAIN_BODY_S from now on; to be called on the event loop."""
        self._began.set()
        ends = asyncio.get_running_loop().time() + DRAIN_BODY_S
        for timeout in self._timeouts:
            timeout.reschedule(min(ends, timeout.when() or ends))

    @contextmanager
    def bounding(self, timeout: asyncio.Timeout) -> Iterator[None]:
        """Let the drain shorten this timeout while the block runs."""
        self._timeouts.add(timeout)
        try:
            yield
        finally:
            self._timeouts.discard(timeout)


class Bodies:
    """The bytes that the bodies of all requests hold.

    Args:
        max_bytes: that they may hold, and small ones as many again.
    """

    def __init__(self, max_bytes: int) -> None:
        self.held, self._max_bytes = 0, max_bytes
        self._trims = False

    def hold(self, more: int, *, of: int) -> int:
        """Count some bytes of a body that has `of` in all, as far as is known; they are to be counted off later.

        Raises:
            OverloadedError: too many are held already.
        """
        if self.held + more > self._max_bytes * (1 if of > SMALL_BYTES else 2):
            raise OverloadedError("The bodies of other requests take all the memory there is for them.")
        self.held += more
        return more

    def release(self, count: int) -> None:
        """Count off what a body has held; the memory of large ones is soon given back to the system."""
        self.held -= count
        if count > SMALL_BYTES and not self._trims:
            self._trims = True
            asyncio.get_running_loop().call_later(TRIM_S, self._trim)

    def _trim(self) -> None:
        self._trims = False
        asyncio.get_running_loop().run_in_executor(None, give_memory_back)


class Front:
    """ASGI middleware around the FastAPI application.

    Args:
        app: what answers requests that `handlers` does not.
        model_paths: that the model answers, by POST.
        named_routes: by POST, those that name the model in their path.
        handlers: path → handler of those that FastAPI need not be asked for.
        room: asked before their bodies are read: why the model could not answer soon, or None.
        wording: of a path, how errors are worded there.
        backoff: of the event loop, after refusals.
        request_log: told of every answer.
        drain: tells when the server shuts down.
        key: the API key; empty for none.
        open_paths: what may be got without it; whatever else than GET or HEAD is asked of them wants it.
        max_body_bytes: largest body; beyond it 413.
        timeout_s: seconds that a body may take; beyond them 408.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        model_paths: frozenset[str],
        named_routes: Sequence[Route] = (),
        handlers: Mapping[str, Handler],
        room: Callable[[], OverloadedError | None],
        wording: Callable[[str], Wording],
        backoff: Backoff,
        request_log: RequestLog,
        drain: Drain,
        key: bytes,
        open_paths: frozenset[str],
        max_body_bytes: int,
        timeout_s: float,
    ) -> None:
        self.app = app
        self._model_paths, self._handlers, self._room, self._backoff = model_paths, handlers, room, backoff
        self._named_routes, self._wording = named_routes, wording
        self._request_log, self._drain = request_log, drain
        self._key, self._open_paths = key, open_paths
        self._max_body_bytes, self._timeout_s = max_body_bytes, timeout_s
        self.bodies = Bodies(max(BODIES_BYTES, 2 * max_body_bytes))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever becomes of it. HEAD is answered as GET is; the server leaves the body out.

        A client that disconnects is noted as 499, an error that nobody foresaw is a 500, and what the server cancels
        because it must shut down is a 503.
        """
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        request_id = request_id_of(scope["headers"])
        scope.setdefault("state", {})["request_id"] = request_id.decode()
        if scope["method"] == "HEAD":
            scope["state"]["is_head"] = True
            scope = {**scope, "method": "GET"}
        if scope["path"].endswith("/") and scope["path"] not in self._model_paths:
            # As without the slash, and no redirect: its address would be built from the Host header.
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        status = 0
        held = [0]

        async def respond(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), NOSNIFF, (REQUEST_ID, request_id)]
            await send(message)

        try:
            response = await self._answer(scope, receive, respond, held)
            if response is not None:
                await response(scope, receive, respond)
        except ClientGoneError:
            pass
        except TuneserveError as error:
            close = isinstance(error, ENDING) or _expects_continue(scope["headers"])
            await self._wording(scope["path"])(error, close=close)(scope, receive, respond)
        except asyncio.CancelledError:
            if status:
                raise
            await self._wording(scope["path"])(LeavingError())(scope, receive, respond)
        except Exception as error:
            known = unforeseen(error, request_id.decode())
            if not status:
                await self._wording(scope["path"])(known)(scope, receive, respond)
        finally:
            self.bodies.release(held[0])
            # Only routes that exist become labels: paths are the client's to invent.
            found = scope["path"]
            if found not in self._model_paths:
                found = getattr(scope.get("route"), "path", NO_ROUTE)
            status = status or scope["state"].get("status", ClientGoneError.status)
            seconds = time.perf_counter() - began
            timed = not scope["state"].get("endless")
            self._request_log.note(found.rstrip("/") or "/", status, seconds, scope["state"]["request_id"], timed=timed)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, held: list[int]) -> Response | None:
        """The response, or None if the application has sent it; `held` is told how much the body takes of `bodies`.

        Raises:
            TuneserveError: there is none, for a reason that the client is told.
        """
        path, headers = scope["path"], scope["headers"]
        declared, encoding = self._check_head(scope)
        is_open = path in self._open_paths and scope["method"] in ("GET", "HEAD")
        if self._key and not is_open and not has_key(headers, self._key):
            return self._wording(path)(UnauthorizedError(NO_KEY), close=_expects_continue(headers))
        is_models = path in self._model_paths and scope["method"] == "POST"
        if not is_models and scope["method"] == "POST":
            named = next((route for route in self._named_routes if route.path_regex.match(path)), None)
            if named is not None:
                is_models, scope["route"] = True, named
        if is_models and (refused := self._room()) is not None:
            self._backoff.request()
            return _refusal(self._wording(path), str(refused), refused.retry_after_s, _expects_continue(headers))
        content = await self._read_body(declared, receive, held)
        if encoding:
            content = self._unpack(content, held)
        if not is_models and not is_text(content):  # a model's route says so itself, if it cannot read it
            raise InvalidInputError((("body",), NOT_UTF8, "json_invalid"))
        body = [content]

        async def replay() -> Message:
            return {"type": "http.request", "body": body.pop(), "more_body": False} if body else await receive()

        if not is_models:
            await self.app(scope, replay, send)
            return None
        if (handler := self._handlers.get(path)) is None:
            await unless_gone(self.app(scope, replay, send), receive)
            return None
        return await unless_gone(handler(Request(scope, replay)), receive)

    def _check_head(self, scope: Scope) -> tuple[int, bytes]:
        """The bytes that the body declares to have, 0 if it comes in chunks; and its encoding, if it has one.

        Raises:
            EncodingError: nothing here can read it.
            InvalidRequestError: it is not clear which host is meant.
            FramingError: the body is coded for its transfer in another way than in chunks.
        """
        declared, hosts, coding, encoding = b"0", 0, b"", b""
        for name, value in scope["headers"]:
            if name == b"host":
                hosts += 1
            elif name == b"content-length":
                declared = value
            elif name == b"transfer-encoding":
                coding = b"%b,%b" % (coding, value) if coding else value
            elif name == b"content-encoding" and (one := value.strip(b" \t").lower()) != b"identity":
                encoding = b"%b,%b" % (encoding, one) if encoding else one
        if hosts > 1 or (not hosts and scope["http_version"] == "1.1"):
            raise InvalidRequestError("A request has one Host header.")
        if coding and coding.strip().lower() != b"chunked":
            raise FramingError("Of the transfer codings this server knows `chunked` alone.")
        if encoding and encoding not in GZIP:
            raise EncodingError("Of the content encodings this server reads `gzip` alone.")
        return int(declared), encoding

    def _unpack(self, content: bytes, held: list[int]) -> bytes:
        """The content of an archive; no more of it is unpacked than may be.

        Raises:
            TooLargeError: it is larger than a body may be.
            InvalidInputError: this is no archive, or not a whole one, or several.
        """
        stream = zlib.decompressobj(zlib.MAX_WBITS | 16)
        try:
            unpacked = stream.decompress(content, self._max_body_bytes + 1)
            if len(unpacked) > self._max_body_bytes:
                raise self._too_large()
            if not stream.eof or stream.unused_data:
                raise zlib.error
        except zlib.error:
            raise InvalidInputError((("body",), "the body is not gzip, as its Content-Encoding says", "gzip")) from None
        held[0] += self.bodies.hold(max(0, len(unpacked) - held[0]), of=len(unpacked))
        return unpacked

    async def _read_body(self, declared: int, receive: Receive, held: list[int]) -> bytes:
        if declared > self._max_body_bytes:
            raise self._too_large()
        held[0] = self.bodies.hold(declared, of=declared)
        pieces: list[bytes] = []
        count = 0
        more = True
        timeout_s = min(DRAIN_BODY_S, self._timeout_s) if self._drain.began else self._timeout_s
        try:
            async with asyncio.timeout(timeout_s) as timeout:
                with self._drain.bounding(timeout):
                    while more:
                        message = await receive()
                        if message["type"] == "http.disconnect":
                            raise ClientGoneError("The client disconnected.")
                        pieces.append(message.get("body", b""))
                        count += len(pieces[-1])
                        more = message.get("more_body", False)
                        if count > self._max_body_bytes:
                            raise self._too_large()
                        if count > held[0]:
                            held[0] += self.bodies.hold(count - held[0], of=count)
        except TimeoutError:
            raise (LeavingError() if self._drain.began else BodyTimeoutError(self._timeout_s)) from None
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _too_large(self) -> TooLargeError:
        return TooLargeError(f"The body is larger than {self._max_body_bytes // 1024} KiB, the most this server takes.")


def is_text(content: bytes) -> bool:
    """Whether these bytes are in an encoding that JSON may have, as Python's reader finds out: UTF-8, mostly."""
    try:
        content.decode(json.detect_encoding(content), "surrogatepass")
    except UnicodeDecodeError:
        return False
    return True


def has_key(headers: Headers, key: bytes) -> bool:
    """Whether one of a request's headers is the key; how long it takes tells nothing of the key."""
    shown = []
    for name, value in headers:
        if name == b"x-api-key":
            shown.append(value)
        elif name == b"authorization" and value[:7].lower() == b"bearer ":
            shown.append(value[7:].strip())
    return any(hmac.compare_digest(one, key) for one in shown)


async def unless_gone(work: Awaitable[Result], receive: Receive) -> Result:
    """The work's result; it is cancelled when the client disconnects.

    Raises:
        ClientGoneError: the client disconnected.
    """
    task = asyncio.current_task()
    watch = asyncio.ensure_future(receive())
    watch.add_done_callback(lambda done: done.cancelled() or task is None or task.cancel())
    try:
        return await work
    except asyncio.CancelledError:
        if watch.done() and not watch.cancelled() and task is not None and not task.uncancel():
            raise ClientGoneError("The client disconnected.") from None
        raise
    finally:
        watch.cancel()


def _expects_continue(headers: Headers) -> bool:
    """Whether the client asks before it sends the body: once refused, the next bytes may be the body or a request."""
    return any(name == b"expect" for name, _ in headers)


@lru_cache(maxsize=32)
def _refusal(wording: Wording, words: str, retry_after_s: int, close: bool) -> Response:
    """Kept: many refusals in a row find the same number of tokens waiting."""
    return wording(OverloadedError(words, retry_after_s=retry_after_s), close=close)
