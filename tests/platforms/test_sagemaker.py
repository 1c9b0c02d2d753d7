"""SageMaker, emulated by its folder layout with real processes; and its toolkit beside."""

import csv
import json
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
import writers
from jobs import start as start_job
from platforms.conftest import Client
from processes.test_server import Server, free_port
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from wire import wait_until

from tuneserve.settings import PROJECT

README = PROJECT / "production" / "deploy" / "sagemaker" / "README.md"
CHANNEL = {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated", "RecordWrapperType": "None"}
RECIPE = {name.lower(): json.dumps(value) for name, value in tiny.RECIPE.items() if name != "OMP_NUM_THREADS"}


def emulate(base: Path, model: Path, rows: int = 160, **changed: str) -> dict[str, str]:
    """The platform's folder, as a training finds it, and the variables of the container."""
    config, train = base / "input" / "config", base / "input" / "data" / "training"
    config.mkdir(parents=True)
    train.mkdir(parents=True)
    (base / "model").mkdir()
    half = rows // 2
    tiny.write_csv(train / "part-0.csv", tiny.sentences(half))
    tiny.write_csv(train / "part-1.csv", tiny.sentences(half, first=half))
    tiny.write_csv(base / "input" / "data" / "test" / "reviews.csv", tiny.sentences(40, first=rows))
    hyperparameters = RECIPE | {"base_model": json.dumps(str(model)), "sagemaker_job_name": '"j"'} | changed
    (config / "hyperparameters.json").write_text(json.dumps(hyperparameters))
    (config / "inputdataconfig.json").write_text(json.dumps({"training": CHANNEL, "test": CHANNEL}))
    resources = {"current_host": "algo-1", "hosts": ["algo-1"], "network_interface_name": "lo"}
    (config / "resourceconfig.json").write_text(json.dumps(resources))
    return {
        "PLATFORM": "sagemaker",
        "SAGEMAKER_BASE_DIR": str(base),
        "TRAINING_JOB_NAME": "reviews-1",
        "DATA_PATH": str(base.parent / "cache"),
        "LOG_PATH": str(base.parent / "logs"),
        "OMP_NUM_THREADS": "1",
        "MAX_LATENCY_INCREASE": "100",
        "HOST": "127.0.0.1",
    }


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base_model(tmp_path_factory.mktemp("base") / "bert")


@pytest.fixture(scope="module")
def trained(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The platform's folder after a training, and what it printed."""
    base = tmp_path_factory.mktemp("job") / "ml"
    process = start_job(emulate(base, base_model))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return base, output


@pytest.fixture(scope="module")
def theirs(trained: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that was trained, as transformers saves it."""
    folder = tmp_path_factory.mktemp("theirs") / "model"
    AutoModelForSequenceClassification.from_pretrained(trained[0] / "model").save_pretrained(folder)
    AutoTokenizer.from_pretrained(trained[0] / "model").save_pretrained(folder)
    return folder


Host = Callable[..., httpx.Client]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Serve a folder as the platform starts it; one server for each set of variables."""
    servers: dict[str, Server] = {}
    clients: list[httpx.Client] = []

    def ask(model: Path, **changed: str) -> httpx.Client:
        name = json.dumps([str(model), changed], sort_keys=True)
        if name not in servers:
            base = tmp_path_factory.mktemp("host") / "ml"
            base.mkdir()
            (base / "model").symlink_to(model)
            environ = {"PLATFORM": "sagemaker", "SAGEMAKER_BASE_DIR": str(base), "HOST": "127.0.0.1", **changed}
            environ |= {"DATA_PATH": str(base.parent / "cache"), "LOG_PATH": str(base.parent), "OMP_NUM_THREADS": "1"}
            port = str(free_port())
            # PORT is for the test's client alone: on the platform this variable says it.
            servers[name] = Server(
                environ | {"NUM_MAX_POSITIONS": "32", "SAGEMAKER_BIND_TO_PORT": port, "PORT": port},
                ["run.py", "serve"],
            )
            server = servers[name]
            wait_until(lambda: server.status("/ping") == 200 or server.process.poll() is not None, seconds=300)
            if server.process.poll() is not None:
                pytest.fail(server.output())
        clients.append(httpx.Client(base_url=servers[name].url, timeout=120))
        return clients[-1]

    yield ask
    for client in clients:
        client.close()
    codes = [server.end() for server in servers.values()]
    assert all(code == 0 for code, _ in codes), codes


def test_training_writes_what_the_platform_looks_for(trained: tuple[Path, str]) -> None:
    base, output = trained
    model = {path.name for path in (base / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "metadata.json"} <= model
    metadata = json.loads((base / "model" / "metadata.json").read_text())
    assert metadata["data"]["counts"]["test"].keys() == {"good", "bad"}
    assert (base / "output" / "data" / "metadata.json").is_file()
    assert any((base / "output" / "data" / "report").iterdir())
    assert not (base / "output" / "failure").exists()
    found = re.findall(r"^\| `([\w:]+)` \| `(.+?)` \|$", README.read_text(), re.MULTILINE)  # the documented metrics
    assert len(found) >= 6
    for name, expression in found:
        values = re.findall(expression.replace(r"\|", "|"), output)
        assert values, name
        assert all(0 <= float(value) < 10 for value in values)


def test_what_was_trained_is_hosted_and_asked_in_every_form(trained: tuple[Path, str], host: Host) -> None:
    ask = host(trained[0] / "model")
    assert ask.get("/ping").content == b""
    one = ask.post("/invocations", json={"inputs": "a great film"}, headers={"X-Amzn-SageMaker-Custom-Attributes": "x"})
    assert one.json()[0]["label"] == "good"
    both = ask.post("/invocations", content="inputs\na great film\nawful food\n", headers={"Content-Type": "text/csv"})
    assert [each["label"] for each in both.json()] == ["good", "bad"]
    lines = '{"inputs": "a great film"}\n{"inputs": " "}\n"awful food"\n'
    found = ask.post("/invocations", content=lines, headers={"Content-Type": "application/jsonlines"}).text.splitlines()
    first, bad, last = map(json.loads, found)
    assert (first, last[0]["label"]) == (one.json(), "bad")
    assert "the text is empty" in bad["error"]
    table = ask.post("/invocations", json={"inputs": ["awful food"]}, headers={"Accept": "text/csv"}).text
    assert re.fullmatch(r"label,score\r\nbad,0\.\d+\r\n", table)
    assert ask.get("/execution-parameters").json()["MaxPayloadInMB"] == 6
    large = ask.post("/invocations", content=b'"' + b"a" * (6 << 20) + b'"')
    assert (large.status_code, set(large.json())) == (413, {"code", "type", "message"})


def test_a_batch_transform_is_answered_line_for_line(theirs: Path, host: Host) -> None:
    texts = [text for text, _ in tiny.sentences(700)]
    ask = host(theirs, SAGEMAKER_BATCH="true", SAGEMAKER_MAX_PAYLOAD_IN_MB="1")
    body = "".join(f'"{text}, it is"\n' if number % 3 else f"{text}\n" for number, text in enumerate(texts))
    answer = ask.post("/invocations", content=body, headers={"Content-Type": "text/csv", "Accept": "text/csv"})
    lines = [line.split(",") for line in answer.text.splitlines()]
    assert [label for label, _ in lines] == [label for _, label in tiny.sentences(700)]
    alone = ask.post("/invocations", json={"inputs": f"{texts[1]}, it is"}).json()[0]
    assert float(lines[1][1]) == pytest.approx(alone["score"], abs=1e-4)


CODE = """
import os
def model_fn(folder): return os.path.basename(os.path.realpath(folder))
def transform_fn(model, data, content_type, accept):
    if content_type == "text/csv":
        raise LookupError("no tables")
    return f"{model}:{data}", "text/plain"
"""


@pytest.mark.parametrize("name", ["inference.py", "ours.py"])
def test_an_archives_own_code_answers(name: str, tmp_path_factory: pytest.TempPathFactory, host: Host) -> None:
    folder = tmp_path_factory.mktemp("code") / "own"
    (folder / "code").mkdir(parents=True)
    (folder / "code" / name).write_text(CODE)
    (folder / "code" / "requirements.txt").write_text("nothing==1\n")
    program = {} if name == "inference.py" else {"SAGEMAKER_PROGRAM": "ours", "SAGEMAKER_BATCH": "true"}
    ask = host(folder, HF_TASK="fill-mask", **program)
    answer = ask.post("/invocations", content=b"a\nb", headers={"Content-Type": "application/json"})
    assert (answer.text, answer.headers["Content-Type"]) == ("own:a\nb", "text/plain; charset=utf-8")
    failed = ask.post("/invocations", content=b"a", headers={"Content-Type": "text/csv"})
    assert failed.json() == {"code": 400, "type": "LookupError", "message": "no tables"}


@pytest.mark.parametrize(
    ("changed", "code", "words"),
    [
        ({"n_epoch": "3"}, 2, "n_epoch: there is no such hyperparameter; did you mean N_EPOCHS?"),
        ({"lr": '"fast"'}, 2, "LR='fast' is not a number"),
        ({"min_accuracy": "1", "n_epochs": "1", "lr": "1e-9"}, 10, "MIN_ACCURACY"),
    ],
)
def test_a_training_that_fails_says_why_in_the_failure_file(
    changed: dict[str, str], code: int, words: str, base_model: Path, tmp_path: Path
) -> None:
    base = tmp_path / "ml"
    process = start_job(emulate(base, base_model, **changed))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    failure = (base / "output" / "failure").read_text()
    assert words in failure
    assert len(failure) <= 1024
    assert not any((base / "model").iterdir())
    decision = base / "output" / "data" / "decision.json"
    assert decision.exists() is (code == 10)
    assert code != 10 or "min_accuracy" in decision.read_text().lower()


def test_a_training_that_is_stopped_goes_on_from_its_checkpoint(base_model: Path, tmp_path: Path) -> None:
    base = tmp_path / "ml"
    environ = emulate(base, base_model, n_epochs="2000", patience="3")
    process = start_job(environ)
    checkpoints = base / "checkpoints"
    wait_until(lambda: any(checkpoints.glob("checkpoints/*/*.safetensors")) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 143, output
    assert not (base / "output" / "failure").exists()
    assert not any((base / "model").iterdir())
    # The next instance gets the files of that folder, and nothing else.
    kept = {path.relative_to(checkpoints): path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()}
    shutil.rmtree(base)
    shutil.rmtree(environ["DATA_PATH"])
    environ = emulate(base, base_model, n_epochs="2000", patience="3")
    for name, content in kept.items():
        (checkpoints / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoints / name).write_bytes(content)
    process = start_job(environ)
    assert any("resuming in epoch" in line for line in process.stdout or [])
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)


def test_two_hosts_train_one_model_and_the_first_writes_it(base_model: Path, tmp_path: Path) -> None:
    hosts = ["127.0.0.1", "127.0.0.2"]  # as names; the platform's are algo-1, algo-2
    with socket.socket() as taken:
        if taken.connect_ex((hosts[0], 7777)) == 0:
            pytest.skip("port 7777 is in use")
    processes: list[subprocess.Popen[str]] = []
    for number, name in enumerate(hosts):
        base = tmp_path / str(number) / "ml"
        environ = emulate(base, base_model, n_epochs="2")
        resources = {"current_host": name, "hosts": hosts, "network_interface_name": "lo"}
        (base / "input" / "config" / "resourceconfig.json").write_text(json.dumps(resources))
        processes.append(start_job(environ))
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    metadata = json.loads((tmp_path / "0" / "ml" / "model" / "metadata.json").read_text())
    assert metadata["processes"] == 2
    assert not any((tmp_path / "1" / "ml" / "model").iterdir())


TOOLKIT = """
import json, os, sys
from sagemaker_huggingface_inference_toolkit.handler_service import HuggingFaceHandlerService

class Context:
    def __init__(self, folder):
        self.system_properties = {"model_dir": folder, "gpu_id": None, "batch_size": 1}
        self.request_processor, self.metrics, self.headers = [self], self, {}
    def get_request_properties(self): return self.headers
    def add_time(self, *arguments): pass
    def set_response_content_type(self, index, value): self.type = value

replies = []
for folder, task, requests in json.loads(sys.argv[1]):
    os.environ["HF_TASK"] = task
    service, context = HuggingFaceHandlerService(), Context(folder)
    service.initialize(context)
    for body, content_type, accept in requests:
        context.headers = {"Content-Type": content_type, "Accept": accept}
        try:
            [reply] = service.handle([{"body": bytearray(body.encode())}], context)
            replies.append([200, context.type, reply if isinstance(reply, str) else "bytes"])
        except Exception as error:
            replies.append([400, "", ""])
print()
print(json.dumps(replies))
"""
JSON, CSV = "application/json", "text/csv"
FILM, FILMS = {"inputs": "a great film"}, {"inputs": ["a great film", "awful food"]}
GREEDY = {"max_new_tokens": 5, "do_sample": False}
BEAMS = {"max_length": 8, "num_beams": 2, "no_repeat_ngram_size": 0}
ASKED: dict[str, list[tuple[Any, str, str]]] = {
    "text-classification": [
        (FILM, JSON, "*/*"),
        (FILM, JSON, CSV),
        (FILM, JSON, "text/plain"),
        (FILM, JSON, "application/x-npy"),
        (FILM, f"{JSON}; charset=utf-8", JSON),
        (FILMS | {"other": 1}, JSON, JSON),
        (FILMS, JSON, CSV),
        (FILM | {"parameters": {"top_k": None}}, JSON, JSON),
        (FILM | {"parameters": {"top_k": 2, "truncation": True}}, JSON, JSON),
        (FILM | {"parameters": {"return_all_scores": True}}, JSON, JSON),
        (FILMS | {"parameters": {"return_all_scores": True}}, JSON, JSON),
        (FILMS | {"parameters": {"top_k": 1}}, JSON, JSON),
        (FILM | {"parameters": {"other": 1}}, JSON, JSON),
        (FILM | {"parameters": {"function_to_apply": "sigmoid"}}, JSON, JSON),
        ("inputs\na great film\nawful food\n", CSV, JSON),
        ('inputs\n"a great, film"\n', CSV, CSV),
        ("text\na great film\n", CSV, JSON),
        ("a great film\nawful food\n", CSV, JSON),
        ('"a great film"', JSON, JSON),
        ('["a great film"]', JSON, JSON),
        ('{"inputs": "a great film"', JSON, JSON),
        ("", JSON, JSON),
        ("{}", JSON, JSON),
        ({"text": "a great film"}, JSON, JSON),
        ({"inputs": ""}, JSON, JSON),
        ({"inputs": []}, JSON, JSON),
        ({"inputs": 1}, JSON, JSON),
        ({"inputs": {"text": "a great film"}}, JSON, JSON),
        ("a great film", "text/plain", JSON),
        ("a great film", "image/png", JSON),
        ('{"inputs": "a great film"}\n' * 2, "application/jsonlines", JSON),
    ],
    "text-generation": [
        (FILM | {"parameters": GREEDY}, JSON, JSON),
        (FILM | {"parameters": GREEDY | {"return_full_text": False}}, JSON, JSON),
        (FILM | {"parameters": GREEDY | {"num_beams": 2, "repetition_penalty": 1.5}}, JSON, JSON),
        (FILM | {"parameters": GREEDY | {"max_new_tokens": -1}}, JSON, JSON),
        (FILMS | {"parameters": GREEDY}, JSON, JSON),
    ],
    "summarization": [
        (FILM | {"parameters": BEAMS}, JSON, JSON),
        (FILMS | {"parameters": BEAMS | {"min_length": 4}}, JSON, CSV),
    ],
    "feature-extraction": [(FILM, JSON, JSON)],
}
CHARSET = "a charset in the content type | 400 | passed over"
DIFFER: dict[tuple[str, str], str] = {
    (json.dumps(FILM), "text/plain"): "`Accept` of another type | 400, or NumPy's | 406",
    (json.dumps(FILM), "application/x-npy"): "`Accept` of another type | 400, or NumPy's | 406",
    (json.dumps(FILM), f"{JSON}; charset=utf-8"): CHARSET,
    (json.dumps(FILM | {"parameters": {"function_to_apply": "sigmoid"}}), JSON): "`function_to_apply` | 200 | 400",
    ('"a great film"', JSON): "without `inputs` | 400 | answered",
    ('["a great film"]', JSON): "without `inputs` | 400 | answered",
    (json.dumps({"text": "a great film"}), JSON): '`{"text"}` | answered | 400',
    (json.dumps({"inputs": {"text": "a great film"}}), JSON): '`{"text"}` | answered | 400',
    (json.dumps({"inputs": ""}), JSON): "an empty text, no text at all | answered | 400",
    (json.dumps({"inputs": []}), JSON): "an empty text, no text at all | answered | 400",
    ('{"inputs": "a great film"}\n' * 2, "application/jsonlines"): "a line for each",
    (json.dumps(FILMS | {"parameters": GREEDY}), JSON): "a list in a list for each",
}
"""Where the toolkit and we differ, by body and the header that matters, and the words of README's table for it."""


def alike(ours: Any, other: Any, about: str) -> None:
    if isinstance(other, dict | list):
        assert type(ours) is type(other), (about, ours, other)
        keys = other if isinstance(other, dict) else range(len(other))
        assert len(ours) == len(other), (about, ours, other)
        for key in keys:
            alike(ours[key], other[key], about)
    else:
        assert ours == (pytest.approx(other, abs=2e-3) if isinstance(other, float) else other), about


@pytest.fixture(scope="module")
def of_tasks(theirs: Path, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each task that the toolkit's older transformers can read."""
    made = tmp_path_factory.mktemp("tasks")
    folders = {
        "text-classification": theirs,
        "text-generation": writers.make_causal(made / "causal"),
        "summarization": writers.make_pair(made / "pair", learned=True),
        "feature-extraction": base_model,
    }
    for task, folder in folders.items():  # transformers 5 names a class that the toolkit's does not have
        folders[task] = shutil.copytree(folder, made / task)
        config = folders[task] / "tokenizer_config.json"
        about = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        config.write_text(json.dumps(about))
    return folders


def test_the_toolkit_gives_the_same_replies_but_for_the_differences_in_the_readme(
    of_tasks: dict[str, Path], host: Host, client: Client
) -> None:
    asked = {
        task: [(body if isinstance(body, str) else json.dumps(body), *how) for body, *how in some]
        for task, some in ASKED.items()
    }
    cases = [[str(of_tasks[task]), task, some] for task, some in asked.items()]
    replies = iter(client("sagemaker-toolkit", TOOLKIT, json.dumps(cases), timeout_s=300))
    table = README.read_text().partition("## Beside Hugging Face's toolkit")[2]
    for task, requests in asked.items():
        ask = host(of_tasks[task], HF_TASK=task, PRECISION="fp32")
        for body, kind, accept in requests:
            mine = ask.post("/invocations", content=body, headers={"Content-Type": kind, "Accept": accept})
            status, content_type, words = next(replies)
            differs = DIFFER.get((body, kind if kind not in (JSON, CSV) else accept))
            if task == "feature-extraction":
                [ours], [other] = mine.json(), json.loads(words)
                assert (len(ours), len(other[0])) == (32, 32)
                differs = "a vector of each token"
            elif differs is None:
                assert mine.status_code == status, (body, words, mine.text)
                if status == 200:
                    assert mine.headers["Content-Type"].partition(";")[0] == content_type
                    alike(read_reply(content_type, mine.text), read_reply(content_type, words), body)
                else:
                    assert {"code", "type", "message"} <= mine.json().keys()
            else:
                assert (mine.status_code, mine.text) != (status, words), body
            assert differs is None or differs in table


def read_reply(content_type: str, text: str) -> Any:
    """JSON, or the rows of a table with their figures as such."""
    if content_type == JSON:
        return json.loads(text)
    head, *rows = csv.reader(text.splitlines())
    return [head, *([one[0], *map(float, one[1:])] for one in rows)]
