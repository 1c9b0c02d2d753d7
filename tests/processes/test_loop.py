"""The whole loop on real processes: what happens when each of them is killed, the disk is full, the files are torn."""

import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import loop
import pytest
import tiny
from conftest import Disk, mounted
from wire import wait_until

from tuneserve.lifecycle.status import hold
from tuneserve.lifecycle.store import Store

Start = Callable[..., loop.Service]
Put = Callable[..., list[str]]

PATIENCE_S = 240
"""Seconds for what takes seconds: other tests may run on the same cores."""
TEXTS = [tiny.sentences(160), [*tiny.sentences(160), *tiny.sentences(60, first=400)]]
"""What the first version is trained on, and what the second is."""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {
        **tiny.RECIPE,
        **tiny.paths(tmp_path),
        "DATASET": str(write_data(tmp_path / "data", TEXTS[0])),
        "BASE_MODEL": str(tiny.make_base_model(tmp_path / "base")),
        "HOST": "127.0.0.1",
        "PORT": str(loop.free_port()),
        "API_KEY": loop.KEY["X-API-Key"],
        "DRIFT_WINDOW": "50",
        "RETRAIN_NICE": "0",  # other tests may run on the same cores
    }


def write_data(folder: Path, texts: list[tuple[str, str]]) -> Path:
    folder.mkdir(exist_ok=True)
    loop.write_rows(folder / "train.csv", texts)
    loop.write_rows(folder / "test.csv", tiny.sentences(120, first=1000))
    return folder


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, list[str]]]:
    """A store with the first version, and one with the second too, which is the champion; the ids in their order."""
    folder, versions = tmp_path_factory.mktemp("trained"), []
    for number, texts in enumerate(TEXTS, 1):
        dataset = write_data(folder / "texts", texts)
        versions.append(tiny.train(dataset, folder, MAX_ACCURACY_DROP="1", MAX_LATENCY_INCREASE="100").id)
        shutil.copytree(folder / "MODEL", folder / str(number))
    return [(folder / str(number), versions[:number]) for number in (1, 2)]


@pytest.fixture
def put(environment: dict[str, str], stores: list[tuple[Path, list[str]]]) -> Put:
    """Put a store with so many versions into place, and the data of its champion; their ids."""

    def put(count: int, path: Path | None = None) -> list[str]:
        folder, versions = stores[count - 1]
        shutil.copytree(folder, path or environment["MODEL_PATH"], dirs_exist_ok=True)
        loop.write_rows(Path(environment["DATASET"]) / "train.csv", TEXTS[count - 1])
        return versions

    return put


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    services = []

    def start(verb: str = "train-serve", **changed: str) -> loop.Service:
        services.append(loop.Service(environment | changed, tmp_path / "out.log", verb=verb))
        services[-1].start()
        return services[-1]

    yield start
    for service in services:
        kill(service)


def kill(service: loop.Service) -> None:
    assert service.process is not None
    service.process.kill()
    service.process.wait()


def ready(service: loop.Service) -> str:
    body, _ = service.wait("/readyz", lambda body: body["phase"] == "ready", timeout_s=PATIENCE_S)
    return str(body["model_version"])


def wait_for(service: loop.Service, version: str) -> None:
    service.wait("/readyz", lambda body: body["model_version"] == version, timeout_s=PATIENCE_S)


def wait_for_training(service: loop.Service) -> None:
    service.wait("/jobs", lambda jobs: jobs[0].get("progress", {}).get("phase") == "training", timeout_s=PATIENCE_S)


def wait_for_quiet(service: loop.Service) -> list[dict[str, Any]]:
    """Wait until nothing trains; all trainings, the latest first."""
    jobs, _ = service.wait("/jobs", lambda jobs: all(job["state"] != "running" for job in jobs), timeout_s=PATIENCE_S)
    return list(jobs)


def ask(service: loop.Service, text: str = "a great film") -> dict[str, Any]:
    answer = httpx.post(f"{service.url}/inference", json={"text": text}, headers=loop.KEY)
    assert answer.status_code == 200, answer.text
    return answer.json() | {"request_id": answer.headers["X-Request-Id"]}


def retrain(service: loop.Service) -> dict[str, Any]:
    wait_for_quiet(service)
    answer = httpx.post(f"{service.url}/retrain", headers=loop.KEY)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    ended, _ = service.wait(f"/jobs/{job['id']}", lambda body: body["state"] != "running", timeout_s=PATIENCE_S)
    return ended


