"""The stage for SageMaker in a real container: root, and a folder of root with mode 0755 and nothing of ours in it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from .conftest import VERSION, Job, base_image_option, run_build

NAME = "tuneserve-test-sagemaker"
CHANNEL = {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated"}


@pytest.fixture(scope="module")
def stage(engine: Any, image: Any) -> Iterator[Any]:
    done = run_build("--target", "sagemaker", "--name", NAME, "--version", VERSION, *base_image_option())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    built = engine.images.get(f"{NAME}:{VERSION}")
    yield built
    engine.images.remove(built.id, force=True)


def test_a_model_is_trained_and_hosted_below_the_platforms_folder(
    stage: Any, start: Callable[..., Job], tmp_path: Path
) -> None:
    config = stage.attrs["Config"]
    assert (config["User"], config["Cmd"]) == ("0", ["serve"])
    assert config["Labels"]["com.amazonaws.sagemaker.capabilities.accept-bind-to-port"] == "true"
    assert config["Labels"]["org.opencontainers.image.version"] == VERSION
    base = tmp_path / "ml"
    tiny.write_csv(base / "input" / "data" / "train" / "reviews.csv", tiny.sentences(120))
    tiny.make_base_model(base / "input" / "data" / "model")
    (base / "input" / "config").mkdir()
    hyperparameters = {"n_epochs": '"12"', "lr": "0.005", "num_max_positions": "32", "max_latency_increase": "100"}
    (base / "input" / "config" / "hyperparameters.json").write_text(json.dumps(hyperparameters))
    (base / "input" / "config" / "inputdataconfig.json").write_text(json.dumps({"train": CHANNEL}))
    base.chmod(0o755)
    mounted = {str(base): {"bind": "/opt/ml", "mode": "rw"}}
    empty = start(["-c", "ls -A /opt/ml 2>/dev/null"], of=stage, entrypoint="/bin/sh")
    empty.ends()
    assert empty.log == ""
    job = start("train", of=stage, volumes=mounted)
    assert job.ends(within_s=300) == 0, job.log
    assert (base / "model" / "model.safetensors").is_file()
    model = {str(base / "model"): {"bind": "/opt/ml/model", "mode": "ro"}}
    host = start("serve", of=stage, volumes=model, ports={"8080/tcp": ("127.0.0.1", None)})
    host.says("ready: version")
    assert host.post("/invocations", {"inputs": "a great film"})[1][0]["label"] == "good"
    host.container.stop(timeout=30)
    assert host.ends() == 0
