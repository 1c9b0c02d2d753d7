"""Models that write: imported, served over HTTP, whole and streamed, and refused where they do not fit."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import writers
from fastapi.testclient import TestClient
from transformers import (
    AutoTokenizer,
    BartForConditionalGeneration,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
)
from transformers.pytorch_utils import Conv1D
from wire import wait_until

import tuneserve
from tuneserve.artifact import describe_files
from tuneserve.errors import BaseModelError, StoreError, TextError
from tuneserve.files import write_json
from tuneserve.network.page import Page
from tuneserve.network.wishes import Wishes
from tuneserve.serving.application import Application
from tuneserve.serving.engines import torch_writer
from tuneserve.settings import Settings
from tuneserve.tasks import generator
from tuneserve.tasks.generator import Generated, Prompt
from tuneserve.training import writing
from tuneserve.training.imported import bring_in

POSITIONS = 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model for each task that writes."""
    root = tmp_path_factory.mktemp("writers")
    return {
        "text-generation": writers.make_causal(root / "text-generation", positions=POSITIONS),
        "summarization": writers.make_pair(root / "summarization"),
    }


def settings(environment: dict[str, str], task: str, **changed: str) -> Settings:
    return Settings.from_environ(environment | {"TASK": task} | changed)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Iterator[Callable[[str], TestClient]]:
    """The server of a task, started once."""
    started: dict[str, TestClient] = {}
    with ExitStack() as held:

        def start(task: str) -> TestClient:
            if task not in started:
                chosen = settings(tiny.paths(tmp_path_factory.mktemp(task)), task, PRECISION="fp32")
                bring_in(str(folders[task]), chosen, threads=1)
                started[task] = held.enter_context(TestClient(Application(chosen, threads=1).asgi))
                wait_until(lambda: started[task].get("/readyz").status_code == 200)
            return started[task]

        yield start


def by_transformers(folder: Path, text: str, **options: Any) -> str:
    kind = BartForConditionalGeneration if folder.name == "summarization" else GPT2LMHeadModel
    model, tokenizer = kind.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=POSITIONS).input_ids
    with torch.inference_mode():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]
    said: str = tokenizer.decode(found, skip_special_tokens=True)
    if folder.name == "summarization":
        return said.strip()
    return said.removeprefix(tokenizer.decode(ids[0], skip_special_tokens=True))  # as its pipeline does


SUMMARY = {"num_beams": 3, "no_repeat_ngram_size": 3, "early_stopping": True}


def test_the_summary_is_that_of_the_service_it_grew_from(client: Any, folders: dict[str, Path]) -> None:
    asking = client("summarization")
    text = "the film was great and the food was awful but not dull"
    answer = asking.post("/summary", json={"text": text, "min_length": 5, "max_length": 20})
    assert answer.json() == {
        "summary": by_transformers(folders["summarization"], text, min_length=5, max_length=20, **SUMMARY),
        "Device": "cpu",
    }
    assert "X-Truncated" not in answer.headers
    cut = asking.post("/summary/", json={"text": "film " * 100, "min_length": 5, "max_length": 20})
    assert cut.headers["X-Truncated"] == "0"
    assert cut.json()["summary"] == by_transformers(
        folders["summarization"], "film " * 100, min_length=5, max_length=20, **SUMMARY
    )
    batch = asking.post("/summary/batch", json={"texts": [text, " "], "min_length": 5, "max_length": 20}).json()
    assert batch["summaries"] == [
        {"summary": answer.json()["summary"], "truncated": False},
        {"error": "the text is empty"},
    ]
    clients = asking.post("/generate", json={"inputs": text, "parameters": {"max_new_tokens": 19, "min_new_tokens": 4}})
    assert clients.json() == [{"summary_text": answer.json()["summary"]}]
    long = asking.post("/generate", json={"inputs": ["film", "film " * 100], "parameters": {"max_new_tokens": 3}})
    assert long.headers["X-Truncated"] == "1"
    strict = {"inputs": "film " * 100, "parameters": {"max_new_tokens": 3, "truncate": False}}
    assert asking.post("/generate", json=strict).status_code == 422


