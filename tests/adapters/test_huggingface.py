"""What Hugging Face's, text-embeddings-inference's and OpenAI's clients send, in process."""

import base64
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from pydantic import SecretStr

from tuneserve.adapters.catalog import adapters_of
from tuneserve.settings import Settings

Ask = Callable[..., TestClient]


def test_a_classifier_answers_a_list_of_labels_for_each_text_at_the_root(ask: Ask) -> None:
    client = ask()
    scores = client.post("/inference", json={"text": "film"}).json()["scores"]
    ranked = [{"label": label, "score": scores[label]} for label in ("good", "bad")]
    asked = {"inputs": "film", "parameters": {"top_k": None, "function_to_apply": None}}
    assert client.post("/", json=asked).json() == [ranked]
    assert client.post("/", json={"inputs": ["film", "film"]}).json() == [ranked, ranked]
    assert client.post("/", json={"inputs": "film", "parameters": {"top_k": 1}}).json() == [ranked[:1]]
    assert client.post("/predict", json={"inputs": "film"}).json() == ranked
    assert client.post("/predict", json={"inputs": ["film"], "raw_scores": False}).json() == ranked
    assert client.post("/predict", json={"inputs": [["film"], ["film"]], "truncate": True}).json() == [ranked, ranked]


def test_vectors_are_lists_of_lists_and_openais_have_their_form(ask: Ask) -> None:
    client = ask("feature-extraction", model_name="m")
    asked = {"inputs": "film", "normalize": None, "truncate": True, "parameters": {}}
    assert client.post("/", json=asked).json() == [[4, 1]]
    assert client.post("/", json={"inputs": ["film", "a"]}).json() == [[4, 1], [1, 1]]
    assert client.post("/embed", json={"inputs": "film"}).json() == [[4, 1]]
    answer = client.post("/v1/embeddings", json={"input": ["film", "a"], "model": "any", "user": "u"})
    assert answer.json() == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [4, 1]},
            {"object": "embedding", "index": 1, "embedding": [1, 1]},
        ],
        "model": "m",
        "usage": {"prompt_tokens": 6, "total_tokens": 6},
    }
    answer = client.post("/v1/embeddings", json={"input": "film", "encoding_format": "base64", "dimensions": 2})
    packed = base64.b64decode(answer.json()["data"][0]["embedding"])
    assert np.frombuffer(packed, "<f4").tolist() == [4, 1]


@pytest.mark.parametrize(
    ("task", "form"), [("summarization", "summary_text"), ("text-generation", "generated_text")]
)  # fmt: skip
def test_what_is_written_has_its_tasks_form_and_can_be_streamed(ask: Ask, task: str, form: str) -> None:
    client = ask(task)
    assert client.post("/", json={"inputs": "a film"}).json() == [{form: "A FILM"}]
    answer = client.post("/", json={"inputs": "a film", "stream": True, "parameters": {"max_new_tokens": 5}})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[5:]) for line in answer.text.splitlines() if line]
    assert "".join(one["token"]["text"] for one in events) == events[-1]["generated_text"] == "A FILM"