def training_process(service: loop.Service) -> int:
    """The child that trains."""
    assert service.process is not None
    threads = Path(f"/proc/{service.process.pid}/task")
    found: list[str] = []
    wait_until(lambda: found.extend(" ".join(one.read_text() for one in threads.glob("*/children")).split()) or found)
    return int(found[0])


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
    good = TEXTS[0]
    with loop.Load(int(environment["PORT"]), [text for text, _ in good], clients=2) as load:
        job = retrain(service)
        assert (job["state"], job["version"]) == ("finished", first)
        assert job["said"] == "nothing to train: it has these settings and data"
        assert service.version() == first

        opposite = {"good": "bad", "bad": "good"}
        loop.write_rows(data / "train.csv", [(text, opposite[label]) for text, label in good])
        job = retrain(service)
        assert job["state"] == "refused"
        assert "may be worse than the champion" in job["said"]
        assert service.version() == first

        loop.write_rows(data / "train.csv", TEXTS[1])
        job = retrain(service)
        assert job["state"] == "finished"
        second = job["version"]
        wait_for(service, second)
        said, _ = service.command("rollback")
        assert f"{first} is the champion again" in said
        wait_for(service, first)
        assert retrain(service)["state"] == "refused"  # what people withdrew stays so
        assert ask(service)["model_version"] == first
    assert set(load.statuses) == {"200"}
    assert set(load.versions) == {first, second}
    table, _ = service.command("versions")
    assert [line.split()[0] for line in table.splitlines()[1:]] == sorted({first, second} | {refused(table)})
    assert service.end() == 0
    again = start()
    assert ready(again) == first
    again.command("promote", second)  # which is not loaded any more
    wait_for(again, second)


def refused(table: str) -> str:
    return next(line.split()[0] for line in table.splitlines() if "refused" in line)


def test_labelled_feedback_reaches_the_next_training_and_survives_the_server(start: Start, put: Put) -> None:
    [first] = put(1)
    service = start("serve")
    assert ready(service) == first
    answer = ask(service, "the film was great")
    with httpx.Client(base_url=service.url, headers=loop.KEY) as client:
        by_id = {"request_id": answer["request_id"], "label": answer["label"]}
        assert client.post("/feedback", json=by_id).json() == {"stored": True}
        for text, label in tiny.sentences(40, first=700):
            client.post("/feedback", json={"text": text, "label": label}).raise_for_status()
    kill(service)
    service = start()
    assert ready(service) == first
    assert service.get("/feedback")["labels"] == 41
    service.wait(
        "/readyz", lambda body: body["model_version"] != first, timeout_s=PATIENCE_S
    )  # the start's own training
    joined = service.get("/model")["data"]["feedback"]
    assert joined["train"] + joined["test"] == 40


def test_a_first_training_that_fails_ends_the_container_with_its_code_and_reason(start: Start) -> None:
    service = start(LR="1")
    assert service.process is not None
    assert service.process.wait(PATIENCE_S) == 7
    assert "there is nothing to serve: The loss" in service.tail()


def test_a_first_candidate_that_is_refused_ends_it_too(start: Start) -> None:
    service = start(MIN_ACCURACY="1", LR="1e-9", N_EPOCHS="1")
    assert service.process is not None
    assert service.process.wait(PATIENCE_S) == 10
    assert "is below MIN_ACCURACY=1" in service.tail()


@pytest.mark.parametrize("both", [False, True], ids=["docker stop", "Ctrl+C in a terminal"])
def test_a_signal_in_the_first_training_ends_both_and_the_next_start_goes_on(start: Start, both: bool) -> None:
    service = start(N_EPOCHS="4000")
    store = Path(service.environment["MODEL_PATH"])
    seen, _ = service.wait("/readyz", lambda body: body.get("progress"), timeout_s=PATIENCE_S)
    assert seen["phase"] == "training"
    assert {"epoch", "progress", "loss", "eta_s"} <= set(seen)
    wait_until(lambda: any(store.glob("checkpoints/*/[0-9]*")))
    child = training_process(service)
    number = signal.SIGINT if both else signal.SIGTERM
    if both:  # as the terminal does, which knows only the group
        os.kill(child, number)
    assert service.end(number) == 128 + number
    assert not Path(f"/proc/{child}").exists()
    [(epoch, batch)] = re.findall(r"interrupted in epoch (\d+) after batch (\d+) of", service.log.read_text())
    newest = max(path.name for path in store.glob("checkpoints/*/[0-9]*"))
    assert newest == f"{int(epoch) - 1:05d}-{int(batch):08d}.safetensors"
    assert not [path for path in store.rglob(".*") if path.is_file()]
    again = start(N_EPOCHS="4000")
    wait_until(lambda: f"resuming in epoch {epoch} after batch {batch} of" in again.log.read_text())


