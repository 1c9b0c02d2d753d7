"""The image that serves and has no torch: with a store that another trained, and with a model inside."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny

from tuneserve import load
from tuneserve.artifact import Version

from .conftest import VERSION, Job, base_image_option, run_build

NAME = "tuneserve-test-serve"


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Version:
    """A tiny classifier."""
    folder = tmp_path_factory.mktemp("serve")
    return tiny.train(tiny.write_csv(folder / "reviews.csv", tiny.sentences(200)), folder)


@pytest.fixture(scope="module")
def server(engine: Any, image: Any, version: Version) -> Iterator[Any]:
    """The image with the classifier in it."""
    options = ("--target", "serve", "--bake", str(version.folder), "--name", NAME, "--version", VERSION)
    done = run_build(*options, *base_image_option())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    built = engine.images.get(f"{NAME}:{VERSION}")
    yield built
    engine.images.remove(built.id, force=True)


# `server` is named first, so that its containers are gone before it is.
def test_a_server_without_torch_answers_and_watches(
    server: Any, engine: Any, version: Version, start: Callable[..., Job]
) -> None:
    texts = [text for text, _ in tiny.sentences(40, first=500)]
    model = load(version.folder)
    expected = [one.label for one in model.predict(texts)]
    model.close()
    assert set(expected) == {"good", "bad"}
    _, base = base_image_option() or ["", "debian:trixie-slim"]
    assert server.attrs["Size"] - engine.images.get(base).attrs["Size"] < 400e6
    job = start(of=server, read_only=True, tmpfs={"/tmp": "", "/logs": ""}, user="4321")
    job.is_ready()
    for _ in range(3):
        status, answer = job.post("/inference/batch", {"texts": texts})
        assert (status, [one["label"] for one in answer["predictions"]]) == (200, expected)
    status, drift = job.get("/drift")
    assert (status, drift["drifted"] in (True, False)) == (200, True)
    _, said = job.container.exec_run(["python", "-c", "import importlib.util as u; print(u.find_spec('torch'))"])
    assert said.decode().strip() == "None"
    assert "openvino" in job.libraries()
    assert not {"torch", "pip", "setuptools", "hf-xet", "hf_xet"} & job.libraries().keys()


def test_what_it_cannot_do_it_says(server: Any, start: Callable[..., Job]) -> None:
    job = start(["train"], of=server, ports={})
    assert job.ends() == 2
    assert "train needs torch, which is not installed" in job.log
    assert "Traceback" not in job.log
