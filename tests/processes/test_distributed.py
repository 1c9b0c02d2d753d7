"""Several processes that train together, for real: on one machine, and on two that share nothing but a cable."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from jobs import start
from safetensors.numpy import load_file
from wire import wait_until

from tuneserve.lifecycle.status import hold
from tuneserve.lifecycle.store import Store
from tuneserve.settings import Settings
from tuneserve.training import launch


def finish(process: "subprocess.Popen[str]", seconds: float = 240) -> str:
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, output
    return output


def champion(environment: dict[str, str]) -> Any:
    return Store(Path(environment["MODEL_PATH"])).champion()


def alone(environment: dict[str, str], tmp_path: Path) -> Any:
    """What one process makes of the same job."""
    environment = environment | {"MODEL_PATH": str(tmp_path / "alone")}
    finish(start(environment))
    return champion(environment)


def assert_same_run(one: Any, other: Any) -> None:
    for mine, theirs in zip(one.metadata["history"], other.metadata["history"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    mine, theirs = (load_file(version.folder / "model.safetensors") for version in (one, other))
    for name, weights in mine.items():
        np.testing.assert_allclose(weights, theirs[name], rtol=1e-2, atol=1e-4)


def workers_of(process: "subprocess.Popen[str]") -> list[int]:
    """The training processes under a launcher, the leading one first."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = dict(one.split("=", 1) for one in (folder / "environ").read_text().split("\0") if "=" in one)
            if variables.get("TUNESERVE_TEST") == str(process.pid) and "LOCAL_RANK" in variables:
                found[int(variables["LOCAL_RANK"])] = int(folder.name)
        except (OSError, UnicodeDecodeError):
            continue
    return [found[rank] for rank in sorted(found)]


def started_marked(environment: dict[str, str], **changed: str) -> "subprocess.Popen[str]":
    """Like `start`; its workers can be told by a variable that holds the launcher's number."""
    code = "import os, sys; os.environ['TUNESERVE_TEST'] = str(os.getpid()); os.execv(sys.executable, sys.argv[1:])"
    return start(environment, sys.executable, "-c", code, **changed)


@pytest.fixture
def gentle(environment: dict[str, str]) -> dict[str, str]:
    """A learning rate at which rounding stays rounding."""
    return environment | {"LR": "5e-4", "CLASS_WEIGHTS": "balanced"}


def test_two_processes_learn_what_one_learns(gentle: dict[str, str], tmp_path: Path) -> None:
    # 15 texts a batch are 8 for one process and 7 for the other; the last batch of an epoch is smaller still.
    shared = gentle | {"BATCH_SIZE": "15"}
    output = finish(start(shared, PROCESSES="2"))
    assert output.count("epoch=1;") == 1, output  # one of them speaks
    version = champion(shared)
    assert version.metadata["processes"] == 2
    assert_same_run(version, alone(shared, tmp_path))


def test_more_processes_than_texts_in_a_batch_are_no_error(gentle: dict[str, str], tmp_path: Path) -> None:
    shared = gentle | {"BATCH_SIZE": "1", "N_EPOCHS": "1", "NUM_TRAIN": "60"}
    finish(start(shared, PROCESSES="2"))
    assert_same_run(champion(shared), alone(shared, tmp_path))


