"""The platform's API over models that come and go: statuses, error bodies, pages, and what a body may be."""

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from serving.conftest import EchoEngine

from tuneserve.adapters.catalog import OF_MANY
from tuneserve.artifact import Version
from tuneserve.errors import NotFoundError, StoreError, TextError
from tuneserve.serving.http.app import create_app
from tuneserve.serving.model import Model
from tuneserve.serving.registry import Registry
from tuneserve.serving.service import Service
from tuneserve.settings import Settings
from tuneserve.tasks.classifier import Classifier
from tuneserve.tasks.generator import Generated
from tuneserve.tasks.handler import Invocation, Response

TARGET = "X-Amzn-SageMaker-Target-Model"


class Mirror(Model):
    """Belongs to no task: it reads the request itself."""

    id = "mirror"

    def room(self, wait_s: float = 0) -> None:
        return None

    async def answer(self, inputs: Any, *, deadline: float = 0) -> Any:
        [one] = inputs
        assert isinstance(one, Invocation)
        if one.body == b"fail":
            raise KeyError
        said = f"{one.content_type} {one.accept} ".encode() + one.body
        return [Response(model_version="mirror", body=said, content_type="text/csv")]


class Writing(Model):
    """Writes the prompt's words, one a step; of the prompt "on" it never comes to an end."""

    id, task = "writes", "text-generation"

    def __init__(self) -> None:
        self.steps, self.under_way = 0, 0

    def room(self, wait_s: float = 0) -> None:
        return None

    async def answer(self, inputs: Any, *, deadline: float = 0) -> Any:
        return [[one async for one in self.stream(prompt)][-1] for prompt in inputs]

    async def stream(self, wanted: Any, *, deadline: float = 0) -> AsyncGenerator[Generated]:
        if wanted.text == " ":
            raise TextError("the text is empty")
        words, count = wanted.text.split(), 0
        self.under_way += 1
        try:
            while wanted.text == "on" or count < len(words):
                await asyncio.sleep(0)
                count, self.steps = count + 1, self.steps + 1
                yield Generated(
                    model_version="writes",
                    text=" ".join(words[:count]),
                    ids=tuple(range(count)),
                    prompt_tokens=len(words),
                    device="cpu",
                    finish="length" if count == len(words) and wanted.text != "on" else "",
                )
        finally:
            self.under_way -= 1


@pytest.fixture
def writing() -> Writing:
    return Writing()


