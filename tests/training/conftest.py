import asyncio
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from tuneserve.lifecycle import gate
from tuneserve.serving import probe
from tuneserve.tasks.catalog import load_model
from tuneserve.training import openvino_graph


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base_model(tmp_path_factory.mktemp("base") / "bert")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_csv(tmp_path_factory.mktemp("data") / "reviews.csv", tiny.sentences(240))


@pytest.fixture
def environment(tmp_path: Path, tiny_bert: Path, tiny_data: Path) -> dict[str, str]:
    """A whole job that takes about a second."""
    return {
        "DATASET": str(tiny_data),
        "BASE_MODEL": str(tiny_bert),
        "NUM_MAX_POSITIONS": "32",
        "MODEL_PATH": str(tmp_path / "models"),
        "DATA_PATH": str(tmp_path / "data"),
        "LOG_PATH": str(tmp_path / "logs"),
        "N_EPOCHS": "3",
        "MIN_VALID": "0",
        "MIN_STEPS": "0",
        "BATCH_SIZE": "16",
        "LR": "5e-3",
        "DEVICE": "cpu",
        "PRECISION": "fp32",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def tried_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the gate try versions in this process, for its own takes longer than a tiny training."""

    def try_here(command: list[str], stdin: Any, stdout: Any, **options: Any) -> "subprocess.CompletedProcess[bytes]":
        models: list[Any] = []
        with monkeypatch.context() as patch:
            patch.setattr(probe, "load_model", lambda *a, **k: models.append(load_model(*a, **k)) or models[-1])
            stdout.write(json.dumps(asyncio.run(probe.probe(json.load(stdin)))).encode())
        for model in models:
            model.close()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(gate, "subprocess", SimpleNamespace(run=try_here, TimeoutExpired=subprocess.TimeoutExpired))


@pytest.fixture
def brief(tried_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And make no graph of a version, which takes as long."""
    monkeypatch.setattr(openvino_graph, "export", lambda *arguments, **named: None)
