"""The Open Inference Protocol in process: shapes, the binary form, errors, keys and backpressure."""

import json
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr
from wire import Full, app_of, counts

from tuneserve.adapters.catalog import adapters_of
from tuneserve.errors import StoreError
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings

Ask = Callable[..., TestClient]
INFER = "/v2/models/model/infer"
LENGTH = "Inference-Header-Content-Length"
VERSION = "20260102T030405Z-0a1b2c3d"


def tensor(data: Any, shape: list[int] | None = None, **more: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "text", "shape": shape or [len(data)], "datatype": "BYTES", "data": data}], **more}


def packed(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(one)) + one for one in elements)


def binary(content: bytes, count: int = 1, *, size: Any = None, length: Any = None, **more: Any) -> dict[str, Any]:
    said = {"binary_data_size": len(content) if size is None else size}
    given = {"name": "text", "shape": [count], "datatype": "BYTES", "parameters": said}
    head = json.dumps({"inputs": [given], **more}).encode()
    return {"content": head + content, "headers": {LENGTH: str(len(head) if length is None else length)}}


def unpacked(content: bytes) -> list[bytes]:
    found, begin = [], 0
    while begin < len(content):
        [size] = struct.unpack_from("<I", content, begin)
        found.append(content[begin + 4 : begin + 4 + size])
        begin += 4 + size
    return found


def outputs(answer: Any) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return {one["name"]: one for one in answer.json()["outputs"]}


def test_health_and_metadata(ask: Ask) -> None:
    client = ask(model_name="reviews")
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2/models").json() == client.get("/v1/models").json() == {"models": ["reviews"]}
    for path in ("/v1/models/reviews", "/v2/models/reviews/ready", f"/v2/models/reviews/versions/{VERSION}/ready"):
        assert client.get(path).json() == {"name": "reviews", "ready": True}
    assert client.get("/v2/models/reviews").json() == client.get(f"/v2/models/reviews/versions/{VERSION}").json()
    assert client.get("/v2/models/reviews").json() == {
        "name": "reviews",
        "versions": [VERSION],
        "platform": "tuneserve",
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
            {"name": "scores", "datatype": "FP32", "shape": [-1, 2], "parameters": {"labels": ["bad", "good"]}},
        ],
    }


@pytest.mark.parametrize(
    "path",
    [
        *(f"/v2/models/{one}{behind}" for one in ("other", "model/versions/2") for behind in ("", "/ready", "/infer")),
        "/v1/models/other",
        "/v1/models/other:predict",
    ],
)
def test_another_model_or_version_is_404_in_the_protocols_words(ask: Ask, path: str) -> None:
    body = tensor(["film"]) | {"instances": ["film"]}
    client = ask()
    answer = client.post(path, json=body) if path.endswith(("/infer", ":predict")) else client.get(path)
    assert answer.status_code == 404
    assert answer.json().keys() == {"error"}
    assert "'model'" in answer.json()["error"]


@pytest.mark.parametrize("data", [["film", "good film"], [["film"], ["good film"]], [["film", "good film"]]])
def test_an_answer_is_that_of_the_models_own_route(ask: Ask, data: Any) -> None:
    client = ask()
    wanted = client.post("/inference/batch", json={"texts": ["film", "good film"]}).json()["predictions"]
    shape = [2] if isinstance(data[0], str) else [len(data), len(data[0])]
    answer = client.post(INFER, json=tensor(data, shape, id="mine"))
    found = outputs(answer)
    assert (answer.json()["id"], answer.json()["model_name"], answer.json()["model_version"]) == (
        "mine",
        "model",
        VERSION,
    )
    assert found["label"] == {
        "name": "label",
        "datatype": "BYTES",
        "shape": [2],
        "data": [one["label"] for one in wanted],
    }
    assert found["scores"]["shape"] == [2, 2]
    assert found["scores"]["data"] == pytest.approx([score for one in wanted for score in one["scores"].values()])
    assert client.post(f"/v2/models/model/versions/{VERSION}/infer", json=tensor(["film"])).status_code == 200
    unnamed = client.post(INFER, json=tensor(["film"]), headers={"X-Request-Id": "r1"})
    assert unnamed.json()["id"] == "r1"
    assert outputs(client.post(INFER, json=tensor(["film"], outputs=[{"name": "scores"}]))).keys() == {"scores"}


