"""A run that is hit again and again, as a real process: it ends with the weights of one that was left alone."""

import multiprocessing
import multiprocessing.context
import os
import random
import signal
import time
from pathlib import Path

import pytest
import tiny
from forked import run_job

from tuneserve.lifecycle.store import Store

HITS = 20
CODES: dict[int, int] = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Where processes of their own come from, forked from one that has loaded torch and done nothing with it."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tuneserve.training.job"])
    return context


def weights(environment: dict[str, str]) -> bytes:
    return (Store(Path(environment["MODEL_PATH"])).champion().folder / "model.safetensors").read_bytes()


@pytest.fixture
def long_run(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Long enough that all hits find it at work: in warm-up, between steps, in validation, while it writes."""
    data = tiny.write_csv(tmp_path / "many.csv", tiny.sentences(600))
    return environment | {
        "DATASET": str(data),
        "N_EPOCHS": "160",
        "LR": "5e-4",
        "DROPOUT": "0.1",
        "CHECKPOINT_MINUTES": "0.003",
    }


def test_twenty_random_signals_change_no_bit_of_the_weights(
    long_run: dict[str, str], tmp_path: Path, processes: multiprocessing.context.ForkServerContext
) -> None:
    log = tmp_path / "log"

    def start(environment: dict[str, str]) -> multiprocessing.context.ForkServerProcess:
        log.write_text("")
        process = processes.Process(target=run_job, args=(environment, log))
        process.start()
        while "texts cut at" not in log.read_text() and process.is_alive():
            time.sleep(0.01)  # now the training begins
        return process

    whole = long_run | {"MODEL_PATH": str(tmp_path / "whole")}
    process, began = start(whole), time.monotonic()
    process.join(120)
    assert process.exitcode == 0, log.read_text()
    length_s = time.monotonic() - began

    chance = random.Random(20)
    for number in ([*CODES] * HITS)[:HITS]:
        process = start(long_run)
        time.sleep(chance.uniform(0, 1.5 * length_s / HITS))
        assert process.is_alive(), f"the run was over too soon; it must be longer\n{log.read_text()}"
        os.kill(process.pid or 0, number)
        process.join(60)
        assert process.exitcode == CODES[number], log.read_text()

    process = start(long_run)
    process.join(120)
    assert process.exitcode == 0, log.read_text()
    assert "resuming in epoch" in log.read_text()
    assert weights(long_run) == weights(whole)
