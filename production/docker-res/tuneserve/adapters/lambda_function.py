"""AWS Lambda: events as requests to the ASGI application, and its responses in the form of each event.

Events of API Gateway (REST and HTTP), of function URLs and of load balancers are HTTP requests. Any other is a bare
one: the body of a request by itself, from somebody whom IAM has let in.

Sources: the platform's documents "Lambda proxy integrations" (payload formats 1.0 and 2.0), "Invoking Lambda functions
using a function URL", "Lambda functions as targets", "Lambda quotas".
"""

import asyncio
import base64
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import responses
from typing import Any, Protocol
from urllib.parse import quote_plus, unquote, urlencode

from starlette.types import ASGIApp, Message, Scope

from tuneserve.errors import InvalidInputError
from tuneserve.serving.http.routes import to_json, wanted_s
from tuneserve.tasks.task import Task

MOST_BYTES = 6 << 20
"""Of a reply."""
MOST_BYTES_BALANCED = 1_000_000
"""Of a reply to a load balancer."""

MARGIN_S = 0.25
"""Seconds before the platform ends a call by which there is an answer, so that it is ours."""
LEAST_S = 0.001

TIMEOUT, KEY, REQUEST_ID = b"x-request-timeout-s", b"x-api-key", b"x-request-id"
OF_CONNECTION = (b"content-length", b"transfer-encoding", b"connection", b"expect")
"""Headers of a connection, which is the platform's; the first is said anew, since the body may have been base64."""

Headers = list[tuple[bytes, bytes]]


class Context(Protocol):
    """What is used of what the platform says of a call."""

    aws_request_id: str

    def get_remaining_time_in_millis(self) -> int:
        """Milliseconds until the call is ended."""
        ...


class InvocationError(Exception):
    """A bare event has no answer: the HTTP status of the reason, and the reason as it is worded over HTTP."""


@dataclass(frozen=True)
class Asked:
    """A request as an event tells it; `root` is what a client's URL has before the path."""

    method: str
    path: str
    headers: Headers
    body: bytes
    query: str = ""
    root: str = ""


@dataclass(frozen=True)
class Answered:
    """A response."""

    status: int
    headers: Headers
    body: bytes


class Function:
    """The handler `function(event, context)`; a call at a time, all of them on one event loop.

    Args:
        app: that answers.
        bare: the path that a bare event asks, by a key that it has; the first that is found.
        key: the API key, which a bare event need not show.
    """

    def __init__(self, app: ASGIApp, *, bare: Mapping[str, str], key: str = "") -> None:
        self._app, self._bare, self._key = app, bare, key
        self._loop = asyncio.new_event_loop()

    def __call__(self, event: Any, context: Context) -> Any:
        """The reply to an event.

        Raises:
            InvocationError: a bare event cannot be answered, or an event is none of those known.
        """
        source = source_of(event)
        asked = self._of_bare(event) if source == "bare" else of_http(event, source)
        reply = form(self._ask(asked, context), event, source, asked.method)
        most = MOST_BYTES_BALANCED if source == "balancer" else MOST_BYTES
        if len(json.dumps(reply)) > most:
            words = f"The answer is larger than the {most} bytes that Lambda passes on here: ask less at once."
            content = to_json({"detail": words}).encode()
            reply = form(Answered(413, [(b"content-type", b"application/json")], content), event, source, asked.method)
        return reply

    def close(self) -> None:
        """Close the event loop."""
        self._loop.close()

    def _of_bare(self, event: Any) -> Asked:
        known = isinstance(event, dict) and next((path for name, path in self._bare.items() if name in event), None)
        if not known:
            raise InvocationError(
                f"422 this event is no HTTP request, and no object with one of {', '.join(self._bare)}."
            )
        headers = [(b"host", b"lambda"), (b"content-type", b"application/json")]
        if self._key:
            headers.append((KEY, self._key.encode()))
        return Asked("POST", known, headers, json.dumps(event).encode())

    def _ask(self, asked: Asked, context: Context) -> Answered:
        headers = [(name, value) for name, value in asked.headers if name not in OF_CONNECTION]
        headers.append((b"content-length", b"%d" % len(asked.body)))
        names = {name for name, _ in headers}
        if b"host" not in names:
            headers.append((b"host", b"lambda"))
        if REQUEST_ID not in names:
            headers.append((REQUEST_ID, context.aws_request_id.encode()))
        left_s = max(LEAST_S, context.get_remaining_time_in_millis() / 1000 - MARGIN_S)
        with suppress(InvalidInputError):  # which the route says
            wanted = wanted_s(headers, left_s)
            headers = [one for one in headers if one[0] != TIMEOUT] + [(TIMEOUT, b"%.3f" % wanted)]
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": asked.method,
            "scheme": "https",
            "path": asked.path,
            "raw_path": asked.path.encode(),
            "query_string": asked.query.encode(),
            "root_path": asked.root,
            "headers": headers,
            "client": None,
            "server": None,
        }
        return self._loop.run_until_complete(respond(self._app, scope, asked.body))


