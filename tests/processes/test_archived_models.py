"""The two archives of the multi-model endpoint, BERT embeddings and GPT-2 text, in their own layout, together."""

import ast
import asyncio
import io
import os
import signal
import tarfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from wire import wait_until

from tuneserve.archives import find_program, unpack
from tuneserve.serving.model import wait_for
from tuneserve.tasks.handler import Handler, Invocation, Response

INSTALL = """
import os
import subprocess
import sys

subprocess.check_call([sys.executable, "-m", "pip", "install", "transformers==4.12.3"])
os.system("pip install torch")

from transformers import AutoTokenizer, {model}
from helper import NAME


def model_fn(model_dir):
    folder = os.path.join(model_dir, "model")
    print("loading", NAME)
    return AutoTokenizer.from_pretrained(folder), {model}.from_pretrained(folder)


def input_fn(data, content_type):
    assert content_type == "text/csv"
    return data


def output_fn(prediction, accept):
    return str(prediction)
"""
BERT = (
    INSTALL.format(model="AutoModel")
    + """

def predict_fn(data, model):
    tokenizer, bert = model
    output = bert(**tokenizer(data, return_tensors="pt", truncation=True, max_length=60))
    return output.last_hidden_state.mean(dim=1).tolist()
"""
)
GPT = (
    INSTALL.format(model="AutoModelForCausalLM")
    + """

def predict_fn(data, model):
    tokenizer, gpt = model
    ids = tokenizer(data, return_tensors="pt").input_ids
    return tokenizer.decode(gpt.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0])
"""
)


def pack(archive: Path, model: Path, code: str, name: str) -> None:
    """An archive as people made them on a notebook: `./` before each entry, and what the notebook left."""
    files: dict[str, bytes] = {
        "./code/inference.py": textwrap.dedent(code).encode(),
        "./code/helper.py": f"NAME = {name!r}\n".encode(),
        "./code/.ipynb_checkpoints/inference-checkpoint.py": b"raise RuntimeError",
        "./.ipynb_checkpoints/readme-checkpoint.md": b"",
    }
    files |= {f"./model/{path.name}": path.read_bytes() for path in model.iterdir()}
    with tarfile.open(archive, "w:gz") as tar:
        for folder in ("./", "./code", "./code/.ipynb_checkpoints", "./model"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        for path, content in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def pickled(model: Any, folder: Path) -> Path:
    """The weights as they were saved then."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    bert = tiny.make_base_model(folder / "bert")
    pickled(AutoModel.from_pretrained(bert, trust_remote_code=False), bert)
    gpt = tiny.make_base_model(folder / "gpt")
    torch.manual_seed(1)
    words = len(AutoTokenizer.from_pretrained(gpt, trust_remote_code=False))
    config = GPT2Config(vocab_size=words, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5)
    pickled(GPT2LMHeadModel(config), gpt)
    return {"bert": bert, "gpt": gpt}


@pytest.fixture
def models(tmp_path: Path, weights: dict[str, Path]) -> Iterator[dict[str, Handler]]:
    """Both, unpacked and loaded at once."""
    made = {}
    for name, code in (("bert", BERT), ("gpt", GPT)):
        pack(tmp_path / f"{name}model.tar.gz", weights[name], code, name)
        unpack(tmp_path / f"{name}model.tar.gz", tmp_path / name)
        program = find_program(tmp_path / name, "inference.py")
        assert program is not None
        environ = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
        made[name] = Handler(tmp_path / name, name=f"{name}model.tar.gz", program=program, environ=environ)
    for model in made.values():
        model.wait()
    yield made
    for model in made.values():
        model.close()


def embed(folder: Path, text: str) -> list[list[float]]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    bert = AutoModel.from_pretrained(folder, trust_remote_code=False)
    with torch.inference_mode():
        found: list[list[float]] = bert(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(dim=1).tolist()
    return found


def go_on(folder: Path, text: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    gpt: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    ids = tokenizer(text, return_tensors="pt").input_ids
    return str(tokenizer.decode(gpt.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0]))


def body_of(found: Any) -> str:
    assert isinstance(found, Response), found
    return found.body.decode()


def test_both_answer_at_once_as_their_models_do_and_end_apart(
    models: dict[str, Handler], weights: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    asked = {"bert": "the film was good", "gpt": '"the film was"'}  # the second is JSON, whose quotes reach the model

    async def ask(*names: str) -> list[str]:
        requests = [Invocation(asked[name].encode(), "text/csv", "application/json") for name in names]
        answers = [models[name].answer([request]) for name, request in zip(names, requests, strict=True)]
        return [body_of(one) for [one] in await asyncio.gather(*answers)]

    found = asyncio.run(ask("bert", "gpt", "bert", "gpt", "gpt", "bert"))
    vector, text = found[:2]
    assert found == [vector, text, vector, text, text, vector]
    assert str(ast.literal_eval(vector)) == vector  # Python's str(), whatever is accepted
    torch.testing.assert_close(
        torch.tensor(ast.literal_eval(vector)), torch.tensor(embed(weights["bert"], asked["bert"]))
    )
    assert text == go_on(weights["gpt"], asked["gpt"]) != go_on(weights["gpt"], "the film was")
    assert all(model.memory_bytes > 50 << 20 for model in models.values())

    process = models["bert"]._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    wait_until(process.has_ended)
    assert wait_for(ask("gpt")) == [text]
    assert wait_for(ask("bert")) == [vector]  # started again

    group = models["gpt"]._process
    assert group is not None
    models["gpt"].close()
    with pytest.raises(ProcessLookupError):
        os.killpg(group.pid, 0)
    assert models["gpt"].memory_bytes == 0
    assert wait_for(ask("bert")) == [vector]