def test_a_second_signal_waits_for_no_checkpoint(start: Start) -> None:
    service = start(N_EPOCHS="4000")
    service.wait("/readyz", lambda body: body.get("progress"), timeout_s=PATIENCE_S)
    child = training_process(service)
    assert service.process is not None
    os.kill(child, signal.SIGSTOP)  # it hangs: in a file system, say
    service.process.send_signal(signal.SIGTERM)
    wait_until(lambda: not _listens(service))
    assert service.end() == 128 + signal.SIGTERM
    assert not Path(f"/proc/{child}").exists()
    assert "interrupted in epoch" not in service.log.read_text()


def _listens(service: loop.Service) -> bool:
    try:
        return httpx.get(f"{service.url}/livez").status_code == 200
    except httpx.TransportError:
        return False


def test_a_training_yields_if_there_is_something_to_answer_with(start: Start, put: Put) -> None:
    service = start(RETRAIN_NICE="idle", N_EPOCHS="400")
    wait_for_training(service)
    assert os.sched_getscheduler(training_process(service)) == os.SCHED_OTHER  # nobody waits for answers yet
    service.end()
    put(1)
    service = start(RETRAIN_NICE="idle", N_EPOCHS="400")
    child = training_process(service)
    wait_until(lambda: os.sched_getscheduler(child) == os.SCHED_IDLE)
    wait_until(lambda: "RETRAIN_NICE=idle: no progress" in service.log.read_text())
    ready(service)
    assert ask(service)["label"] in ("good", "bad")


@pytest.mark.parametrize("victim", ["child", "server", "both"])
def test_whoever_is_killed_in_a_retraining_the_last_good_model_answers(start: Start, put: Put, victim: str) -> None:
    [first] = put(1)
    service = start(N_EPOCHS="400", SEED="2")
    child = training_process(service)
    assert ready(service) == first
    if victim in ("child", "both"):
        os.kill(child, signal.SIGKILL)
    if victim in ("server", "both"):
        kill(service)
        service = start(N_EPOCHS="1", LR="1e-9")
    assert ready(service) == first
    assert ask(service)["model_version"] == first
    if victim == "child":
        jobs = wait_for_quiet(service)
        assert (jobs[0]["state"], jobs[0]["exit_code"]) == ("failed", 137)
        assert httpx.get(f"{service.url}/livez").status_code == 200


@pytest.mark.parametrize("damage", ["weights", "pointer", "decision", "no store"])
def test_torn_files_change_nothing_for_a_running_server_and_little_for_a_new_one(
    start: Start, put: Put, environment: dict[str, str], damage: str
) -> None:
    first, second = put(2)
    service = start("serve")
    assert ready(service) == second
    store = Path(environment["MODEL_PATH"])
    if damage == "weights":
        weights = store / "versions" / second / "engine" / "model.bin"
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "pointer":
        (store / "champion").write_bytes(b"")
    elif damage == "decision":
        (store / "versions" / second / "decision.json").write_text("{")
    else:
        shutil.move(store, store.with_name("away"))
    assert {ask(service)["model_version"] for _ in range(50)} == {second}  # it looks at the store five times a second
    if damage == "no store":
        return
    service.end()
    again = start()
    assert ready(again) == (first if damage == "weights" else second)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with mounted(tmp_path / "disk", size="3m") as disk:
        yield disk


def give(service: loop.Service, text: str) -> int:
    """Bring a labelled text; the status."""
    return httpx.post(f"{service.url}/feedback", json={"text": text, "label": "good"}, headers=loop.KEY).status_code


def test_a_full_disk_is_a_failed_job_and_the_model_goes_on(
    start: Start, put: Put, environment: dict[str, str], disk: Disk
) -> None:
    [first] = put(1, disk.path)
    service = start(MODEL_PATH=str(disk.path))
    wait_for_quiet(service)
    disk.fill()
    loop.write_rows(Path(environment["DATASET"]) / "train.csv", tiny.sentences(200))
    job = retrain(service)
    assert (job["state"], job["exit_code"]) == ("failed", 6)
    assert give(service, "a great film") == 503
    assert ask(service)["model_version"] == first
    disk.empty()
    assert retrain(service)["state"] == "finished"
    assert give(service, "a great film") == 200


