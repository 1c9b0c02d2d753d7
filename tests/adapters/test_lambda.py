"""AWS Lambda's events, written by hand, and what comes back for each; the model behind them is real or an echo."""

import base64
import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from pydantic import SecretStr
from serving.conftest import EchoEngine
from wire import app_of

from tuneserve.adapters import lambda_function
from tuneserve.adapters.catalog import adapters_of
from tuneserve.adapters.lambda_function import Function, InvocationError, bare_paths
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings
from tuneserve.tasks.catalog import TASKS
from tuneserve.tasks.classification import CLASSIFICATION

TEXT = '{"text": "film"}'
KEY = "a-key-that-is-long"
Start = Callable[..., Function]


class Context:
    """What the platform says of a call."""

    aws_request_id = "8476a536-e9f4-11e8-9739-2dfe598c3fcd"

    def __init__(self, left_ms: int = 20_000) -> None:
        self.left_ms = left_ms

    def get_remaining_time_in_millis(self) -> int:
        return self.left_ms


def rest(method: str, path: str, body: str | None, **headers: str) -> dict[str, Any]:
    about = {"resourcePath": "/{proxy+}", "path": f"/prod{path}", "stage": "prod", "httpMethod": method}
    return {
        "resource": "/{proxy+}",
        "path": path,
        "httpMethod": method,
        "headers": headers or None,
        "multiValueHeaders": {name: [value] for name, value in headers.items()} or None,
        "queryStringParameters": None,
        "multiValueQueryStringParameters": None,
        "requestContext": about,
        "body": body,
        "isBase64Encoded": False,
    }


def http(method: str, path: str, body: str | None, **headers: str) -> dict[str, Any]:
    event: dict[str, Any] = {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": path,
        "rawQueryString": "",
        "headers": {name.lower(): value for name, value in headers.items()},
        "requestContext": {"http": {"method": method, "path": path, "protocol": "HTTP/1.1"}, "stage": "$default"},
        "isBase64Encoded": False,
    }
    return event if body is None else event | {"body": body}  # a function URL leaves it out


def staged(method: str, path: str, body: str | None, **headers: str) -> dict[str, Any]:
    event = http(method, f"/dev{path}", body, **headers)
    event["requestContext"]["stage"] = "dev"
    return event


def balancer(method: str, path: str, body: str | None, **headers: str) -> dict[str, Any]:
    about = {"elb": {"targetGroupArn": "arn:aws:elasticloadbalancing:eu-west-1:1:targetgroup/a/b"}}
    named = {"host": "a", **{name.lower(): value for name, value in headers.items()}}
    return {
        "requestContext": about,
        "httpMethod": method,
        "path": path,
        "queryStringParameters": {},
        "headers": named,
        "body": body or "",
        "isBase64Encoded": False,
    }


def balancer_of_many(method: str, path: str, body: str | None, **headers: str) -> dict[str, Any]:
    event = balancer(method, path, body, **headers)
    return event | {"multiValueHeaders": {name: [value] for name, value in event.pop("headers").items()}}


FORMS = [rest, http, staged, balancer, balancer_of_many]


@pytest.fixture
def start(settings: Settings, slot: Slot) -> Iterator[Start]:
    """The handler over an echo: `start(**settings)`."""
    with ExitStack() as stack:

        def made(over: Slot = slot, **changed: Any) -> Function:
            said = settings.model_copy(update=changed)
            app = app_of(said, over, adapters=adapters_of(said))
            bare = bare_paths(CLASSIFICATION, said.serverless_route)
            function = Function(app, bare=bare, key=said.api_key.get_secret_value())
            stack.callback(function.close)
            return function

        yield made