def bare_paths(task: Task, serverless_route: str = "") -> dict[str, str]:
    """The paths that bare events ask, by the key that tells: what the requests of each route cannot do without."""
    found = {"log": serverless_route} if serverless_route else {}
    for route in task.routes:
        name = next(name for name, field in route.request.model_fields.items() if field.is_required())
        found.setdefault(name, route.path)
    return {**found, "inputs": found.get("inputs", "/")}


def source_of(event: Any) -> str:
    """Where an event comes from: `http` (payload format 2.0), `rest` (1.0), `balancer`, or `bare`."""
    about = event.get("requestContext") if isinstance(event, dict) else None
    if isinstance(about, dict) and "http" in about:
        return "http"
    if isinstance(about, dict) and "elb" in about:
        return "balancer"
    return "rest" if isinstance(event, dict) and "httpMethod" in event else "bare"


def of_http(event: Mapping[str, Any], source: str) -> Asked:
    """The request that an event tells of.

    Raises:
        InvocationError: it is not as the platform makes them.
    """
    about = event.get("requestContext") or {}
    several = event.get("multiValueHeaders") or {}
    single = {name: value for name, value in (event.get("headers") or {}).items() if name not in several}
    pairs = [(name, one) for name, values in several.items() for one in values] + list(single.items())
    headers = [(name.lower().encode("latin-1"), str(value).encode("latin-1", "replace")) for name, value in pairs]
    if source == "http":
        method, path, query = about["http"]["method"], event.get("rawPath") or "/", event.get("rawQueryString") or ""
        staged = True
    else:
        method, path = event["httpMethod"], event.get("path") or "/"
        found = event.get("multiValueQueryStringParameters") or event.get("queryStringParameters") or {}
        query = urlencode(found, doseq=True, quote_via=_as_it_is if source == "balancer" else quote_plus)
        staged = about.get("path") == path  # else the path is already without the stage
    root = f"/{about['stage']}" if about.get("stage", "$default") != "$default" else ""
    if staged and f"{path}/".startswith(f"{root}/"):
        path = path.removeprefix(root) or "/"
    elif about.get("path") != root + path:
        root = ""
    if f"{path}/".startswith(f"{root}/"):  # a stage that is called as a path begins, which Starlette would take off
        root = ""
    return Asked(method, unquote(path), headers, body_of(event), query, root)


def _as_it_is(text: Any, *_: Any) -> str:
    """What a load balancer has left encoded."""
    return str(text)


def body_of(event: Mapping[str, Any]) -> bytes:
    """The body of the request that an event tells of.

    Raises:
        InvocationError: it has none that the platform would send.
    """
    body = event.get("body") or ""
    if not isinstance(body, str):
        raise InvocationError("422 `body` is a string, or null: JSON is written as text there.")
    if not event.get("isBase64Encoded"):
        return body.encode("utf-8", "surrogatepass")
    try:
        return base64.b64decode(body, validate=True)
    except ValueError:
        raise InvocationError("422 `body` is not base64, as `isBase64Encoded` says.") from None


async def respond(app: ASGIApp, scope: Scope, body: bytes) -> Answered:
    """The whole response to a request, a stream's too."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    status, headers, pieces = 500, Headers(), list[bytes]()

    async def receive() -> Message:
        if waiting:
            return waiting.pop()
        never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        return await never  # nobody can hang up

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], list(message.get("headers", ()))
        else:
            pieces.append(message.get("body", b""))

    await app(scope, receive, send)
    return Answered(status, headers, b"".join(pieces))


def form(answered: Answered, event: Mapping[str, Any], source: str, method: str) -> Any:
    """The reply to an event; to a bare one what would be the body.

    Raises:
        InvocationError: a bare event got an error.
    """
    if source == "bare":
        text = answered.body.decode()
        if answered.status >= 400:
            raise InvocationError(f"{answered.status} {text}")
        is_json = (b"content-type", b"application/json") in answered.headers
        return json.loads(text) if is_json else text
    try:
        body, encoded = answered.body.decode(), False
    except UnicodeDecodeError:
        body, encoded = base64.b64encode(answered.body).decode(), True
    several: dict[str, list[str]] = {}
    for name, value in answered.headers:
        if name.lower() not in OF_CONNECTION:
            several.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))
    reply: dict[str, Any] = {
        "statusCode": answered.status,
        "headers": {name: ", ".join(values) for name, values in several.items()},
        "body": "" if method == "HEAD" else body,
        "isBase64Encoded": encoded,
    }
    if source == "balancer":
        reply["statusDescription"] = f"{answered.status} {responses.get(answered.status, 'Unknown')}"
        if "multiValueHeaders" in event:  # the target group is set to them, and reads nothing else
            reply["multiValueHeaders"] = several
            del reply["headers"]
    return reply
