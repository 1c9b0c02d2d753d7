"""The Open Inference Protocol by its own clients: Triton's and KServe's, in environments of their own.

What a client asks is a script below. MLServer, with a runtime of ten lines that answers alike, is asked by the same
scripts: what they want of a server is what another implementation of the protocol does too.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from loop import free_port
from wire import wait_until

from tuneserve.settings import PROJECT

Client = Callable[..., Any]
RES = PROJECT / "production" / "docker-res"
MLSERVER = PROJECT / ".venv" / "clients" / "mlserver" / "bin"
NAME = "reviews"

RUNTIME = """
import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.errors import InferenceError
from mlserver.types import InferenceResponse, MetadataTensor

class Echo(MLModel):
    async def load(self):
        self.inputs = [MetadataTensor(name="text", datatype="BYTES", shape=[-1])]
        self.outputs = [MetadataTensor(name="label", datatype="BYTES", shape=[-1]),
                        MetadataTensor(name="scores", datatype="FP32", shape=[-1, 2])]
        return True

    async def predict(self, payload):
        texts = StringCodec.decode_input(payload.inputs[0])
        if not all(texts):
            raise InferenceError("a text is empty")
        good = np.array([[0.1, 0.9] if "great" in one else [0.9, 0.1] for one in texts], dtype=np.float32)
        labels = ["good" if one[1] > 0.5 else "bad" for one in good]
        about = {"model_name": self.name, "model_version": self.version, "id": payload.id}
        label = StringCodec.encode_output("label", labels, use_bytes=False)
        return InferenceResponse(**about, outputs=[label, NumpyCodec.encode_output("scores", good)])
"""

TRITON = """
import json, sys
import numpy as np, tritonclient.http as triton
from tritonclient.utils import InferenceServerException

url, name, binary = sys.argv[1], sys.argv[2], sys.argv[3] == "binary"
client = triton.InferenceServerClient(url)

def ask(texts, outputs=("label", "scores"), **more):
    given = triton.InferInput("text", [len(texts)], "BYTES")
    given.set_data_from_numpy(np.array(texts, dtype=object), binary_data=binary)
    wanted = [triton.InferRequestedOutput(one, binary_data=binary) for one in outputs]
    return client.infer(more.pop("name", name), [given], outputs=wanted, **more)

def failure(**how):
    try:
        ask(how.pop("texts", ["a great film"]), **how)
    except InferenceServerException as error:
        return [error.status(), error.message()]

answer = ask(["a great film", "awful food", "tr\\u00e8s great"], request_id="r1")
plain = lambda one: [x.decode() if isinstance(x, bytes) else x for x in one.tolist()]
version = client.get_model_metadata(name)["versions"]
print(json.dumps({
    "health": [client.is_server_live(), client.is_server_ready(), client.is_model_ready(name)],
    "metadata": client.get_model_metadata(name),
    "labels": plain(answer.as_numpy("label").reshape(-1)), "scores": answer.as_numpy("scores").tolist(),
    "id": answer.get_response()["id"], "model": answer.get_response()["model_name"],
    "one": [one["name"] for one in ask(["a great film"], outputs=["scores"]).get_response()["outputs"]],
    "by_version": version and plain(ask(["awful food"], model_version=version[0]).as_numpy("label").reshape(-1)),
    "other": failure(name="other"), "empty": failure(texts=[""]),
    "many": ask(["a great film"] * 300).as_numpy("scores").shape[0],
}))
"""

BINARY = """
import json, sys
import numpy as np, tritonclient.http as triton
client = triton.InferenceServerClient(sys.argv[1])
given = triton.InferInput("anything", [2, 1], "BYTES")
given.set_data_from_numpy(np.array([[b"a great film"], [b"awful food"]], dtype=object))
answer = client.infer(sys.argv[2], [given])  # as it comes: binary both ways
about = answer.get_response()["outputs"]
print(json.dumps({"labels": [one.decode() for one in answer.as_numpy("label")],
                  "scores": answer.as_numpy("scores").tolist(), "dtype": str(answer.as_numpy("scores").dtype),
                  "binary": ["data" not in one for one in about]}))
"""

KSERVE = """
import asyncio, json, sys
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig

url, name, protocol, binary = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "binary"

async def main():
    client = InferenceRESTClient(RESTConfig(protocol=protocol))
    async def said(health):
        try:
            return await health
        except json.JSONDecodeError:  # MLServer's have no body
            return None
    health = [await said(client.is_server_live(url)), await client.is_model_ready(url, name)]
    if protocol == "v2":
        health.append(await said(client.is_server_ready(url)))
    async def ask(texts, name=name):
        if protocol == "v1":
            return (await client.infer(url, {"instances": texts}, model_name=name))["predictions"]
        given = InferInput("text", [len(texts)], "BYTES")
        given.set_data_from_numpy(np.array(texts, dtype=object), binary_data=binary)
        answer = await client.infer(url, InferRequest(name, [given]), model_name=name)
        found = {one.name: one for one in answer.outputs}
        labels = found["label"].as_numpy().reshape(-1).tolist()
        return {"labels": [one.decode() if isinstance(one, bytes) else one for one in labels],
                "scores": found["scores"].as_numpy().tolist()}
    try:
        other = await ask(["a"], name="other")
    except Exception as error:
        other = str(error)
    print(json.dumps({"health": health, "answer": await ask(["a great film", "awful food"]), "other": other}))