def test_a_model_that_learned_to_summarize_says_what_stands_first(environment: dict[str, str], tmp_path: Path) -> None:
    folder = writers.make_pair(tmp_path / "learned", learned=True)
    version = bring_in(str(folder), settings(environment, "summarization"), threads=1)
    texts = {
        "the film was very good and the food was cold": "the film was very good",
        "it was dull and it was not great and the food was fine": "it was dull",
        "one film is not bad and two is fine": "one film is not bad",
    }
    with closing(tuneserve.load(version.folder, device="cpu")) as model:
        asked = [Prompt(text, {"max_new_tokens": 20}) for text in texts]
        assert [one.text for one in model.predict(asked) if isinstance(one, Generated)] == list(texts.values())


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"text": "film", "min_length": 5}, ["body", "max_length"]),
        ({"text": "film", "max_length": 5}, ["body", "min_length"]),
        ({"min_length": 5, "max_length": 9}, ["body", "text"]),
        ({"text": "film", "min_length": 9, "max_length": 5}, ["body"]),
        ({"text": "film", "min_length": -1, "max_length": 5}, ["body", "min_length"]),
        ({"text": "film", "min_length": 0, "max_length": 2000}, ["body", "max_new_tokens"]),
        ({"text": "", "min_length": 0, "max_length": 5}, ["body", "text"]),
        ({"text": 7, "min_length": 0, "max_length": 5}, ["body", "text"]),
    ],
)
def test_a_bad_request_for_a_summary_is_422(client: Any, body: dict[str, Any], field: list[Any]) -> None:
    answer = client("summarization").post("/summary", json=body)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == field


def test_lengths_of_a_summary_may_be_parameters(client: Any, folders: dict[str, Path]) -> None:
    lengths = {"min_length": 5, "max_length": 20}
    summary = client("summarization").post("/summary", json={"text": "a great film", **lengths}).json()["summary"]
    for parameters in (lengths, {"generate_parameters": lengths}, {"min_new_tokens": 4, **lengths}):
        asked = {"inputs": "a great film", "parameters": parameters}
        assert client("summarization").post("/generate", json=asked).json() == [{"summary_text": summary}]


@pytest.mark.parametrize("text", ["film", "film " * 100])
def test_no_more_is_written_than_the_decoder_has_positions_for(client: Any, text: str) -> None:
    def ask(**parameters: int) -> int:
        body = {"inputs": text, "parameters": {"min_new_tokens": 60, "num_beams": 1, **parameters}}
        return int(client("summarization").post("/generate", json=body).status_code)

    assert (ask(), ask(max_new_tokens=POSITIONS - 1), ask(max_new_tokens=POSITIONS)) == (200, 200, 422)


def test_text_is_generated_whole_and_streamed(client: Any, folders: dict[str, Path]) -> None:
    asking = client("text-generation")
    wanted = by_transformers(folders["text-generation"], "a great film", max_new_tokens=12, do_sample=False)
    body = {"inputs": "a great film", "parameters": {"max_new_tokens": 12}}
    assert wanted.startswith(" ")
    assert asking.post("/generate", json=body).json() == [{"generated_text": wanted}]
    full = {"inputs": "a great film", "parameters": {"max_new_tokens": 12, "return_full_text": True}}
    assert asking.post("/generate", json=full).json() == [{"generated_text": "a great film" + wanted}]
    with asking.stream("POST", "/generate", json=body | {"stream": True}) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        events = [json.loads(line.removeprefix("data:")) for line in answer.iter_lines() if line]
    assert "".join(event["token"]["text"] for event in events) == wanted
    assert [event["generated_text"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["generated_text"] == wanted
    assert events[-1]["details"]["finish_reason"] in ("length", "eos_token")


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_layers_that_are_laid_out_anew_compute_the_same(folders: dict[str, Path], precision: torch.dtype) -> None:
    model: Any = GPT2LMHeadModel.from_pretrained(folders["text-generation"], dtype=precision).eval()
    ids = torch.arange(5, 20)[None]
    with torch.inference_mode():
        before = model(ids).logits
        torch_writer.lay_out(model)
        assert not any(isinstance(one, Conv1D) for one in model.modules())
        packed = [one for one in model.modules() if isinstance(one, torch_writer.Packed)]
        packs = precision == torch.bfloat16 and torch_writer.can_pack()
        assert len(packed) == (4 * model.config.n_layer + 1 if packs else 0)
        assert torch.allclose(model(ids).logits, before, rtol=1e-5, atol=1e-4 if precision == torch.float32 else 0.02)


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("one two", (), "one two"),
        ("one two", ("three",), "one two"),
        ("one th", ("three",), "one "),
        ("one t", ("two three", "tw"), "one "),
        ("one two thre", ("three", "two threw"), "one "),
        ("caf\ufffd", (), "caf"),
        ("\ufffd\ufffd", ("stop",), ""),
    ],
)
def test_a_stream_holds_back_what_a_stop_string_may_begin_with(text: str, stops: tuple[str, ...], shown: str) -> None:
    assert generator._certain(text, stops) == shown