def test_binary_inputs_and_outputs_say_the_same_as_json(ask: Ask) -> None:
    client, texts = ask(), ["film", "très bon", "good"]
    wanted = outputs(client.post(INFER, json=tensor(texts)))
    sent = binary(packed(*(one.encode() for one in texts)), 3)
    assert outputs(client.post(INFER, **sent)) == wanted
    sent = binary(packed(*(one.encode() for one in texts)), 3, parameters={"binary_data_output": True})
    answer = client.post(INFER, **sent)
    size = int(answer.headers[LENGTH])
    assert answer.headers["content-type"] == "application/octet-stream"
    label, scores = json.loads(answer.content[:size])["outputs"]
    assert {"data"}.isdisjoint(label.keys() | scores.keys())
    middle = size + label["parameters"]["binary_data_size"]
    assert [one.decode() for one in unpacked(answer.content[size:middle])] == wanted["label"]["data"]
    assert len(answer.content) - middle == scores["parameters"]["binary_data_size"] == 3 * 2 * 4
    assert np.frombuffer(answer.content[middle:], "<f4").tolist() == pytest.approx(wanted["scores"]["data"])
    mixed = tensor(["film"], outputs=[{"name": "scores", "parameters": {"binary_data": True}}, {"name": "label"}])
    answer = client.post(INFER, json=mixed)
    scores, label = json.loads(answer.content[: int(answer.headers[LENGTH])])["outputs"]
    assert (scores["name"], "data" in scores, label["data"]) == ("scores", False, ["good"])


@pytest.mark.parametrize(
    ("task", "datatype", "shape", "data", "prediction"),
    [
        ("feature-extraction", "FP32", [2, 2], [0.8, 0.6, 1, 0], None),
        ("summarization", "BYTES", [2], ["A FILM", "FOOD"], "A FILM"),
        ("text-generation", "BYTES", [2], ["A FILM", "FOOD"], "A FILM"),
    ],
)
def test_the_other_tasks_have_their_outputs(
    ask: Ask, task: str, datatype: str, shape: list[int], data: Any, prediction: Any
) -> None:
    client = ask(task)
    [about] = client.get("/v2/models/model").json()["outputs"]
    texts = ["a film", "food"]
    [found] = outputs(client.post(INFER, json=tensor(texts))).values()
    assert (found["name"], found["datatype"], found["shape"]) == (about["name"], datatype, shape)
    answer = client.post("/v1/models/model:predict", json={"instances": ["a film", {"text": ""}]}).json()
    assert answer["predictions"][1] == {"error": "the text is empty"}
    if task == "feature-extraction":
        found["data"] = np.array(found["data"]).reshape(2, 2).tolist()
        assert found["data"] == [[6, 1], [4, 1]]
        assert answer["predictions"][0] == [6, 1]
    else:
        assert found["data"] == data
        assert answer["predictions"][0] == prediction


def test_version_1_predicts_each_instance_and_a_bad_text_fails_alone(ask: Ask) -> None:
    client = ask()
    wanted = client.post("/inference/batch", json={"texts": ["film", "", "good"]}).json()["predictions"]
    for instances in (["film", "", "good"], [{"text": "film"}, {"inputs": ""}, "good"]):
        answer = client.post("/v1/models/model:predict", json={"instances": instances, "parameters": None})
        assert answer.json() == {"predictions": wanted}
    assert ("label" in wanted[0], "error" in wanted[1]) == (True, True)