def headers_of(reply: dict[str, Any]) -> dict[str, str]:
    several = reply.get("multiValueHeaders") or {name: [value] for name, value in reply["headers"].items()}
    return {name.lower(): ", ".join(values) for name, values in several.items()}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_event_is_answered_in_its_own(start: Start, form: Callable[..., Any]) -> None:
    function = start()
    reply = function(form("POST", "/inference", TEXT), Context())
    json.dumps(reply)
    shape = {"statusCode", "headers", "body", "isBase64Encoded"}
    if form in (balancer, balancer_of_many):
        shape.add("statusDescription")
        assert reply["statusDescription"] == "200 OK"
    if form is balancer_of_many:
        shape = shape - {"headers"} | {"multiValueHeaders"}
        assert reply["multiValueHeaders"]["content-type"] == ["application/json"]
    assert set(reply) == shape
    assert (reply["statusCode"], reply["isBase64Encoded"]) == (200, False)
    assert set(json.loads(reply["body"])) == {"label", "scores", "tokens", "truncated", "model_version"}
    headers = headers_of(reply)
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"] == Context.aws_request_id
    assert not {"connection", "content-length"} & set(headers)


REQUESTS = [
    ("POST", "/inference/batch", '{"texts": ["film", ""]}', 200, "predictions"),
    ("POST", "/inference/", TEXT, 200, "label"),
    ("POST", "/inference", None, 422, "detail"),
    ("POST", "/inference", '{"txt": 1}', 422, "detail"),
    ("POST", "/inference", '{"text": "\ud800"}', 422, "detail"),
    ("POST", "/inference", json.dumps({"text": "a" * 5000}), 413, "detail"),
    ("GET", "/readyz", None, 200, "phase"),
    ("GET", "/v1/models", None, 200, "models"),
    ("GET", "/inference", None, 405, "detail"),
    ("POST", "/log", '{"log": "film"}', 404, "detail"),
    ("DELETE", "/nowhere", None, 404, "detail"),
]


@pytest.mark.parametrize("form", FORMS)
def test_what_is_asked_is_answered_as_over_http(start: Start, form: Callable[..., Any]) -> None:
    function = start()
    for method, path, body, status, has in REQUESTS:
        reply = function(form(method, path, body), Context())
        assert (reply["statusCode"], path) == (status, path)
        assert has in json.loads(reply["body"])


def test_bodies_may_be_base64_and_packed_and_answers_are_when_they_are_no_text(start: Start) -> None:
    function = start()
    event = http("POST", "/inference", None, **{"Content-Encoding": "gzip", "Content-Length": "999"})
    event |= {"body": base64.b64encode(gzip.compress(TEXT.encode())).decode(), "isBase64Encoded": True}
    assert function(event, Context())["statusCode"] == 200

    asked = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["film"]}]}
    asked["parameters"] = {"binary_data_output": True}  # type: ignore[assignment]
    reply = function(http("POST", "/v2/models/model/infer", json.dumps(asked)), Context())
    assert (reply["statusCode"], reply["isBase64Encoded"]) == (200, True)
    length = int(headers_of(reply)["inference-header-content-length"])
    assert json.loads(base64.b64decode(reply["body"])[:length])["model_name"] == "model"

    with pytest.raises(InvocationError, match="base64"):
        function(http("POST", "/inference", "no base64!") | {"isBase64Encoded": True}, Context())
    with pytest.raises(InvocationError, match="string"):
        function(http("POST", "/inference", None) | {"body": {"text": "film"}}, Context())


def test_a_head_has_no_body_and_a_browser_gets_a_page(start: Start) -> None:
    function = start()
    assert function(http("HEAD", "/readyz", None), Context())["body"] == ""
    page = function(rest("GET", "/", None, Accept="text/html"), Context())
    assert headers_of(page)["content-type"].startswith("text/html")


@pytest.mark.parametrize("form", FORMS)
def test_a_key_is_wanted_of_requests_and_not_of_bare_events(start: Start, form: Callable[..., Any]) -> None:
    function = start(api_key=SecretStr(KEY))
    ask = lambda **headers: function(form("POST", "/inference", TEXT, **headers), Context())["statusCode"]  # noqa: E731
    assert [ask(), ask(Authorization="Bearer wrong")] == [401, 401]
    assert [ask(Authorization=f"Bearer {KEY}"), ask(**{"X-API-Key": KEY})] == [200, 200]
    assert function(form("GET", "/readyz", None), Context())["statusCode"] == 200
    assert function({"text": "film"}, Context())["label"] in ("bad", "good")


