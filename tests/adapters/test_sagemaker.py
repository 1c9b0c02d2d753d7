"""SageMaker's hosting and batch transform, in process: what a body may be, and what comes back."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from wire import Client, Full, counts, write

from tuneserve.adapters.catalog import adapters_of
from tuneserve.adapters.platforms import start_of
from tuneserve.adapters.sagemaker import Hosting
from tuneserve.errors import SettingsError
from tuneserve.serving.http.app import create_app
from tuneserve.serving.service import Service
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings

Ask = Callable[..., Any]
LINES = "application/jsonlines"


def client_of(settings: Settings, slot: Slot, *, max_inputs: int = 4096, **options: Any) -> TestClient:
    settings = settings.model_copy(update={"max_body_kb": 64})
    return TestClient(
        create_app(settings, Service.of(slot, max_inputs=max_inputs), None, adapters=[Hosting(**options)])
    )


@pytest.fixture
def ask(settings: Settings, slot: Slot) -> Ask:
    def send(content: Any, kind: str | None = "application/json", accept: str = "", **options: Any) -> Any:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Type": kind} if kind else {}
        client = client_of(settings, slot, **options)
        return client.post("/invocations", content=body, headers=headers | ({"Accept": accept} if accept else {}))

    return send


def failure(response: Any) -> tuple[int, str]:
    body = response.json()
    assert set(body) == {"code", "type", "message"}
    assert body["code"] == response.status_code
    return response.status_code, body["message"]


def test_a_ping_is_200_with_a_model_503_without_and_has_no_body(settings: Settings, slot: Slot) -> None:
    loading = Slot()
    for one, status in ((slot, 200), (loading, 503)):
        ping = client_of(settings, one).get("/ping")
        assert (ping.status_code, ping.content) == (status, b"")
    assert failure(client_of(settings, loading).post("/invocations", json="film"))[0] == 503
    slot.fail(RuntimeError("dead"))
    assert client_of(settings, slot).get("/ping").status_code == 503


def test_a_transform_learns_how_to_ask(settings: Settings, slot: Slot) -> None:
    found = client_of(settings, slot, max_payload_mb=20).get("/execution-parameters").json()
    assert found == {"MaxConcurrentTransforms": 1, "BatchStrategy": "MULTI_RECORD", "MaxPayloadInMB": 20}


@pytest.mark.parametrize(
    ("content", "kind", "count"),
    [
        ({"inputs": "film"}, "application/json", 1),
        ({"inputs": ["film", "bad film"], "more": 1}, None, 2),
        (b'inputs\nfilm\n"bad, film"\n', "text/csv; charset=utf-8", 2),
    ],
)
def test_requests_are_answered_as_pipelines_do(ask: Ask, content: Any, kind: str | None, count: int) -> None:
    answer = ask(content, kind)
    assert answer.headers["Content-Type"] == "application/json"
    assert [set(one) for one in answer.json()] == [{"label", "score"}] * count


def test_a_table_of_answers_has_the_keys_for_its_head(ask: Ask) -> None:
    for answer in (ask({"inputs": ["film", "bad"]}, accept="text/csv"), ask(["film", "bad"], accept="x/y, text/csv")):
        assert answer.headers["Content-Type"].startswith("text/csv")
        rows = list(csv.DictReader(io.StringIO(answer.text)))
        assert [set(row) for row in rows] == [{"label", "score"}] * 2
    status, words = failure(ask("film", accept="image/png"))
    assert status == 406
    assert "image/png" in words
    assert failure(ask({"inputs": ["a"], "parameters": {"top_k": None}}, accept="text/csv"))[0] == 406


def test_all_scores_stand_in_the_order_of_the_labels_and_ranked_ones_by_their_score(ask: Ask) -> None:
    film = ask({"inputs": "film"}).json()[0]["label"]
    assert film == "good"  # which is not the first label
    every = ask({"inputs": "film", "parameters": {"return_all_scores": True}}).json()
    assert [[one["label"] for one in row] for row in every] == [["bad", "good"]]
    several = ask({"inputs": ["film", "a"], "parameters": {"return_all_scores": True}}).json()
    assert [[one["label"] for one in row] for row in several] == [["bad", "good"]] * 2
    ranked = ask({"inputs": "film", "parameters": {"top_k": None}}).json()
    assert [one["label"] for one in ranked] == ["good", "bad"]


def test_what_a_client_accepts_may_be_said_by_the_server(settings: Settings, slot: Slot) -> None:
    client = client_of(settings, slot, accept="text/csv")
    for headers in ({}, {"Accept": "*/*"}):
        assert client.post("/invocations", json="film", headers=headers).headers["Content-Type"].startswith("text/csv")
    said = {"Accept": "application/json"}
    assert client.post("/invocations", json="film", headers=said).headers["Content-Type"] == "application/json"


LINES_IN = [b"film", b'"a ""good"" film, and more"', b"a,b", b"", b'"', b" ", "gröss".encode(), b"\xff", b"last"]
BAD = {2: "2 fields", 3: "0 fields", 4: "end of data", 5: "empty", 7: "utf-8"}


@pytest.mark.parametrize("end", [b"\n", b"", b"\r\n"])
@pytest.mark.parametrize("accept", ["", "text/csv"])
def test_a_transform_has_a_line_out_for_each_line_in(ask: Ask, end: bytes, accept: str) -> None:
    body = (b"\r\n" if end == b"\r\n" else b"\n").join(LINES_IN) + end
    answer = ask(body, "text/csv", accept, batch=True)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith(accept or LINES)
    assert answer.content.endswith(b"\n")
    lines = answer.text.split("\n")[:-1]
    assert len(lines) == len(LINES_IN)
    for index, line in enumerate(lines):
        found = next(csv.reader([line])) if accept else json.loads(line)
        if index in BAD:
            assert (found[0] if accept else next(iter(found))) == "error"
            assert BAD[index] in (found[1] if accept else found["error"])
        else:
            [label, score] = found if accept else [found[0]["label"], found[0]["score"]]
            assert label in ("bad", "good")
            assert 0.5 <= float(score) <= 1


def test_lines_come_back_in_order_however_many_they_are(ask: Ask, engine: Any) -> None:
    texts = [("film " * (1 + number % 5)).strip() for number in range(600)]
    body = b"".join(json.dumps({"inputs": text, "id": 1}).encode() + b"\n" for text in texts)
    lines = [json.loads(line) for line in ask(body, LINES, max_inputs=10).text.splitlines()]
    alone = {text: ask({"inputs": text}).json() for text in set(texts)}
    assert len({json.dumps(one) for one in alone.values()}) == 5
    assert lines == [alone[text] for text in texts]


def test_json_lines_are_read_outside_of_a_transform_too(ask: Ask) -> None:
    body = b'"film"\n{"inputs": ["a", "b"], "parameters": {"top_k": null}}\n{\n{"inputs": 5}\n'
    first, both, *bad = [json.loads(line) for line in ask(body, "application/x-ndjson").text.splitlines()]
    assert set(first[0]) == {"label", "score"}
    assert [len(one) for one in both] == [2, 2]
    assert [set(one) for one in bad] == [{"error"}] * 2
    assert ask(b"", LINES).content == b""
    texts = ask(b"film\nbad, film\n", "text/plain", batch=True).text.splitlines()
    assert [len(json.loads(line)) for line in texts] == [1, 1]
    assert failure(ask(b"film\n", "text/plain"))[0] == 400
    assert failure(ask(b"film\nbad\n", "text/csv"))[1].startswith("content: a table has a row `inputs`")


@pytest.mark.parametrize(
    ("request_of", "status", "words"),
    [
        (lambda: write(b"x" * 5000, path="/invocations"), 413, "4 KiB"),
        (lambda: write(b"x", "Content-Encoding: br", path="/invocations"), 415, "gzip"),
        (lambda: write(b"{", path="/invocations"), 400, "Expecting"),
        (lambda: write(b'{"inputs": ["good", " "]}', path="/invocations"), 400, "inputs.1: the text is empty"),
    ],
)
def test_every_error_has_the_toolkits_form(
    fill: Callable[..., Full], request_of: Callable[[], bytes], status: int, words: str
) -> None:
    full = fill(adapters=[Hosting()])
    client = full.connect()
    full.make_room()
    client.send(request_of())
    found, headers, body = client.read()
    assert (found, headers["content-type"]) == (status, "application/json")
    content = json.loads(body)
    assert set(content) == {"code", "type", "message"}
    assert content["code"] == status
    assert words in content["message"]


def test_a_full_queue_says_so_in_that_form_before_the_body_is_read(fill: Callable[..., Full]) -> None:
    full = fill(adapters=[Hosting()])
    client: Client = full.connect()
    client.send(b"POST /invocations HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n")
    status, headers, body = client.read()
    assert (status, json.loads(body)["type"]) == (429, "OverloadedError")
    assert int(headers["retry-after"]) >= 1
    assert counts(full.slot)["/invocations", "429"] == 1


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "ml" / "model").mkdir(parents=True)
    return tmp_path / "ml"


def variables(base: Path, **environ: str) -> dict[str, str]:
    start = start_of("serve", {"PLATFORM": "sagemaker", "SAGEMAKER_BASE_DIR": str(base), **environ})
    return dict(start.variables())


def test_the_platforms_variables_become_ours(base: Path) -> None:
    (base / "model" / "config.json").write_text("{}")
    assert variables(base) == {"PORT": "8080", "MAX_BODY_KB": "6144", "REQUEST_TIMEOUT_S": "60"}
    said = {"SAGEMAKER_BIND_TO_PORT": "9090", "SAGEMAKER_BATCH": "true", "SAGEMAKER_MAX_PAYLOAD_IN_MB": "20"}
    assert variables(base, **said) == {"PORT": "9090", "MAX_BODY_KB": "20480", "REQUEST_TIMEOUT_S": "600"}
    assert variables(base, SAGEMAKER_MAX_PAYLOAD_IN_MB="0")["MAX_BODY_KB"] == "102400"
    assert variables(base, SAGEMAKER_MODEL_SERVER_TIMEOUT="30")["REQUEST_TIMEOUT_S"] == "30"
    with pytest.raises(SettingsError, match="API_KEY"):
        variables(base, API_KEY="secret")
    (base / "model" / "code").mkdir()
    (base / "model" / "code" / "inference.py").write_text("")
    assert variables(base, HF_TASK="fill-mask")["HF_TASK"] == ""
    assert "HF_TASK" not in variables(base, HF_TASK="text-generation")


def test_without_a_models_data_the_hub_or_the_image_has_it(base: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="HF_MODEL_ID"):
        variables(base, MODEL_PATH=str(tmp_path))
    found = variables(base, HF_MODEL_ID="owner/name", HF_MODEL_REVISION="v1", HF_API_TOKEN="hf_x")
    assert (found["MODEL"], found["MODEL_REVISION"], found["HF_TOKEN"]) == ("owner/name", "v1", "hf_x")
    assert "MODEL" not in variables(base, MODEL="/models/baked")
    assert "MODEL" not in variables(base, SAGEMAKER_MULTI_MODEL="true")
    (tmp_path / "champion").write_text("x")
    assert "MODEL" not in variables(base, MODEL_PATH=str(tmp_path))


def test_only_the_platforms_own_verbs_are_changed_and_only_there(base: Path) -> None:
    environ = {"PLATFORM": "sagemaker", "SAGEMAKER_BASE_DIR": str(base)}
    for verb, more in (("predict", {}), ("", {}), ("train", {"TORCHELASTIC_RUN_ID": "1"}), ("serve", {"PLATFORM": ""})):
        assert start_of(verb, environ | more).variables() == {}
    found, usual = (Settings.from_environ(one) for one in (environ, {}))
    assert len(adapters_of(found, environ=environ)) == len(adapters_of(usual)) + 1


def test_a_transform_is_told_by_its_variables() -> None:
    environ = {"SAGEMAKER_BATCH": "true", "SAGEMAKER_DEFAULT_INVOCATIONS_ACCEPT": "text/csv"}
    assert Hosting.of(environ) == Hosting(batch=True, accept="text/csv", max_payload_mb=6)
