import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from tuneserve.artifact import Version, read_version, write_json
from tuneserve.serving.classifier import Classifier
from tuneserve.settings import Settings


class EchoEngine:
    """An engine whose logits follow from the token ids by a rule a test can work out: their sum, and its opposite."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []

    def infer(self, input_ids: Any, attention_mask: Any) -> Any:
        self.shapes.append(input_ids.shape)
        total = (input_ids * attention_mask).sum(axis=1, dtype=np.float32)[:, None] / 100
        return np.concatenate([-total, total], axis=1)


@pytest.fixture
def engine() -> EchoEngine:
    return EchoEngine()


@pytest.fixture(scope="session")
def version(tmp_path_factory: pytest.TempPathFactory) -> Version:
    """A version's folder with a real tokenizer and no weights: what the serving half reads beside its engine."""
    folder = tiny.make_base_model(tmp_path_factory.mktemp("versions") / "20260102T030405Z-0a1b2c3d")
    (folder / "model.safetensors").unlink()
    write_json(folder / "metadata.json", {"labels": ["bad", "good"], "settings": {"num_max_positions": 16}})
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 0
    return read_version(folder)


@pytest.fixture
def classifier(version: Version, engine: EchoEngine) -> Classifier:
    return Classifier(version, engine)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_environ({"MODEL_PATH": str(tmp_path / "models"), "MAX_BODY_KB": "4", "MAX_BATCH_TEXTS": "100"})