asyncio.run(main())
"""


@contextmanager
def process(command: list[Any], environ: dict[str, str], folder: Path, ready: str) -> Iterator[None]:
    with (folder / "log").open("w+") as log:
        options: dict[str, Any] = {"env": environ, "cwd": folder, "stdout": log, "stderr": subprocess.STDOUT}
        running = subprocess.Popen(list(map(str, command)), **options, start_new_session=True)

        def is_ready() -> bool:
            assert running.poll() is None, (folder / "log").read_text()[-3000:]
            try:
                return httpx.get(ready).status_code == 200
            except httpx.TransportError:
                return False

        try:
            wait_until(is_ready)
            yield
        finally:
            os.killpg(running.pid, signal.SIGTERM)
            try:
                running.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)
                running.wait()


@pytest.fixture(scope="module")
def ours(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the real command, which serves what was trained in a second."""
    folder, port = tmp_path_factory.mktemp("ours"), free_port()
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "MODEL_PATH": str(store), "LOG_PATH": str(folder)}
    environ |= {"HOST": "127.0.0.1", "PORT": str(port), "MODEL_NAME": NAME, "OMP_NUM_THREADS": "1"}
    with process([sys.executable, RES / "run.py", "serve"], environ, folder, f"http://127.0.0.1:{port}/readyz"):
        yield f"127.0.0.1:{port}"


@pytest.fixture(scope="module")
def mlserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLServer's, which serves an echo."""
    if not MLSERVER.exists():
        pytest.skip(f"{MLSERVER} is not there: make test-platforms makes it")
    folder = tmp_path_factory.mktemp("mlserver")
    port, others = free_port(), [free_port(), free_port()]
    (folder / "echo.py").write_text(RUNTIME)
    model = {"name": NAME, "implementation": "echo.Echo", "parameters": {"version": "v1"}}
    (folder / "model-settings.json").write_text(json.dumps(model))
    settings = {"host": "127.0.0.1", "http_port": port, "grpc_port": others[0], "metrics_port": others[1]}
    (folder / "settings.json").write_text(json.dumps({**settings, "parallel_workers": 0}))
    environ = {"PATH": f"{MLSERVER}:/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": str(folder)}
    with process([MLSERVER / "mlserver", "start", folder], environ, folder, f"http://127.0.0.1:{port}/v2/health/ready"):
        yield f"127.0.0.1:{port}"


@pytest.fixture(params=[("ours", "json"), ("ours", "binary"), ("mlserver", "json")], ids="-".join)
def server(request: pytest.FixtureRequest) -> tuple[str, str, str]:
    """A server's name and address, and the form in which it is asked; MLServer has no binary extension."""
    name, form = request.param
    return name, request.getfixturevalue(name), form


def test_tritons_client_is_answered(server: tuple[str, str, str], client: Client) -> None:
    name, url, form = server
    found = client("triton", TRITON, url, NAME, form)
    assert found["health"] == [True, True, True]
    assert [one["name"] for one in found["metadata"]["inputs"]] == ["text"]
    about = {one["name"]: (one["datatype"], one["shape"]) for one in found["metadata"]["outputs"]}
    assert about == {"label": ("BYTES", [-1]), "scores": ("FP32", [-1, 2])}
    assert found["labels"] == ["good", "bad", "good"]
    assert [row.index(max(row)) for row in found["scores"]] == [1, 0, 1]
    assert [sum(row) for row in found["scores"]] == pytest.approx([1, 1, 1], abs=1e-5)
    assert (found["id"], found["model"], found["many"]) == ("r1", NAME, 300)
    assert found["by_version"] in ([], ["bad"])
    assert found["other"][0] == "404"
    assert NAME in found["other"][1] or "other" in found["other"][1]
    assert found["empty"][0] == "400"
    assert "empty" in found["empty"][1]
    if name == "ours":
        assert (found["one"], found["by_version"]) == (["scores"], ["bad"])
        assert found["metadata"]["outputs"][1]["parameters"] == {"labels": ["bad", "good"]}


def test_tritons_client_as_it_comes_speaks_binary_both_ways(ours: str, client: Client) -> None:
    found = client("triton", BINARY, ours, NAME)
    assert (found["labels"], found["dtype"], found["binary"]) == (["good", "bad"], "float32", [True, True])
    wanted = httpx.post(f"http://{ours}/inference", json={"text": "a great film"}).json()["scores"]
    assert found["scores"][0] == pytest.approx([wanted["bad"], wanted["good"]], abs=1e-5)


def test_kserves_client_is_answered_in_version_2(server: tuple[str, str, str], client: Client) -> None:
    name, url, form = server
    found = client("kserve", KSERVE, f"http://{url}", NAME, "v2", form)
    assert found["health"] == {"ours": [True, True, True], "mlserver": [None, True, None]}[name]
    assert found["answer"]["labels"] == ["good", "bad"]
    assert [len(row) for row in found["answer"]["scores"]] == [2, 2]
    assert "404" in found["other"]


def test_kserves_client_is_answered_in_version_1(ours: str, client: Client) -> None:
    found = client("kserve", KSERVE, f"http://{ours}", NAME, "v1", "json")
    assert found["health"] == [True, True]
    assert [one["label"] for one in found["answer"]] == ["good", "bad"]
    assert "There is no model 'other' here" in found["other"]