WRONG = {
    "no JSON": ({"content": b"{"}, 400, "JSON"),
    "nothing": ({"content": b""}, 400, "JSON"),
    "not UTF-8": ({"content": b"\xff" * 9}, 400, "UTF-8"),
    "no inputs": ({"json": {}}, 400, "inputs"),
    "two inputs": ({"json": {"inputs": tensor(["a"])["inputs"] * 2}}, 400, "inputs"),
    "another datatype": ({"json": {"inputs": [{**tensor([1])["inputs"][0], "datatype": "FP32"}]}}, 400, "BYTES"),
    "a shape that does not fit": ({"json": tensor(["a", "b"], [3])}, 400, "2 elements"),
    "a shape without elements": ({"json": tensor([], [0])}, 400, "at least one"),
    "a negative dimension": ({"json": tensor(["a"], [-1])}, 400, "shape"),
    "an enormous dimension": ({"json": tensor(["a"], [2**31])}, 400, "shape"),
    "many elements": ({"json": tensor(["a"], [2**31 - 1] * 8)}, 413, "the most"),
    "no strings": ({"json": tensor(["a", 5])}, 400, "inputs.0.data.1: should be a string"),
    "no list": ({"json": tensor("a", [1])}, 400, "list"),
    "no data": ({"json": tensor(None, [1])}, 400, "list"),
    "too deep": ({"content": json.dumps(tensor([], [1])).replace("[]", "[" * 90 + "]" * 90).encode()}, 400, "data"),
    "far too deep": ({"content": b'{"inputs": ' + b"[" * 3000}, 400, ""),
    "half a surrogate pair": ({"content": json.dumps(tensor(["\ud800"])).encode()}, 400, "surrogate"),
    "an id that is no text": ({"content": json.dumps(tensor(["a"], id="\ud800")).encode()}, 400, "id"),
    "an empty text": ({"json": tensor(["a", ""])}, 400, "inputs.1: the text is empty"),
    "an unknown output": ({"json": tensor(["a"], outputs=[{"name": "x"}])}, 400, "label, scores"),
    "classes": (
        {"json": tensor(["a"], outputs=[{"name": "label", "parameters": {"classification": 2}}])},
        400,
        "classification",
    ),
    "shared memory": (
        {"json": {"inputs": [{**tensor(["a"])["inputs"][0], "parameters": {"shared_memory_region": "x"}}]}},
        400,
        "shared memory",
    ),
    "too large": ({"json": tensor(["a" * 5000])}, 413, "KiB"),
    "too many texts": ({"json": tensor(["a"] * 5)}, 413, "5 texts"),
    "a length beyond the body": (binary(packed(b"a"), length=9999), 400, LENGTH),
    "a negative length": (binary(packed(b"a"), length=-1), 400, LENGTH),
    "a length of nothing": (binary(packed(b"a"), length=0), 400, LENGTH),
    "a length that is no number": (binary(packed(b"a"), length="1e2"), 400, LENGTH),
    "a length with many digits": (binary(packed(b"a"), length="9" * 5000), 400, LENGTH),
    "a length that cuts the JSON": (binary(packed(b"a"), length=20), 400, "JSON"),
    "another size": (binary(packed(b"a"), size=4), 400, "5 bytes"),
    "a negative size": (binary(packed(b"a"), size=-5), 400, "5 bytes"),
    "a size that is no number": (binary(packed(b"a"), size="5"), 400, "5 bytes"),
    "a size that is true": (binary(b"a", size=True), 400, "1 bytes"),
    "an element of 4 GiB": (binary(b"\xff\xff\xff\xffa"), 400, "4294967295 bytes"),
    "an element beyond the data": (binary(struct.pack("<I", 2) + b"a"), 400, "2 bytes"),
    "half a length": (binary(b"\1\0"), 400, "element 0 of 1 is missing"),
    "an element too few": (binary(packed(b"a"), 2), 400, "element 1 of 2 is missing"),
    "an element too many": (binary(packed(b"a", b"b")), 400, "5 bytes behind the last"),
    "an element that is not UTF-8": (binary(packed(b"\xff")), 400, "element 0 is not UTF-8"),
    "an encoded surrogate": (binary(packed(b"\xed\xa0\x80")), 400, "element 0 is not UTF-8"),
    "data and binary data": (
        {"content": (head := json.dumps(
            {"inputs": [{**tensor(["a"])["inputs"][0], "parameters": {"binary_data_size": 5}}]}
        ).encode()) + packed(b"a"), "headers": {LENGTH: str(len(head))}},
        400,
        "beside binary data",
    ),
    "bytes that nobody names": (
        {"content": (head := json.dumps(tensor(["a"])).encode()) + b"x", "headers": {LENGTH: str(len(head))}},
        400,
        "binary_data_size",
    ),
    "a time that is none": ({"json": tensor(["a"]), "headers": {"X-Request-Timeout-S": "soon"}}, 400, "Timeout"),
}  # fmt: skip


def test_what_is_wrong_is_said_in_a_sentence(ask: Ask) -> None:
    client = ask(max_batch_texts=4)
    for name, (request, status, words) in WRONG.items():
        answer = client.post(INFER, **request)
        assert answer.status_code == status, (name, answer.text)
        assert answer.headers["content-type"] == "application/json", name
        assert answer.json().keys() == {"error"}, name
        assert words in answer.json()["error"], (name, answer.text)
        assert len(answer.json()["error"]) < 600, name


def test_damaged_binary_requests_are_never_the_servers_fault(ask: Ask) -> None:
    client, chance = ask(), random.Random(17)
    whole = binary(packed(b"a film", "très".encode(), b"good"), 3, parameters={"binary_data_output": True})
    statuses = set()
    for _ in range(400):
        content, length = bytearray(whole["content"]), int(whole["headers"][LENGTH])
        for _ in range(chance.randint(1, 4)):
            where = chance.randrange(len(content))
            if (what := chance.randrange(4)) == 0:
                content[where] = chance.randrange(256)
            elif what == 1:
                del content[where : where + chance.randint(1, 20)]
            elif what == 2:
                content[where:where] = chance.randbytes(chance.randint(1, 20))
            else:
                length += chance.choice([-1, 1, chance.randint(-length, 99)])
        answer = client.post(INFER, content=bytes(content), headers={LENGTH: str(length)})
        statuses.add(answer.status_code)
        assert answer.status_code in (200, 400, 413), (content, length, answer.text)
    for _ in range(200):  # lengths that agree, around elements that do not
        elements = bytearray(packed(*(chance.randbytes(chance.randrange(3)) for _ in range(chance.randint(1, 3)))))
        elements[chance.randrange(len(elements))] = chance.choice([0, 1, 255])
        answer = client.post(INFER, **binary(bytes(elements[: chance.randint(1, 99)]), chance.randint(1, 3)))
        statuses.add(answer.status_code)
        assert answer.status_code in (200, 400), (elements, answer.text)
    assert statuses >= {200, 400}