@pytest.fixture
def start(
    version: Version, settings: Settings, tmp_path: Path, writing: Writing
) -> Iterator[Callable[..., TestClient]]:
    def open_model(folder: Path, name: str) -> Model:
        if folder.name == "broken":
            raise StoreError("broken has no weights.")
        if folder.name == "writes":
            return writing
        return Mirror() if folder.name.startswith("mirror") else Classifier(version, EchoEngine())

    def prepare(folder: Path) -> Path:
        if not folder.is_dir():
            raise NotFoundError(f"There is no folder {folder}.")
        return folder

    def find(name: str) -> Path:
        for path in (tmp_path / name, tmp_path / f"{name}.tar.gz"):
            if path.exists():
                return path
        raise NotFoundError(f"There is no model {name!r} here.")

    for name in ("one", "two", "mirror.tar.gz", "broken", "writes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(bytes(1000))
    with ExitStack() as ends:

        def begin(*, finds: bool = False, changed: dict[str, Any] | None = None, **options: Any) -> TestClient:
            registry = Registry(open_model, prepare=prepare, find=find if finds else None, **options)
            ends.callback(registry.close, wait_s=30)
            service = Service({}, metrics=registry.metrics, models=registry, max_inputs=3)
            configured = settings.model_copy(update=changed)
            app = create_app(configured, service, None, adapters=OF_MANY)
            return TestClient(app, raise_server_exceptions=False)

        yield begin


@pytest.fixture
def url(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    return lambda name: {"model_name": name, "url": str(tmp_path / name)}


def failure(response: Any) -> tuple[int, str]:
    """Status and message of an error body, which has three fields and no more."""
    body = response.json()
    assert set(body) == {"code", "type", "message"}
    assert body["code"] == response.status_code
    return response.status_code, body["message"]


def test_nothing_is_loaded_at_the_start_and_the_server_is_well(start: Callable[..., TestClient]) -> None:
    client = start()
    ping = client.get("/ping")
    assert (ping.status_code, ping.content) == (200, b"")
    assert client.get("/models").json()["models"] == []
    assert [client.get(path).status_code for path in ("/livez", "/readyz", "/metrics", "/docs")] == [200] * 4


def test_a_server_is_ready_once_all_pinned_models_have_been_loaded(start: Callable[..., TestClient]) -> None:
    client = start(finds=True, pinned=["one", "two"])
    for name, left in (("one", "one, two"), ("two", "two")):
        found = client.get("/readyz")
        assert found.json() == {"phase": "loading", "reason": f"Pinned models are being loaded: {left}."}
        assert (found.status_code, found.headers["Retry-After"]) == (503, "5")
        assert [client.get(path).status_code for path in ("/livez", "/ping")] == [200, 200]
        assert client.post(f"/models/{name}/invoke", json="film").status_code == 200
    assert (client.get("/readyz").status_code, client.get("/readyz").json()) == (200, {"phase": "ready"})
    assert client.delete("/models/two").status_code == 200
    assert client.get("/readyz").status_code == 200  # it is loaded again when it is asked


def test_a_model_comes_answers_and_goes(start: Callable[..., TestClient], url: Any, tmp_path: Path) -> None:
    client = start()
    assert client.post("/models", json=url("one")).status_code == 200
    assert failure(client.post("/models", json=url("one"))) == (409, "The model 'one' is loaded already.")
    shown = client.get("/models/one").json()
    assert (shown["modelName"], shown["modelUrl"]) == ("one", str(tmp_path / "one"))
    assert (shown["task"], shown["bytes"], shown["state"]) == ("text-classification", 1000, "loaded")
    answer = client.post("/models/one/invoke", json={"inputs": "film"})
    assert answer.headers["Content-Type"] == "application/json"
    [found] = answer.json()
    assert set(found) == {"label", "score"}
    assert client.get("/models").json()["models"][0]["hits"] == 1
    assert client.delete("/models/one").status_code == 200
    for gone in (client.delete("/models/one"), client.get("/models/one"), client.post("/models/one/invoke")):
        assert failure(gone)[0] == 404
    metrics = client.get("/metrics").text
    assert 'tuneserve_requests_total{route="/models/{name}/invoke",status="200"} 1.0' in metrics
    assert "tuneserve_models_loaded 0.0" in metrics


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model_name": "x", "url": "/nowhere/x"}, 404, "There is no folder /nowhere/x."),
        ({"model_name": "x", "url": "x"}, 400, "absolute path"),
        ({"model_name": "a/b", "url": "/x"}, 400, "model_name"),
        ({"url": "/x"}, 400, "model_name: Field required"),
        (5, 400, "dictionary"),
    ],
)
def test_a_load_that_cannot_be_says_why(start: Callable[..., TestClient], body: Any, status: int, words: str) -> None:
    found = failure(start().post("/models", json=body))
    assert found[0] == status
    assert words in found[1]


def test_a_damaged_model_is_the_callers_and_lack_of_memory_is_507(start: Callable[..., TestClient], url: Any) -> None:
    client = start(limit=1500, used=lambda: 0, evicts=False)
    assert failure(client.post("/models", json=url("broken"))) == (400, "broken has no weights.")
    used = 0
    client = start(limit=1500, used=lambda: used, evicts=False)
    assert client.post("/models", json=url("one")).status_code == 200
    used = 1000
    status, words = failure(client.post("/models", json=url("two")))
    assert status == 507
    assert "MEMORY_LIMIT" in words
    assert client.post("/models/one/invoke", json="film").status_code == 200


def test_models_are_listed_by_hundreds_and_the_end_has_no_token(
    start: Callable[..., TestClient], tmp_path: Path
) -> None:
    client, names = start(), [f"mirror {number:03} ü?&" for number in range(201)]
    for name in names:
        (tmp_path / name).mkdir()
        assert client.post("/models", json={"model_name": name, "url": str(tmp_path / name)}).status_code == 200
    seen, token, pages = [], None, 0
    while pages == 0 or token is not None:
        page = client.get("/models", params={"next_page_token": token} if token else {}).json()
        seen += [one["modelName"] for one in page["models"]]
        token, pages = page.get("nextPageToken"), pages + 1
    assert (seen, pages) == (names, 3)
    assert client.post("/models/mirror 007 ü%3F&/invoke", content=b"x").status_code == 200


@pytest.mark.parametrize(
    ("inputs", "parameters", "shape"),
    [
        ("film", None, [1]),
        (["film", "good film"], None, [1, 1]),
        ("film", {"top_k": None}, [1, 1]),
        ("film", {"top_k": 1}, [1]),
        (["film"], {"top_k": None}, [2]),
        (["film", "bad"], {"top_k": 1}, [1, 1]),
    ],
)
def test_classifications_have_the_pipelines_shape(
    start: Callable[..., TestClient], url: Any, inputs: Any, parameters: Any, shape: list[int]
) -> None:
    client = start()
    client.post("/models", json=url("one"))
    found = client.post("/models/one/invoke", json={"inputs": inputs, "parameters": parameters, "more": 1}).json()
    nested = isinstance(inputs, list) and parameters is not None
    assert all(isinstance(one, list) is nested for one in found)
    assert [len(one) if nested else 1 for one in found] == shape
    flat = [each for one in found for each in (one if nested else [one])]
    assert all(each["label"] in ("bad", "good") for each in flat)
    if parameters == {"top_k": None}:
        assert flat[0]["score"] >= flat[1]["score"]
        assert math.isclose(flat[0]["score"] + flat[1]["score"], 1, abs_tol=1e-6)