def test_a_bare_event_is_answered_by_a_bare_object(start: Start) -> None:
    function = start(serverless_route="/log")
    answer = function({"text": "film"}, Context())
    assert set(answer) == {"label", "scores", "tokens", "truncated", "model_version"}
    assert len(function({"texts": ["film", "one"]}, Context())["predictions"]) == 2
    assert function({"log": "film"}, Context()) == {"prediction": answer["label"]}
    [scores] = function({"inputs": ["film"]}, Context())
    assert {one["label"]: one["score"] for one in scores} == answer["scores"]


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"text": 1}, r"422 .*\"text\".*valid string"),
        ({"log": "film"}, "422 this event is no HTTP request, and no object with one of text, texts, inputs"),
        ({}, "422 this event"),
        ("film", "422 this event"),
        (None, "422 this event"),
        ({"texts": ["a" * 5000]}, "413 .*KiB"),
    ],
)
def test_a_bare_event_without_an_answer_has_failed(start: Start, event: Any, words: str) -> None:
    with pytest.raises(InvocationError, match=words):
        start()(event, Context())


@pytest.mark.parametrize("form", FORMS)
def test_the_serverless_classifier_is_answered_as_it_answered(start: Start, form: Callable[..., Any]) -> None:
    function = start(serverless_route="/log", api_key=SecretStr(KEY))
    ask = lambda body: function(form("POST", "/log", body, **{"X-API-Key": KEY}), Context())  # noqa: E731
    cors = {
        "content-type": "application/json",
        "access-control-allow-origin": "*",
        "access-control-allow-credentials": "true",
    }
    reply = ask('{"log": "film"}')
    assert reply["statusCode"] == 200
    assert list(json.loads(reply["body"])) == ["prediction"]
    assert json.loads(reply["body"])["prediction"] in ("bad", "good")
    assert headers_of(reply).items() >= cors.items()
    for body in ("{}", None, "no json", '{"log": ""}', json.dumps({"log": "a" * 5000})):
        reply = ask(body)
        assert reply["statusCode"] == 500
        assert "Error(" in json.loads(reply["body"])["error"]
        assert headers_of(reply).items() >= cors.items()
    assert function(form("POST", "/log", '{"log": "film"}'), Context())["statusCode"] == 401


@pytest.mark.parametrize(
    ("left_ms", "header", "at_most"),
    [(10_000, None, 9.75), (90_000, None, 30), (10_000, "2", 2), (2_000, "60", 1.75), (100, None, 0.001)],
)
def test_an_answer_has_the_time_that_the_platform_leaves(
    start: Start, slot: Slot, monkeypatch: pytest.MonkeyPatch, left_ms: int, header: str | None, at_most: float
) -> None:
    seen: list[float] = []
    model = slot.model()
    answer = model.answer

    async def noted(inputs: Any, *, deadline: float) -> Any:
        seen.append(deadline - 1000)
        return await answer(inputs)

    monkeypatch.setattr(model, "answer", noted)
    monkeypatch.setattr("tuneserve.serving.service.time.monotonic", lambda: 1000.0)
    event = http("POST", "/inference", TEXT, **({"X-Request-Timeout-S": header} if header else {}))
    assert start()(event, Context(left_ms))["statusCode"] == 200
    assert seen == [pytest.approx(at_most)]


def test_a_client_that_asks_for_no_time_is_told_so_and_one_that_waits_too_long_too(
    start: Start, held: tuple[Slot, Any]
) -> None:
    reply = start()(http("POST", "/inference", TEXT, **{"X-Request-Timeout-S": "soon"}), Context())
    assert reply["statusCode"] == 422
    slow, _ = held
    assert start(slow)(http("POST", "/inference", TEXT), Context(300))["statusCode"] == 504
    with pytest.raises(InvocationError, match="504"):
        start(slow)({"text": "film"}, Context(300))