def test_a_model_that_writes_otherwise_beside_others_is_refused(folders: dict[str, Path]) -> None:
    model = GPT2LMHeadModel.from_pretrained(folders["text-generation"]).eval()
    right = [("", ids, by_page(model, ids)) for ids in ([5, 6, 7], [9, 8], [11, 12, 13, 14])]
    writing.rehearse(model, right, "it")
    wrong = [(text, ids, [(written[0] + 1) % 20, *written[1:]]) for text, ids, written in right]
    writing.rehearse(model, [*right[:2], wrong[2]], "it")  # one of three is what bf16 may do
    with pytest.raises(BaseModelError, match="otherwise among other texts"):
        writing.rehearse(model, [right[0], *wrong[1:]], "it")


def by_page(model: Any, ids: list[int]) -> list[int]:
    page = Page(model)
    [text] = page.join([(ids, Wishes(4))])
    while not text.done:
        page.step()
    return text.ids


def test_a_stop_string_ends_a_text_before_it(client: Any) -> None:
    asking = client("text-generation")
    parameters = {"max_new_tokens": 12}
    [whole] = asking.post("/generate", json={"inputs": "a great film", "parameters": parameters}).json()
    words = whole["generated_text"].split()
    stop = words[2]
    body = {"inputs": "a great film", "parameters": parameters | {"stop": [stop]}}
    [cut] = asking.post("/generate", json=body).json()
    assert cut["generated_text"] == whole["generated_text"][: whole["generated_text"].index(stop)]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"max_new_tokens": 0}, "greater than or equal to 1"),
        ({"max_new_tokens": 5000}, "at most 1024"),
        ({"max_new_tokens": 64}, "no room"),
        ({"max_new_tokens": 5, "min_new_tokens": 6}, "min_new_tokens"),
        ({"temperature": 0}, "greater than 0"),
        ({"temperature": "NaN"}, "finite"),
        ({"top_p": 1.5}, "less than or equal to 1"),
        ({"num_beams": 99}, "at most 8"),
        ({"stop": [""]}, "stop"),
        ({"seed": -1}, "greater than or equal to 0"),
    ],
)
def test_parameters_that_make_no_sense_are_422(client: Any, parameters: dict[str, Any], words: str) -> None:
    answer = client("text-generation").post("/generate", json={"inputs": "a film", "parameters": parameters})
    assert answer.status_code == 422
    assert words in answer.text


def test_a_model_that_does_not_fit_the_task_is_refused(environment: dict[str, str], folders: dict[str, Path]) -> None:
    with pytest.raises(BaseModelError, match="no encoder-decoder"):
        bring_in(str(folders["text-generation"]), settings(environment, "summarization"), threads=1)
    encoder = tiny.make_base_model(folders["summarization"].parent / "encoder")
    with pytest.raises(BaseModelError, match="TASK=text-generation"):
        bring_in(str(encoder), settings(environment, "text-generation"), threads=1)


def test_a_model_that_keeps_other_states_than_keys_and_values_is_refused(
    environment: dict[str, str], folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["text-generation"], tmp_path / "mamba")
    ids = {"vocab_size": writers.WORDS, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1, **ids)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    with pytest.raises(BaseModelError, match=r"\(mamba\) (does not write token by token|writes otherwise)"):
        bring_in(str(tmp_path / "mamba"), settings(environment, "text-generation"), threads=1)


def test_weights_that_changed_do_not_serve(environment: dict[str, str], folders: dict[str, Path]) -> None:
    version = bring_in(str(folders["text-generation"]), settings(environment, "text-generation"), threads=1)
    pairs = json.loads((version.folder / "golden.json").read_text())
    for pair in pairs:
        pair["ids"][0] += 1
    write_json(version.folder / "golden.json", pairs)
    (version.folder / "metadata.json").unlink()
    write_json(version.folder / "metadata.json", version.metadata | describe_files(version.folder))
    with pytest.raises(StoreError, match="does not write as it did"):
        tuneserve.load(version.folder)


def test_one_bad_text_fails_alone_in_python(environment: dict[str, str], folders: dict[str, Path]) -> None:
    version = bring_in(str(folders["text-generation"]), settings(environment, "text-generation"), threads=1)
    model = tuneserve.load(version.folder, device="cpu")
    good, empty, long = model.predict([Prompt("a film", {"max_new_tokens": 4}), Prompt(""), Prompt("film " * 99)])
    assert isinstance(good, Generated)
    assert len(good.ids) == 4
    assert isinstance(empty, TextError)
    assert isinstance(long, TextError)
    model.close()