@pytest.mark.parametrize(
    ("content", "kind", "status", "words"),
    [
        (b'"film"', "application/json", 200, ""),
        (b'["film", "bad"]', "application/json", 200, ""),
        (b'{"inputs": "film"}', None, 200, ""),
        (b"inputs\nfilm\nbad film\n", "text/csv; charset=utf-8", 200, ""),
        (b"text\nfilm\n", "text/csv", 400, "`inputs`"),
        (b"film", "text/plain", 400, "not text/plain"),
        (b"{", "application/json", 400, "Expecting"),
        (b"\xff", "application/json", 400, "decode"),
        (b"[" * 4000, "application/json", 400, "recursion"),
        (b"{}", "application/json", 400, "inputs"),
        (b'{"inputs": []}', "application/json", 400, "inputs"),
        (b'{"inputs": ["a", " "]}', "application/json", 400, "inputs.1: the text is empty"),
        (b'{"inputs": "film", "parameters": {"top_p": 1}}', "application/json", 400, "parameters.top_p"),
        (b'{"inputs": ["a", "a", "a", "a"]}', "application/json", 413, "4 inputs"),
    ],
)
def test_what_a_body_may_be(
    start: Callable[..., TestClient], url: Any, content: bytes, kind: str | None, status: int, words: str
) -> None:
    client = start()
    client.post("/models", json=url("one"))
    response = client.post("/models/one/invoke", content=content, headers={"Content-Type": kind} if kind else {})
    if status == 200:
        assert response.status_code == 200, response.text
        return
    found = failure(response)
    assert found[0] == status
    assert words in found[1]


def test_a_model_of_no_task_reads_and_writes_as_it_likes(start: Callable[..., TestClient], url: Any) -> None:
    client = start(finds=True)
    headers = {"Content-Type": "application/x-npy", "Accept": "text/csv"}
    answer = client.post("/models/mirror/invoke", content=b"\xff\x00", headers=headers)
    assert answer.content == b"application/x-npy text/csv \xff\x00"
    assert answer.headers["Content-Type"].startswith("text/csv")


def test_a_model_is_loaded_on_first_use_by_path_and_by_header(start: Callable[..., TestClient], tmp_path: Path) -> None:
    client = start(finds=True)
    for name in ("one", "mirror", "mirror.tar.gz"):
        assert client.post(f"/models/{name}/invoke", json="film").status_code == 200
        assert client.post("/invocations", json="film", headers={TARGET: name}).status_code == 200
    listed = client.get("/models").json()["models"]
    assert [(one["modelName"], one["hits"]) for one in listed] == [("mirror.tar.gz", 4), ("one", 2)]
    assert client.get("/models/mirror").json()["modelName"] == "mirror.tar.gz"
    (tmp_path / "ünï").mkdir()
    assert client.post("/invocations", json="film", headers={TARGET: "ünï".encode()}).status_code == 200
    assert failure(client.post("/invocations", json="film"))[0] == 400
    for name in ("none", "broken"):
        response = client.post("/invocations", json="film", headers={TARGET: name})
        assert failure(response)[0] == (500 if name == "broken" else 404)
    assert client.post("/models", json={"model_name": "two"}).status_code == 200
    assert failure(client.post("/models", json={"model_name": "two", "url": "/etc"}))[0] == 400
    assert client.delete("/models/mirror").status_code == 200


def test_the_description_has_the_platforms_routes(start: Callable[..., TestClient]) -> None:
    paths = json.loads(start().get("/openapi.json").content)["paths"]
    assert {"/models", "/models/{name}", "/models/{name}/invoke", "/invocations", "/ping"} <= set(paths)
    assert "/inference" not in paths


