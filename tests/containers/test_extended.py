"""The job on a base that brings its own Python, user and torch, with another transformers, for SageMaker."""

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import writers

from .conftest import VERSION, Job, run_build

NAME, BASE = "tuneserve-test-extended", "tuneserve-test-deep"
TRANSFORMERS = "5.24.0"
ROOT = "/opt/deep"
DEEP = """\
FROM {job}
USER 0
RUN mv /opt/venv {root} && rm -r /production && useradd --uid 4321 somebody
ENV PATH={root}/bin:/usr/local/bin:/usr/bin:/bin
USER somebody
ENTRYPOINT ["/bin/false"]
"""
"""A deep-learning image out of the job's own layers, with its Python in a virtual environment. Not out of the image
itself, which could not be replaced then, but of what it is before it has labels."""


@pytest.fixture(scope="module")
def deep(engine: Any, image: Any) -> Iterator[str]:
    dockerfile = io.BytesIO(DEEP.format(job=image.attrs["Parent"], root=ROOT).encode())
    engine.images.build(fileobj=dockerfile, tag=BASE, rm=True)
    yield f"{BASE}:latest"
    engine.images.remove(f"{BASE}:latest", force=True)  # the layers stay, for what refused it was built on them


@pytest.fixture(scope="module")
def extended(engine: Any, deep: str) -> Iterator[Any]:
    options = ("--base-image", deep, "--transformers", TRANSFORMERS, "--target", "sagemaker", "--name", NAME)
    done = run_build(*options, "--version", VERSION)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    [built] = engine.images.list(NAME)
    yield built
    engine.images.remove(built.id, force=True)


def test_the_bases_python_and_torch_are_kept_and_the_tag_has_the_versions(
    extended: Any, start: Callable[..., Job]
) -> None:
    asked = (
        "import json, torch, transformers, tuneserve; print(json.dumps([m.__file__ for m in (torch, transformers)]))"
    )
    job = start(["-c", asked], of=extended, entrypoint="/opt/venv/bin/python", ports={}, user="1000:0")
    assert job.ends() == 0, job.log
    torch, transformers = json.loads(job.log)
    assert torch.startswith(f"{ROOT}/lib/")
    assert transformers.startswith("/opt/venv/lib/")
    assert {"torch", "numpy"} < job.libraries().keys()
    [tag] = extended.tags
    tag_of = rf"{NAME}:{re.escape(VERSION)}-transformers{re.escape(TRANSFORMERS)}-torch[0-9.]+-py31[123]-(cpu|cu[0-9]+)"
    assert re.fullmatch(tag_of, tag)


def test_a_model_is_served_without_training_by_the_platforms_variables(
    extended: Any, start: Callable[..., Job], tmp_path: Path
) -> None:
    writers.make_causal(tmp_path / "model")
    job = start(
        of=extended,
        volumes={str(tmp_path / "model"): {"bind": "/resources/model", "mode": "ro"}},
        environment={"HF_MODEL_ID": "/resources/model", "HF_TASK": "text-generation"},
        ports={"8080/tcp": ("127.0.0.1", None)},
    )
    job.says("ready: version")
    prompt = "the film was great"
    status, said = job.post("/invocations", {"inputs": prompt, "parameters": {"max_new_tokens": 4}})
    assert status == 200, (said, job.log)
    assert said[0]["generated_text"].startswith(prompt)
    assert len(said[0]["generated_text"]) > len(prompt)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--torch", "2.1.0"), "and the job is made for 2.1.0: take a base with that one"),
        (("--base-image", "scratch-of-tuneserve"), "neither Debian nor Ubuntu"),
    ],
)
def test_a_base_that_does_not_fit_is_refused_with_the_reason(
    options: tuple[str, ...], reason: str, engine: Any, deep: str, image: Any
) -> None:
    bare = io.BytesIO(f"FROM {image.attrs['Parent']}\nUSER 0\nRUN rm /usr/bin/apt-get\n".encode())
    engine.images.build(fileobj=bare, tag="scratch-of-tuneserve", rm=True)
    try:
        done = run_build("--base-image", deep, "--name", NAME, *options)
    finally:
        engine.images.remove("scratch-of-tuneserve", force=True)
    assert done.returncode == 1
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1