INSTANCES = {
    "no instances": {"instances": []},
    "another key": {"inputs": ["a"]},
    "a number": {"instances": ["a", 5]},
    "an object without a text": {"instances": [{"words": "a"}]},
    "more beside the text": {"instances": [{"text": "a", "more": "b"}]},
    "parameters": {"instances": ["a"], "parameters": {"top_k": 1}},
    "a number for parameters": {"instances": ["a"], "parameters": 1},
}


def test_instances_that_are_no_texts_are_400(ask: Ask) -> None:
    client = ask()
    for name, body in INSTANCES.items():
        answer = client.post("/v1/models/model:predict", json=body)
        assert (answer.status_code, answer.json().keys()) == (400, {"error"}), name


def test_a_server_without_a_model_is_alive_and_not_ready(settings: Settings) -> None:
    with TestClient(app_of(settings, Slot(), adapters=adapters_of(settings))) as client:
        assert client.get("/v2/health/live").status_code == 200
        for path in ("/v2/health/ready", "/v2/models/model/ready", "/v1/models/model", "/v2/models/model"):
            assert client.get(path).status_code == 503
        answer = client.post(INFER, json=tensor(["film"]))
        assert (answer.status_code, answer.json().keys()) == (503, {"error"})
        assert answer.headers["Retry-After"]
        assert client.get("/").json()["status"] == "alive"
    failed = Slot()
    failed.fail(StoreError("The version is torn."))
    with TestClient(app_of(settings, failed, adapters=adapters_of(settings))) as client:
        assert (client.get("/").status_code, client.get("/").json()["status"]) == (503, "failed")
        assert (client.get("/v2/health/live").status_code, client.get("/v2/health/live").json()) == (
            503,
            {"live": False},
        )


OF_VERSION = f"/v2/models/model/versions/{VERSION}/infer"
POSTS = ["/", "/predict", "/v1/embeddings", "/vertex/predict", "/v1/models/model:predict", INFER, OF_VERSION]
VERTEX = {"aip_health_route": "/vertex/health", "aip_predict_route": "/vertex/predict"}


def test_the_key_guards_what_answers_and_not_health(ask: Ask) -> None:
    client = ask(api_key=SecretStr("k"), **VERTEX)
    described = client.get("/openapi.json").json()["paths"]
    assert set(POSTS) - {OF_VERSION} <= {path.replace("{model_name}", "model") for path in described}
    for path in POSTS:
        refused = client.post(path, json={})
        assert refused.status_code == 401, path
        assert refused.json().keys() & {"error"}, path
        for headers in ({"Authorization": "Bearer k"}, {"X-API-Key": "k"}):
            assert client.post(path, json={}, headers=headers).status_code in (400, 404, 422), path
    for path in ("/v2/health/live", "/v2/health/ready", "/health", "/vertex/health", "/"):
        assert client.get(path).status_code == 200, path
    for path in ("/v2/models/model", "/info", "/v1/models"):
        assert client.get(path).status_code == 401, path
    for path in ("/v2/health/live", "/livez", "/metrics"):
        assert client.post(path).status_code == 401, path


@pytest.mark.parametrize("path", POSTS)
def test_a_full_server_refuses_before_the_body_in_the_platforms_words(
    fill: Callable[..., Full], settings: Settings, path: str
) -> None:
    full = fill(adapters=adapters_of(settings.model_copy(update=VERTEX)))
    client = full.connect()
    client.send(f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 999\r\n\r\n".encode())
    status, headers, body = client.read()
    assert (status, json.loads(body).keys() & {"error"}) == (429, {"error"})
    assert int(headers["retry-after"]) >= 1
    route = path.replace("/model/", "/{model_name}/").replace("/model:", "/{model_name}:").replace(VERSION, "{version}")
    assert counts(full.slot)[route, "429"] == 1


def test_a_deadline_is_kept(fill: Callable[..., Full], settings: Settings, held: Any) -> None:
    slot, _ = held
    slot.model().batcher._max_queue_tokens = 10_000
    with TestClient(app_of(settings, slot, adapters=adapters_of(settings))) as client:
        answer = client.post(INFER, json=tensor(["film"]), headers={"X-Request-Timeout-S": "0.05"})
        assert (answer.status_code, answer.json().keys()) == (504, {"error"})
        answer = client.post(INFER, json=tensor(["film"], parameters={"timeout": 50_000}))
        assert answer.status_code == 504
        held[1].set()
