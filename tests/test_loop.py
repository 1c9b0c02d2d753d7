"""The whole loop on real processes: what happens when each of them is killed, the disk is full, the files are torn."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import loop
import pytest
import tiny

Start = Callable[..., loop.Service]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    data = tmp_path / "data"
    data.mkdir()
    loop.write_rows(data / "train.csv", tiny.sentences(160))
    loop.write_rows(data / "test.csv", tiny.sentences(120, first=1000))
    return {
        "DATASET": str(data),
        "BASE_MODEL": str(tiny.make_base_model(tmp_path / "base")),
        "NUM_MAX_POSITIONS": "32",
        "LR": "5e-3",
        "BATCH_SIZE": "16",
        "N_EPOCHS": "12",
        "OMP_NUM_THREADS": "1",
        "HOST": "127.0.0.1",
        "PORT": str(loop.free_port()),
        "API_KEY": loop.KEY["X-API-Key"],
        "DRIFT_WINDOW": "50",
        **{f"{name}_PATH": str(tmp_path / name) for name in ("MODEL", "DATA", "LOG")},
    }


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    services = []

    def start(**changed: str) -> loop.Service:
        services.append(loop.Service(environment | changed, tmp_path / "out.log"))
        services[-1].start()
        return services[-1]

    yield start
    for service in services:
        if service.process is not None and service.process.poll() is None:
            service.process.kill()
            service.process.wait()


def ready(service: loop.Service) -> str:
    body, _ = service.wait("/readyz", lambda body: body["phase"] == "ready", timeout_s=60)
    return str(body["model_version"])


def ask(service: loop.Service, text: str = "a great film") -> dict[str, Any]:
    answer = httpx.post(f"{service.url}/inference", json={"text": text}, headers=loop.KEY)
    assert answer.status_code == 200, answer.text
    return answer.json() | {"request_id": answer.headers["X-Request-Id"]}


def retrain(service: loop.Service) -> dict[str, Any]:
    service.wait("/jobs", lambda jobs: all(job["state"] != "running" for job in jobs), timeout_s=60)
    answer = httpx.post(f"{service.url}/retrain", headers=loop.KEY)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    ended, _ = service.wait(f"/jobs/{job['id']}", lambda body: body["state"] != "running", timeout_s=60)
    return ended


def training_process(service: loop.Service) -> int:
    """The child that trains."""
    assert service.process is not None
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = subprocess.run(["pgrep", "-P", str(service.process.pid)], capture_output=True, text=True).stdout.split()
        if found:
            return int(found[0])
        time.sleep(0.01)
    pytest.fail("nothing trains")


def test_from_the_first_training_to_a_refused_a_swapped_and_a_withdrawn_version(
    start: Start, environment: dict[str, str]
) -> None:
    service = start()
    assert httpx.get(f"{service.url}/livez").status_code == 200
    answer = httpx.get(f"{service.url}/readyz")
    assert answer.status_code == 503
    assert answer.json()["phase"] in ("empty", "preparing", "training")
    first = ready(service)
    data = Path(environment["DATASET"])
    good = tiny.sentences(160)
    with loop.Load(int(environment["PORT"]), [text for text, _ in good], clients=2) as load:
        assert retrain(service)["state"] == "finished"  # nothing is new
        assert service.version() == first

        opposite = {"good": "bad", "bad": "good"}
        loop.write_rows(data / "train.csv", [(text, opposite[label]) for text, label in good])
        job = retrain(service)
        assert job["state"] == "refused"
        assert "may be worse than the champion" in job["said"]
        assert service.version() == first

        loop.write_rows(data / "train.csv", [*good, *tiny.sentences(60, first=400)])
        job = retrain(service)
        assert job["state"] == "finished"
        second = job["version"]
        service.wait("/readyz", lambda body: body["model_version"] == second, timeout_s=10)
        said, _ = service.command("rollback")
        assert f"{first} is the champion again" in said
        service.wait("/readyz", lambda body: body["model_version"] == first, timeout_s=2)
        assert retrain(service)["state"] == "refused"  # what people withdrew stays so
        assert ask(service)["model_version"] == first
    assert set(load.statuses) == {"200"}
    assert set(load.versions) == {first, second}
    table, _ = service.command("versions")
    assert [line.split()[0] for line in table.splitlines()[1:]] == sorted({first, second} | {refused(table)})
    assert service.end() == 0
    again = start()
    assert ready(again) == first


def refused(table: str) -> str:
    return next(line.split()[0] for line in table.splitlines() if "refused" in line)


def test_labelled_feedback_reaches_the_next_training_and_survives_the_server(
    start: Start, environment: dict[str, str]
) -> None:
    service = start()
    first = ready(service)
    answer = ask(service, "the film was great")
    with httpx.Client(base_url=service.url, headers=loop.KEY) as client:
        by_id = {"request_id": answer["request_id"], "label": answer["label"]}
        assert client.post("/feedback", json=by_id).json() == {"stored": True}
        for text, label in tiny.sentences(40, first=700):
            client.post("/feedback", json={"text": text, "label": label}).raise_for_status()
    assert service.process is not None
    service.process.kill()
    service.process.wait()
    service = start()
    assert ready(service) == first
    assert service.get("/feedback")["labels"] == 41
    service.wait("/readyz", lambda body: body["model_version"] != first, timeout_s=60)  # the start's own training
    joined = service.get("/model")["data"]["feedback"]
    assert joined["train"] + joined["test"] == 40


def test_a_first_training_that_fails_ends_the_container_with_its_code_and_reason(start: Start) -> None:
    service = start(LR="1")
    assert service.process is not None
    assert service.process.wait(60) == 7
    assert "there is nothing to serve: The loss" in service.tail()


def test_a_first_candidate_that_is_refused_ends_it_too(start: Start) -> None:
    service = start(MIN_ACCURACY="1", LR="1e-9", N_EPOCHS="1")
    assert service.process is not None
    assert service.process.wait(60) == 10
    assert "is below MIN_ACCURACY=1" in service.tail()


def test_a_signal_in_the_first_training_ends_both_and_the_next_start_goes_on(start: Start) -> None:
    service = start(N_EPOCHS="400")
    service.wait("/readyz", lambda body: body.get("progress"), timeout_s=60)
    child = training_process(service)
    assert service.end() == 128 + signal.SIGTERM
    assert not Path(f"/proc/{child}").exists()
    assert "checkpoint" in service.log.read_text() or list(
        Path(service.environment["MODEL_PATH"]).glob("checkpoints/*")
    )


@pytest.mark.parametrize("victim", ["child", "server", "both"])
def test_whoever_is_killed_in_a_retraining_the_last_good_model_answers(start: Start, victim: str) -> None:
    service = start()
    first = ready(service)
    service.end()
    killer = start(N_EPOCHS="400", SEED="2")
    child = training_process(killer)
    assert killer.process is not None
    killer.wait("/readyz", lambda body: body["phase"] == "ready", timeout_s=30)
    if victim in ("child", "both"):
        os.kill(child, signal.SIGKILL)
    if victim in ("server", "both"):
        killer.process.kill()
        killer.process.wait()
        killer = start(N_EPOCHS="1", LR="1e-9")
    assert ready(killer) == first
    assert ask(killer)["model_version"] == first
    if victim == "child":
        jobs, _ = killer.wait("/jobs", lambda jobs: jobs[0]["state"] != "running", timeout_s=30)
        assert (jobs[0]["state"], jobs[0]["exit_code"]) == ("failed", 137)
        assert httpx.get(f"{killer.url}/livez").status_code == 200


@pytest.mark.parametrize("damage", ["weights", "pointer", "decision", "no store"])
def test_torn_files_change_nothing_for_a_running_server_and_little_for_a_new_one(
    start: Start, environment: dict[str, str], damage: str
) -> None:
    service = start()
    first = ready(service)
    store = Path(environment["MODEL_PATH"])
    loop.write_rows(Path(environment["DATASET"]) / "train.csv", [*tiny.sentences(160), *tiny.sentences(60, first=400)])
    second = retrain(service)["version"]
    service.wait("/readyz", lambda body: body["model_version"] == second, timeout_s=10)
    if damage == "weights":
        weights = store / "versions" / second / "engine" / "model.bin"
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "pointer":
        (store / "champion").write_bytes(b"")
    elif damage == "decision":
        (store / "versions" / second / "decision.json").write_text("{")
    else:
        shutil.move(store, store.with_name("away"))
    time.sleep(0.5)
    assert ask(service)["model_version"] == second
    if damage == "no store":
        return
    service.end()
    again = start()
    assert ready(again) == (first if damage == "weights" else second)


def test_a_full_disk_is_a_failed_job_and_the_model_goes_on(
    start: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    store = tmp_path / "small"
    store.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", store], capture_output=True)
    if mounted.returncode:
        pytest.skip("a disk cannot be mounted here")
    try:
        service = start(MODEL_PATH=str(store))
        first = ready(service)
        with pytest.raises(OSError, match="No space"):
            (store / "ballast").write_bytes(bytes(4 << 20))
        loop.write_rows(Path(environment["DATASET"]) / "train.csv", tiny.sentences(200))
        job = retrain(service)
        assert job["state"] == "failed"
        assert job["exit_code"] == 6
        assert ask(service)["model_version"] == first
        (store / "ballast").unlink()
        assert retrain(service)["state"] == "finished"
        service.end()
    finally:
        subprocess.run(["umount", "--lazy", store], check=True)


def test_two_trainers_on_one_store_do_not_meet(start: Start, environment: dict[str, str]) -> None:
    service = start(N_EPOCHS="400")
    service.wait("/readyz", lambda body: body.get("progress"), timeout_s=60)
    said, _ = service.command("train")
    assert "has been training for this store since" in said


def test_a_training_can_only_be_asked_for_with_the_key(start: Start) -> None:
    service = start()
    ready(service)
    assert httpx.post(f"{service.url}/retrain").status_code == 401
    assert httpx.get(f"{service.url}/jobs/none", headers=loop.KEY).status_code == 404
    service.end()
    open_one = start(API_KEY="")
    ready(open_one)
    assert httpx.post(f"{open_one.url}/retrain").status_code == 403


def test_many_ask_while_a_version_is_swapped_in_and_back_again(start: Start, environment: dict[str, str]) -> None:
    service = start()
    first = ready(service)
    loop.write_rows(Path(environment["DATASET"]) / "train.csv", tiny.sentences(200))
    second = retrain(service)["version"]
    ended = threading.Event()

    def swap() -> None:
        for number in range(6):
            service.command("promote", (first, second)[number % 2])
            time.sleep(0.5)
        ended.set()

    with loop.Load(int(environment["PORT"]), ["a great film", "the food was awful"], clients=4) as load:
        threading.Thread(target=swap).start()
        assert ended.wait(60)
    assert set(load.statuses) == {"200"}
    assert set(load.versions) == {first, second}
    assert (
        json.loads((Path(environment["MODEL_PATH"]) / "versions" / first / "decision.json").read_text())["by"]
        == "person"
    )