PATHS = [("GET", "/models"), ("POST", "/models/one/invoke"), ("POST", "/invocations"), ("DELETE", "/models/one")]


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize(
    ("headers", "body", "status", "kind"),
    [
        ({"X-API-Key": "wrong"}, b"", 401, "UnauthorizedError"),
        ({}, bytes(5000), 413, "TooLargeError"),
        ({"Content-Encoding": "br"}, b"{}", 415, "EncodingError"),
        ({"Content-Encoding": "gzip"}, b"{}", 400, "InvalidInputError"),
        ({"Transfer-Encoding": "gzip"}, b"", 501, "FramingError"),
    ],
)
def test_what_never_comes_to_a_route_is_refused_in_the_platforms_words(
    start: Callable[..., TestClient],
    method: str,
    path: str,
    headers: dict[str, str],
    body: bytes,
    status: int,
    kind: str,
) -> None:
    client = start(changed={"api_key": SecretStr("right")})
    headers = {"X-API-Key": "right", **headers}
    found = client.request(method, path, content=body, headers=headers)
    assert failure(found)[0] == status
    assert found.json()["type"] == kind
    assert ("WWW-Authenticate" in found.headers) is (status == 401)
    elsewhere = client.request("GET", "/model", content=body, headers=headers)
    assert "detail" in elsewhere.json()  # the adapter speaks for its routes alone


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_a_body_that_does_not_come_is_refused_in_the_platforms_words(
    start: Callable[..., TestClient], method: str, path: str
) -> None:
    app: Any = start(changed={"request_timeout_s": 0.01}).app
    sent = asyncio.run(exchange(app, method, path, headers=[(b"host", b"a"), (b"content-length", b"9")]))
    assert (sent[0]["status"], json.loads(sent[1]["body"])["type"]) == (408, "BodyTimeoutError")


def test_an_error_that_nobody_foresaw_is_told_in_the_platforms_words(start: Callable[..., TestClient]) -> None:
    found = start(finds=True).post("/models/mirror/invoke", content=b"fail")
    assert failure(found) == (500, "Something went wrong inside; the server's log says what.")


async def exchange(app: Any, method: str, path: str, *messages: Any, headers: Any = None) -> list[Any]:
    """What the application sends to a client that sends these messages, or waits for these events, and no more."""
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"http_version": "1.1", "headers": headers or [(b"host", b"a")], "scheme": "http", "root_path": ""}
    left, sent = list(messages), list[Any]()

    async def receive() -> Any:
        while left and isinstance(left[0], Callable):  # type: ignore[arg-type]
            if left[0](sent):
                left.pop(0)
            await asyncio.sleep(0)
        return left.pop(0) if left else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        await asyncio.sleep(0)
        sent.append(message)

    await app({**scope, "asgi": {"version": "3.0", "spec_version": "2.3"}}, receive, send)
    return sent


@pytest.mark.parametrize("path", ["/models/writes/invoke", "/invocations"])
def test_text_is_streamed_by_name(start: Callable[..., TestClient], path: str) -> None:
    client = start(finds=True)
    asked = {"inputs": "one two three", "stream": True, "more": 1}
    with client.stream("POST", path, json=asked, headers={TARGET: "writes"}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert answer.headers["X-Model-Version"] == "writes"
    events = [json.loads(line.removeprefix("data:")) for line in lines]
    assert [one["token"]["text"] for one in events] == ["one", " two", " three"]
    assert [one["generated_text"] for one in events] == [None, None, "one two three"]
    whole = client.post(path, json=asked | {"stream": False}, headers={TARGET: "writes"})
    assert whole.json() == [{"generated_text": "one two three"}]


@pytest.mark.parametrize(
    ("name", "body", "status", "words"),
    [
        ("one", {"inputs": ["film", "film"], "stream": True}, 200, "label"),
        ("mirror", {"inputs": "film", "stream": True}, 200, '"stream"'),
        ("writes", {"inputs": ["a", "b"], "stream": True}, 400, "only one text can be streamed"),
        ("writes", {"inputs": "a", "stream": "perhaps"}, 400, "stream: Input should be a valid boolean"),
        ("writes", {"inputs": " ", "stream": True}, 400, "inputs.0: the text is empty"),
        ("none", {"inputs": "a", "stream": True}, 404, "There is no model 'none' here."),
    ],
)
def test_what_cannot_be_streamed_is_answered_whole_or_refused(
    start: Callable[..., TestClient], name: str, body: Any, status: int, words: str
) -> None:
    found = start(finds=True).post(f"/models/{name}/invoke", json=body)
    assert found.status_code == status
    assert words in (found.text if status == 200 else failure(found)[1])


def test_who_hangs_up_on_a_stream_frees_the_model(start: Callable[..., TestClient], writing: Writing) -> None:
    app: Any = start(finds=True).app

    async def hang_up() -> list[Any]:
        body = {"type": "http.request", "body": b'{"inputs": "on", "stream": true}'}
        sent = await exchange(
            app, "POST", "/models/writes/invoke", body, lambda sent: len(sent) > 3, {"type": "http.disconnect"}
        )
        for _ in range(3):
            await asyncio.sleep(0)
        assert writing.under_way == 0
        return sent

    sent = asyncio.run(hang_up())
    assert sent[0]["status"] == 200
    assert writing.steps == pytest.approx(len(sent), abs=5)
    assert TestClient(app).delete("/models/writes").status_code == 200  # which waits for all that hold it
