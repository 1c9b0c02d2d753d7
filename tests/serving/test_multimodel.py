"""The platform's API over models that come and go: statuses, error bodies, pages, and what a body may be."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from serving.conftest import EchoEngine

from tuneserve.adapters.catalog import OF_MANY
from tuneserve.artifact import Version
from tuneserve.errors import NotFoundError, StoreError
from tuneserve.serving.http.app import create_app
from tuneserve.serving.model import Model
from tuneserve.serving.registry import Registry
from tuneserve.serving.service import Service
from tuneserve.settings import Settings
from tuneserve.tasks.classifier import Classifier
from tuneserve.tasks.task import Payload, Reply

TARGET = "X-Amzn-SageMaker-Target-Model"


class Mirror(Model):
    """Belongs to no task: it reads the request itself."""

    id = "mirror"

    def room(self, wait_s: float = 0) -> None:
        return None

    async def answer(self, inputs: Any, *, deadline: float = 0) -> Any:
        [one] = inputs
        assert isinstance(one, Payload)
        said = f"{one.content_type} {one.accept} ".encode() + one.body
        return [Reply(model_version="mirror", body=said, content_type="text/csv")]


@pytest.fixture
def start(version: Version, settings: Settings, tmp_path: Path) -> Iterator[Callable[..., TestClient]]:
    def open_model(folder: Path) -> Model:
        if folder.name == "broken":
            raise StoreError("broken has no weights.")
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

    for name in ("one", "two", "mirror.tar.gz", "broken"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(bytes(1000))
    with ExitStack() as ends:

        def begin(*, finds: bool = False, **options: Any) -> TestClient:
            registry = Registry(open_model, prepare=prepare, find=find if finds else None, **options)
            ends.callback(registry.close, wait_s=30)
            service = Service({}, metrics=registry.metrics, models=registry, max_inputs=3)
            return TestClient(create_app(settings, service, None, adapters=OF_MANY))

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
    client = start(limit=1500, used=iter([0, 0, 1000, 1000]).__next__, evicts=False)
    assert client.post("/models", json=url("one")).status_code == 200
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