def test_a_worker_that_is_killed_does_not_end_the_run(gentle: dict[str, str], tmp_path: Path) -> None:
    shared = gentle | {"N_EPOCHS": "30"}
    process = started_marked(shared, PROCESSES="2")
    checkpoints = Store(Path(shared["MODEL_PATH"])).checkpoints_folder
    wait_until(lambda: any(checkpoints.glob("*/0000[3-9]*.safetensors")))
    os.kill(workers_of(process)[1], signal.SIGKILL)
    output = finish(process)
    assert re.search(r"resuming in epoch \d+ after batch", output), output
    version = champion(shared)
    assert len(version.metadata["history"]) == 30
    whole = shared | {"MODEL_PATH": str(tmp_path / "whole")}
    finish(start(whole, PROCESSES="2"))
    assert_same_run(version, champion(whole))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_all_processes_with_a_checkpoint(
    gentle: dict[str, str], number: signal.Signals, code: int
) -> None:
    shared = gentle | {"N_EPOCHS": "2000", "PROCESSES": "2"}
    process = started_marked(shared)
    checkpoints = Store(Path(shared["MODEL_PATH"])).checkpoints_folder
    wait_until(lambda: any(checkpoints.glob("*/*.safetensors")))
    workers = workers_of(process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    if number == signal.SIGTERM:
        process = start(shared)
        assert any("resuming in epoch" in line for line in process.stdout or [])
        process.terminate()
        process.communicate(timeout=240)


@pytest.fixture
def two_machines() -> Iterator[list[tuple[str, str]]]:
    """Two network namespaces joined by a cable: their names and addresses. Only root may make them."""
    names = [f"ts{uuid4().hex[:6]}{end}" for end in "ab"]
    addresses = ["10.213.77.1", "10.213.77.2"]
    commands = [f"ip netns add {name}" for name in names]
    commands += [f"ip link add {names[0]} netns {names[0]} type veth peer name {names[1]} netns {names[1]}"]
    for name, address in zip(names, addresses, strict=True):
        commands += [f"ip -n {name} link set lo up", f"ip -n {name} link set {name} up"]
        commands += [f"ip -n {name} address add {address}/24 dev {name}"]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"network namespaces cannot be made here: {done.stderr.strip()}")
    except FileNotFoundError:
        pytest.skip("network namespaces need the command `ip` (iproute2)")
    else:
        yield list(zip(names, addresses, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_two_machines_learn_what_one_learns(
    gentle: dict[str, str], tmp_path: Path, two_machines: list[tuple[str, str]]
) -> None:
    processes = []
    for rank, (name, _) in enumerate(two_machines):
        own = {
            "MODEL_PATH": str(tmp_path / f"models{rank}"),
            "DATA_PATH": str(tmp_path / f"data{rank}"),
            "LOG_PATH": str(tmp_path / f"logs{rank}"),
            "PET_NNODES": "2",
            "PET_NODE_RANK": str(rank),
            "PET_NPROC_PER_NODE": "1",
            "PET_MASTER_ADDR": two_machines[0][1],
            "PET_MASTER_PORT": "29400",
            "GLOO_SOCKET_IFNAME": name,
        }
        processes.append(start(gentle | own, "ip", "netns", "exec", name))
    try:
        outputs = [finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert outputs[0].count("epoch=1;") == 1
    assert "epoch=1;" not in outputs[1]
    assert not list((tmp_path / "models1").glob("versions/*/metadata.json"))
    version = champion(gentle | {"MODEL_PATH": str(tmp_path / "models0")})
    assert json.loads((version.folder / "metadata.json").read_text())["processes"] == 2
    assert_same_run(version, alone(gentle, tmp_path))


@pytest.mark.parametrize(
    ("variables", "environ", "asked"),
    [
        ({}, {}, False),
        ({"PROCESSES": "1"}, {}, False),
        ({"PROCESSES": "2"}, {}, True),
        ({"PROCESSES": "2", "TRAIN_BODY": "0"}, {}, False),
        ({}, {"PET_NNODES": "2"}, True),
        ({"PROCESSES": "2"}, {"TORCHELASTIC_RUN_ID": "a worker"}, False),
    ],
)
def test_who_starts_workers(variables: dict[str, str], environ: dict[str, str], asked: bool) -> None:
    settings = Settings.from_environ({"DEVICE": "cpu"} | variables)
    assert launch.is_asked_for(settings, environ) is asked


@pytest.mark.parametrize(
    ("changed", "code", "words"),
    [
        ({"DATASET": "./nowhere.csv"}, 3, "DATASET=./nowhere.csv: there is no such file or folder."),
        ({"BASE_MODEL": "./nowhere"}, 4, "there is no such folder"),
        ({"NUM_MAX_POSITIONS": "256"}, 4, "this base model reads 64 tokens at most"),
        ({"LR": "1", "N_EPOCHS": "30", "MAX_NORM": "1e9"}, 7, "is probably too high; try a third of it"),
        ({"MIN_ACCURACY": "1", "LR": "1e-6", "N_EPOCHS": "1"}, 10, "MIN_ACCURACY"),
    ],
)
def test_an_error_that_would_repeat_itself_ends_the_run_at_once(
    environment: dict[str, str], changed: dict[str, str], code: int, words: str
) -> None:
    process = start(environment, PROCESSES="2", **changed)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert words in errors[0]
    assert "Traceback" not in output
    assert output.count("device: cpu") == 1, output  # the leading process was started once


def test_an_error_of_one_process_alone_ends_the_others(environment: dict[str, str]) -> None:
    """Only the leading process takes the store's lock; the other waits for it meanwhile."""
    store = Store(Path(environment["MODEL_PATH"]))
    store.prepare()
    with hold(store.lock):
        process = start(environment, PROCESSES="2")
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 9, output
    assert output.count("error: ") == 1, output
    assert "Traceback" not in output


def test_workers_that_keep_dying_are_an_error(environment: dict[str, str]) -> None:
    """A user's own mistake in the launcher's variables: no worker can be started at all."""
    process = start(environment, PROCESSES="2", PET_NNODES="many")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 7, output
    assert "The workers ended with exit code 1; the lines above say why." in output