WRONG = {
    "no inputs": ("", "/", {}, 422, "Validation"),
    "numbers": ("", "/", {"inputs": [1]}, 422, "Validation"),
    "an empty text": ("", "/", {"inputs": ""}, 422, "Validation"),
    "too many texts": ("", "/", {"inputs": ["a"] * 5}, 413, "Validation"),
    "another function": ("", "/", {"inputs": "a", "parameters": {"function_to_apply": "sigmoid"}}, 422, "Validation"),
    "a key that is no text": ("", "/", {"inputs": "a", "parameters": {"\ud800": 1}}, 422, "Validation"),
    "a pair": ("", "/predict", {"inputs": ["a", "b"]}, 422, "Validation"),
    "a pair in a batch": ("", "/predict", {"inputs": [["a"], ["a", "b"]]}, 422, "Validation"),
    "raw scores": ("", "/predict", {"inputs": "a", "raw_scores": True}, 422, "Validation"),
    "a long text that is not to be cut": ("", "/predict", {"inputs": "a " * 99, "truncate": False}, 422, "Validation"),
    "vectors of a classifier": ("", "/v1/embeddings", {"input": "a"}, 404, ""),
    "labels of an embedder": ("feature-extraction", "/predict", {"inputs": "a"}, 404, "Validation"),
    "an engine that fails": ("feature-extraction", "/", {"inputs": "fail"}, 424, "Backend"),
    "token ids": ("feature-extraction", "/v1/embeddings", {"input": [1, 2]}, 422, ""),
    "other dimensions": ("feature-extraction", "/v1/embeddings", {"input": "a", "dimensions": 3}, 422, ""),
    "another encoding": ("feature-extraction", "/v1/embeddings", {"input": "a", "encoding_format": "x"}, 422, ""),
    "two streams": ("text-generation", "/", {"inputs": ["a", "b"], "stream": True}, 422, "Validation"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_as_the_client_reads_it(ask: Ask, name: str) -> None:
    task, path, body, status, kind = WRONG[name]
    answer = ask(task, max_batch_texts=4).post(path, content=json.dumps(body))
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    if kind:
        assert answer.json()["error_type"] == kind
        assert error
    else:
        assert error.keys() == {"message", "type", "code"}


def test_health_and_info(ask: Ask) -> None:
    client = ask(model_name="reviews")
    assert (client.get("/health").status_code, client.get("/health").content) == (200, b"")
    info = client.get("/info").json()
    assert (info["model_id"], info["model_type"]["classifier"]["id2label"]) == ("reviews", {"0": "bad", "1": "good"})


BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


ACCEPTS = [
    (BROWSER, True),
    ("text/html", True),
    ("application/json;q=0.5, text/html;q=0.7", True),
    ("", False),
    ("*/*", False),
    ("application/json, text/plain, */*", False),
    ("text/html;q=0.5, application/json", False),
    ("text/html;q=0", False),
    ("text/html;q=nan", False),
    ("text/html;q=" + "9" * 5000, False),
]


def test_the_root_is_a_page_for_browsers_and_json_for_everybody_else(ask: Ask) -> None:
    client = ask()
    for accept, html in ACCEPTS:
        answer: Any = client.get("/", headers={"Accept": accept})
        assert (answer.status_code, answer.headers["vary"]) == (200, "Accept"), accept
        assert answer.headers["content-type"].startswith("text/html") is html, accept
        if html:
            assert "default-src 'none'" in answer.headers["content-security-policy"]
        else:
            assert (answer.json()["status"], bool(answer.json()["message"])) == ("alive", True)


@pytest.mark.parametrize("path", ["/inference", "/inference/"])
def test_the_first_systems_reply_has_labels_for_keys_and_strings_for_values(ask: Ask, path: str) -> None:
    full = ask().post("/inference", json={"text": "film"}).json()["scores"]
    client = ask(inference_reply="ancestor")
    answer = client.post(path, json={"text": "film"}).json()
    assert answer == {label: str(round(full[label], 4)) for label in ("good", "bad")}
    assert client.post(path, json={"text": ""}).status_code == 422
    assert "predictions" in client.post("/inference/batch", json={"texts": ["film"]}).json()
    assert (
        ask("feature-extraction", inference_reply="ancestor").post("/inference", json={"text": "a"}).status_code == 404
    )


def test_vertex_asks_where_it_says(ask: Ask) -> None:
    plain = ask()
    assert plain.post("/vertex/predict", json={}).status_code == 404
    # These are Hugging Face's otherwise: the path that was asked for by name wins.
    client = ask(aip_health_route="/health", aip_predict_route="/predict/")
    assert client.get("/health/").json() == client.get("/health").json() == {"ready": True}
    wanted = plain.post("/inference/batch", json={"texts": ["film", ""]}).json()
    for instances in (["film", ""], [{"text": "film"}, {"text": ""}]):
        for path in ("/predict", "/predict/"):
            assert client.post(path, json={"instances": instances, "parameters": {}}).json() == wanted
    assert client.post("/predict", json={"inputs": "film"}).json().keys() == {"error"}


def test_its_variables_are_read_and_its_port_wins() -> None:
    environ = {"AIP_HTTP_PORT": "8080", "PORT": "9000", "AIP_HEALTH_ROUTE": "/v1/endpoints/1/deployedModels/2"}
    environ["AIP_PREDICT_ROUTE"] = "/v1/endpoints/1/deployedModels/2:predict"
    settings = Settings.from_environ(environ)
    assert settings.port == 8080
    assert len(adapters_of(settings)) == len(adapters_of(Settings.from_environ({}))) + 1


def test_the_hubs_own_client_is_answered_at_the_servers_address(serve: Callable[..., str]) -> None:
    url = serve(api_key=SecretStr("k"))
    client = InferenceClient(url, token="k")
    found = client.text_classification("film")
    assert [one.label for one in found] == ["good", "bad"]
    assert sum(one.score for one in found) == pytest.approx(1)
    assert len(client.text_classification("film", top_k=1)) == 1
    with pytest.raises(HfHubHTTPError, match="the text is empty"):
        client.text_classification("")
    with pytest.raises(HfHubHTTPError, match="API key"):
        InferenceClient(url, token="another").text_classification("film")


def test_the_hubs_own_client_gets_vectors(serve: Callable[..., str]) -> None:
    client = InferenceClient(serve("feature-extraction"))
    assert client.feature_extraction("film", normalize=True, truncate=True).tolist() == [[4, 1]]
    assert client.feature_extraction(["film", "a"]).tolist() == [[4, 1], [1, 1]]


def test_the_hubs_own_client_gets_what_is_written(serve: Callable[..., str]) -> None:
    summary = InferenceClient(serve("summarization")).summarization(
        "a film", clean_up_tokenization_spaces=True, generate_parameters={"max_new_tokens": 5}
    )
    assert summary.summary_text == "A FILM"
    client = InferenceClient(serve("text-generation"))
    assert client.text_generation("a film", max_new_tokens=5) == "A FILM"
    assert client.text_generation("a film", return_full_text=True) == "a filmA FILM"
    assert "".join(client.text_generation("a film", stream=True)) == "A FILM"