@pytest.mark.parametrize(("form", "most"), [(rest, 6 << 20), (http, 6 << 20), (balancer, 1_000_000)])
def test_an_answer_that_the_platform_would_not_pass_on_is_413(
    start: Start, monkeypatch: pytest.MonkeyPatch, form: Callable[..., Any], most: int
) -> None:
    sizes = [most // 2 - 1000, most // 2 + 1, 4 << 20]  # of quotation marks, each of which is two bytes, escaped

    async def large(app: Any, scope: Any, body: bytes) -> Any:
        return lambda_function.Answered(200, [(b"content-type", b"text/plain")], b'"' * sizes.pop(0))

    monkeypatch.setattr(lambda_function, "respond", large)
    for status in (200, 413):
        reply = start()(form("GET", "/metrics", None), Context())
        assert reply["statusCode"] == status
        assert len(json.dumps(reply)) <= most
    with pytest.raises(InvocationError, match="413"):
        start()({"text": "film"}, Context())


def http_1_0(method: str, path: str, body: str | None) -> dict[str, Any]:
    """An HTTP API's event in the older format, whose path has the stage."""
    event = rest(method, f"/prod{path}", body)
    return event | {"version": "1.0"}


@pytest.mark.parametrize(("form", "stage"), [(rest, "/prod"), (http_1_0, "/prod"), (staged, "/dev"), (http, "")])
def test_a_stage_is_taken_off_paths_and_stands_in_those_of_the_page(
    start: Start, form: Callable[..., Any], stage: str
) -> None:
    event = form("GET", "/docs", None)
    if form is http_1_0:
        event["requestContext"]["path"] = event["path"]
    page = start()(event, Context())
    assert page["statusCode"] == 200
    assert f'src="{stage}/docs/start.js"' in page["body"]


def test_a_path_that_begins_as_the_stage_is_called_stays_whole(start: Start) -> None:
    event = rest("GET", "/v1/models", None)
    event["requestContext"] |= {"stage": "v1", "path": "/v1/v1/models"}
    assert start()(event, Context())["statusCode"] == 200


def test_the_platforms_variables_are_none_of_ours() -> None:
    names = """_HANDLER _X_AMZN_TRACE_ID AWS_DEFAULT_REGION AWS_REGION AWS_EXECUTION_ENV AWS_LAMBDA_FUNCTION_NAME
        AWS_LAMBDA_FUNCTION_MEMORY_SIZE AWS_LAMBDA_FUNCTION_VERSION AWS_LAMBDA_INITIALIZATION_TYPE
        AWS_LAMBDA_LOG_GROUP_NAME AWS_LAMBDA_LOG_STREAM_NAME AWS_ACCESS_KEY AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
        AWS_SESSION_TOKEN AWS_LAMBDA_RUNTIME_API LAMBDA_TASK_ROOT LAMBDA_RUNTIME_DIR LANG PATH LD_LIBRARY_PATH
        PYTHONPATH TZ AWS_LAMBDA_MAX_CONCURRENCY"""
    assert Settings.from_environ({**dict.fromkeys(names.split(), "any"), "API_KEY": "", "SERVERLESS_ROUTE": ""})


def test_all_calls_are_on_one_event_loop(start: Start, engine: EchoEngine) -> None:
    function = start()
    for _ in range(3):
        assert function({"text": "film"}, Context())["tokens"] == 3
    assert len(engine.batches) == 3


@pytest.mark.parametrize("task", TASKS.values())
def test_every_task_has_a_bare_event(task: Any) -> None:
    found = bare_paths(task, "/log")
    assert found["log"] == "/log"
    assert found["inputs"]
    assert set(found.values()) - {"/", "/log"} <= {route.path for route in task.routes}
