"""A run that is hit again and again, as a real process: it ends with the weights of one that was left alone."""

import os
import random
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import tiny
from forked import fork, run_job, run_job_until
from transformers import AutoModelForSequenceClassification
from wire import wait_until

from tuneserve.lifecycle.store import Store

HITS, EPOCHS = 20, 160
PATIENCE_S = 300
"""Seconds for what takes seconds: other tests may run on the same cores."""
CODES: dict[int, int] = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}


def weights(environment: dict[str, str]) -> bytes:
    return (Store(Path(environment["MODEL_PATH"])).champion().folder / "model.safetensors").read_bytes()


@pytest.fixture
def long_run(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Long enough that all hits find it at work: in warm-up, between steps, in validation, while it writes."""
    data = tiny.write_csv(tmp_path / "many.csv", tiny.sentences(600))
    return environment | {
        "DATASET": str(data),
        "N_EPOCHS": str(EPOCHS),
        "LR": "5e-4",
        "DROPOUT": "0.1",
        "CHECKPOINT_MINUTES": "0.003",
    }


def test_twenty_random_signals_change_no_bit_of_the_weights(long_run: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "log"

    def start(environment: dict[str, str], *, epochs: int = 0) -> ForkServerProcess:
        """Start a run, and wait until it trains, or has done so many epochs."""
        log.write_text("")
        process = fork(run_job, environment, log)
        wait_until(lambda: "texts cut at" in log.read_text() or not process.is_alive())
        wait_until(lambda: log.read_text().count(" epoch=") >= epochs or not process.is_alive())
        return process

    whole = long_run | {"MODEL_PATH": str(tmp_path / "whole")}
    process, began = start(whole), time.monotonic()
    process.join(PATIENCE_S)
    assert process.exitcode == 0, log.read_text()
    epoch_s = (time.monotonic() - began) / EPOCHS

    chance = random.Random(20)
    for number in ([*CODES] * HITS)[:HITS]:
        process = start(long_run, epochs=chance.randrange(EPOCHS // HITS))
        time.sleep(chance.uniform(0, epoch_s))
        assert process.is_alive(), f"the run was over too soon; it must be longer\n{log.read_text()}"
        os.kill(process.pid or 0, number)
        process.join(PATIENCE_S)
        assert process.exitcode == CODES[number], log.read_text()

    process = start(long_run)
    process.join(PATIENCE_S)
    assert process.exitcode == 0, log.read_text()
    assert "resuming in epoch" in log.read_text()
    assert weights(long_run) == weights(whole)


@pytest.fixture(scope="module")
def weights_of_a_whole_run(tiny_bert: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    environment = short_run(folder, tiny_bert, tiny_data)
    process = fork(run_job, environment, folder / "log")
    process.join(PATIENCE_S)
    assert process.exitcode == 0, (folder / "log").read_text()
    return weights(environment)


def short_run(folder: Path, base_model: Path, dataset: Path) -> dict[str, str]:
    return {
        **tiny.RECIPE,
        **tiny.paths(folder),
        "DATASET": str(dataset),
        "BASE_MODEL": str(base_model),
        "N_EPOCHS": "1",
        "MAX_ACCURACY_DROP": "1",
    }


@pytest.mark.parametrize(
    "point",
    [
        r"versions/\.[^/]*/golden\.json",
        r"versions/\.[^/]*/engine/engine\.json",
        r"versions/\.[^/]*/report/test\.json",
        r"versions/\.[^/]*/metadata\.json",
        r"versions/[^./]*",
        r"evidence/[^./]*",
        r"versions/[^./]*/decision\.json",
        r"champion",
    ],
)
def test_a_kill_at_any_point_of_the_publication_leaves_whole_versions_and_the_next_start_goes_on(
    point: str, tiny_bert: Path, tiny_data: Path, tmp_path: Path, weights_of_a_whole_run: bytes
) -> None:
    environment, log = short_run(tmp_path, tiny_bert, tiny_data), tmp_path / "log"
    killed = fork(run_job_until, environment, log, point)
    killed.join(PATIENCE_S)
    assert killed.exitcode == -signal.SIGKILL, log.read_text()
    store = Store(Path(environment["MODEL_PATH"]))
    assert not store.pointer.exists()
    for version in store.versions():
        AutoModelForSequenceClassification.from_pretrained(version.folder)
    again = fork(run_job, environment, log)
    again.join(PATIENCE_S)
    assert again.exitcode == 0, log.read_text()
    assert weights(environment) == weights_of_a_whole_run
    assert [version.id for version in store.versions()] == [store.champion().id]
    assert not [path for folder in ("versions", "evidence") for path in (store.root / folder).glob(".*")]