def test_a_disk_that_fills_in_a_training_fails_the_job_alone(start: Start, put: Put, disk: Disk) -> None:
    [first] = put(1, disk.path)
    service = start(MODEL_PATH=str(disk.path), SEED="2", N_EPOCHS="60", CHECKPOINT_MINUTES="0.001")
    wait_for_training(service)
    disk.fill()
    jobs = wait_for_quiet(service)
    assert (jobs[0]["state"], jobs[0]["exit_code"]) == ("failed", 6)
    assert ask(service)["model_version"] == first


def test_a_read_only_store_is_served_and_a_vanished_one_is_not_mistaken_for_a_new_one(
    start: Start, put: Put, disk: Disk
) -> None:
    [first] = put(1, disk.path)
    service = start(MODEL_PATH=str(disk.path))
    assert ready(service) == first
    wait_for_quiet(service)
    disk.make_read_only()
    assert retrain(service)["state"] == "failed"
    assert give(service, "a great film") == 503
    assert ask(service)["model_version"] == first
    service.end()
    service = start(MODEL_PATH=str(disk.path))
    assert ready(service) == first
    assert "nothing can be trained, and what is in the store answers" in service.log.read_text()
    disk.take_away()
    assert "no longer holds the versions" in retrain(service)["said"]
    assert ask(service)["model_version"] == first
    assert not (disk.path / "versions").exists()


def refusals(service: loop.Service) -> float:
    """Versions that the server has refused so far."""
    found = re.search(
        r'^tuneserve_swaps_total\{outcome="refused"\} (\S+)', httpx.get(f"{service.url}/metrics").text, re.M
    )
    return float(found[1]) if found else 0.0


def errors(service: loop.Service) -> int:
    """Lines of this level in its log."""
    return service.log.read_text().count(" ERROR ")


def test_a_champion_with_broken_files_or_a_pointer_to_nothing_never_answers(
    start: Start, put: Put, environment: dict[str, str]
) -> None:
    first, second = put(2)
    store = Path(environment["MODEL_PATH"])
    service = start("serve")
    assert ready(service) == second
    for name in ("model.bin", "model.xml"):
        file = store / "versions" / first / "engine" / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
        before = refusals(service)
        (store / "champion").write_text(f"{first}\n")
        wait_until(lambda before=before: refusals(service) > before)
        assert ask(service)["model_version"] == second
        (store / "champion").write_text(f"{second}\n")
        file.write_bytes(whole)
    for pointer in (b"", b"\xff\xfe\0", b"../../etc", b"nothing\n"):
        before = errors(service)
        (store / "champion").write_bytes(pointer)
        wait_until(lambda before=before: errors(service) > before)
        assert ask(service)["model_version"] == second
    service.end()
    assert ready(start()) in (first, second)  # both passed the gate, and both are whole again


def test_two_trainers_on_one_store_do_not_meet(environment: dict[str, str], tmp_path: Path) -> None:
    store = Store(Path(environment["MODEL_PATH"]))
    store.prepare()
    with hold(store.lock):
        said, _ = loop.Service(environment, tmp_path / "out.log").command("train")
    assert "has been training for this store since" in said


def test_many_ask_while_a_version_is_swapped_in_and_back_again(
    start: Start, put: Put, environment: dict[str, str]
) -> None:
    first, second = put(2)
    service = start()
    assert ready(service) == second
    ended = threading.Event()

    def swap() -> None:
        for number in range(6):
            service.command("promote", (first, second)[number % 2])
            wait_for(service, (first, second)[number % 2])
        ended.set()

    with loop.Load(int(environment["PORT"]), ["a great film", "the food was awful"], clients=4) as load:
        threading.Thread(target=swap).start()
        assert ended.wait(240)
    assert set(load.statuses) == {"200"}
    assert set(load.versions) == {first, second}
    service.command("promote", first)
    assert retrain(service)["state"] == "finished"
    assert ask(service)["model_version"] == first  # what people chose stays until the data change
    assert (
        json.loads((Path(environment["MODEL_PATH"]) / "versions" / first / "decision.json").read_text())["by"]
        == "person"
    )
