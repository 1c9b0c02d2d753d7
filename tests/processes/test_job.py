"""`run.py train` as a real process: its signals, its codes and what it prints; and whole trainings that take long."""

import signal
from pathlib import Path

import pytest
import tiny
from jobs import start, train
from wire import wait_until

from tuneserve.lifecycle.store import Store


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_real_run_with_its_code_and_the_next_run_resumes(
    environment: dict[str, str], number: signal.Signals, code: int
) -> None:
    environment |= {"N_EPOCHS": "400", "LR": "1e-4"}
    checkpoints = Store(Path(environment["MODEL_PATH"])).checkpoints_folder
    process = start(environment)
    wait_until(lambda: any(checkpoints.glob("*/*.safetensors")))
    process.send_signal(number)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    assert "the same command goes on from there" in output
    assert f"{number.name}: ended with exit code {code}" in output
    process = start(environment)
    lines = iter(process.stdout or [])
    assert any("resuming in epoch" in line for line in lines)
    process.kill()
    process.communicate()


def test_a_child_takes_one_signal_and_ignores_the_rest(environment: dict[str, str]) -> None:
    """As many may reach it as Ctrl+C in a terminal, its server and its server's end send."""
    checkpoints = Store(Path(environment["MODEL_PATH"])).checkpoints_folder
    process = start(environment | {"N_EPOCHS": "400"}, verb=("train", "--child"))
    wait_until(lambda: any(checkpoints.glob("*/*.safetensors")))
    for number in [signal.SIGINT, signal.SIGTERM] * 5:
        process.send_signal(number)
    output, _ = process.communicate(timeout=240)
    assert process.returncode in (130, 143), output
    assert "the same command goes on from there" in output
    assert not list(checkpoints.glob("*/.*"))


def test_without_a_terminal_progress_is_plain_lines(environment: dict[str, str]) -> None:
    process = start(environment)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "\r" not in output
    assert "validation_accuracy=" in output
    assert all(line.startswith("20") for line in output.splitlines()), output


@pytest.mark.parametrize("kind", sorted(tiny.KINDS.keys() - {"bert", "deberta-v2"}))
def test_every_other_encoder_learns_too(kind: str, environment: dict[str, str], tmp_path: Path) -> None:
    base = tiny.make_base_model(tmp_path / kind, kind)
    history = train(environment, BASE_MODEL=str(base), LR="2e-3", N_EPOCHS="30").metadata["history"]
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]
