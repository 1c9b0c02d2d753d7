"""A model baked into the image: it answers with no network and no volume, and on port 80."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import writers

from .conftest import VERSION, Job, base_image_option, run_build

NAME = "tuneserve-test-baked"
ASK = """
import sys, urllib.request
request = urllib.request.Request("http://127.0.0.1:8000/summary", sys.argv[1].encode())
print(urllib.request.urlopen(request).read().decode())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return writers.make_pair(tmp_path_factory.mktemp("models") / "Tiny BART")


@pytest.fixture(scope="module")
def baked(engine: Any, image: Any, folder: Path) -> Iterator[Any]:
    """The image with a summarizer, on the layers of `image`."""
    options = ("--bake", str(folder), "--task", "summarization", "--name", NAME, "--version", VERSION)
    done = run_build(*options, *base_image_option())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    built = engine.images.get(f"{NAME}:{VERSION}")
    yield built
    engine.images.remove(built.id, force=True)


# `baked` is named first, so that its containers are gone before it is.
def test_a_baked_summarizer_answers_without_a_network_and_on_port_80(
    baked: Any, start: Callable[..., Job], folder: Path
) -> None:
    bare = {"network_mode": "none", "read_only": True, "tmpfs": {"/tmp": "", "/logs": ""}, "user": "4321"}
    alone = start(of=baked, ports={}, **bare)
    published = start(of=baked, ports={"80/tcp": ("127.0.0.1", None)}, environment={"PORT": "80"})
    published.is_ready()
    asked = {"text": "the film was great and the food was awful", "min_length": 5, "max_length": 20}
    status, answer = published.post("/summary", asked)
    assert status == 200
    assert answer == {"summary": answer["summary"], "Device": "cpu"}
    assert len(answer["summary"].split()) > 2
    assert set(answer["summary"].split()) <= set(tiny.WORDS)
    assert published.get("/")[0] == 200

    alone.says("ready: version")
    exit_code, said = alone.container.exec_run(["python", "-c", ASK, json.dumps(asked)])
    assert exit_code == 0, said
    assert json.loads(said) == answer

    labels = baked.attrs["Config"]["Labels"]
    assert labels["tuneserve.model"] == "Tiny BART"
    assert labels["tuneserve.model.sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert labels["tuneserve.model.version"] == published.get("/readyz")[1]["model_version"]
    assert labels["org.opencontainers.image.version"] == VERSION
    assert "org.opencontainers.image.licenses" not in labels  # the model has one of its own
    # Whoever serves cannot write to the store, and what was imported is not in the image a second time.
    assert published.container.exec_run(["touch", "/opt/baked/x"]).exit_code != 0
    assert published.container.exec_run(["ls", "-A", "/resources"]).output == b""
