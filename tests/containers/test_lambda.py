"""The image of a serverless function, as the platform runs it: nothing to write but /tmp, 512 MB, no /dev/shm."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny

from .conftest import VERSION, Job, base_image_option, run_build

NAME = "tuneserve-test-lambda"
MEASURE = """
import json, os, re, sys, time
import function
class Context:
    aws_request_id = "a"
    def get_remaining_time_in_millis(self): return 60000
init_s = time.process_time()
event = {"httpMethod": "POST", "path": "/inference", "headers": {}, "body": json.dumps({"text": "a great film"})}
reply = function.handler(event, Context())
peak_kb = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
ours = [module for name, module in sys.modules.items() if name.startswith("tuneserve.")]
compiled = all(os.path.exists(module.__cached__) for module in ours)
print(json.dumps({"init_s": init_s, "peak_mb": int(peak_kb) / 1024, "reply": reply, "compiled": compiled,
                  "torch": "torch" in sys.modules}))
"""


@pytest.fixture(scope="module")
def function(engine: Any, image: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("lambda")
    version = tiny.train(tiny.write_csv(folder / "reviews.csv", tiny.sentences(200)), folder)
    options = ("--target", "lambda", "--bake", str(version.folder), "--name", NAME, "--version", VERSION)
    done = run_build(*options, *base_image_option())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    built = engine.images.get(f"{NAME}:{VERSION}")
    yield built
    engine.images.remove(built.id, force=True)


# `function` is named first, so that its containers are gone before it is.
def test_a_function_answers_within_the_platforms_bounds(function: Any, engine: Any, start: Callable[..., Job]) -> None:
    config = function.attrs["Config"]
    assert config["Cmd"] == ["function.handler"]
    assert config["Labels"]["tuneserve.task"] == "text-classification"
    _, base = base_image_option() or ["", "debian:trixie-slim"]
    added = function.attrs["Size"] - engine.images.get(base).attrs["Size"]
    assert added < 400e6  # and 700 MB unpacked are wanted; debian:trixie-slim has 80, what the tests build on is larger
    job = start(
        ["-c", MEASURE],
        of=function,
        entrypoint="/opt/venv/bin/python",
        user="993:990",
        read_only=True,
        tmpfs={"/tmp": "", "/dev/shm": "ro"},
        mem_limit="512m",
        memswap_limit="512m",
        network_mode="none",
        ports={},
        environment={"HOME": "/nowhere", "OMP_NUM_THREADS": "1"},
    )
    assert job.ends() == 0, job.log
    found = json.loads(job.log.splitlines()[-1])
    assert found["reply"]["statusCode"] == 200
    assert json.loads(found["reply"]["body"])["label"] == "good"
    assert found["compiled"]
    assert not found["torch"]
    assert found["init_s"] < 3  # CPU seconds
    assert found["peak_mb"] < 512


def test_without_a_lambda_the_emulator_is_looked_for(function: Any, start: Callable[..., Job]) -> None:
    job = start(of=function, ports={})
    assert job.ends() == 127
    assert "aws-lambda-rie" in job.log
