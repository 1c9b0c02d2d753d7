import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from pydantic import SecretStr
from wire import Full, served

from tuneserve.artifact import Version, read_version
from tuneserve.files import write_json
from tuneserve.network.graph import Prepared
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings
from tuneserve.tasks.classifier import Classifier


class EchoEngine:
    """An engine whose logits follow from the token ids by a rule a test can work out: their sum, and its opposite."""

    max_batch_tokens = 64

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def prepare(self, texts: Any) -> Prepared:
        rows = [np.array(text) for text in texts]
        return Prepared(tuple(rows), len(rows), sum(map(len, rows)))

    def begin(self, prepared: Prepared) -> None:
        self.running = prepared.inputs

    def wait(self, seconds: float) -> None:
        pass

    def result(self) -> Any:
        self.batches.append([len(row) for row in self.running])
        totals = np.array([[row.sum() / 100] for row in self.running], dtype=np.float32)
        return np.concatenate([-totals, totals], axis=1)

    def warm_up(self) -> None:
        pass


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
def classifier(version: Version, engine: EchoEngine) -> Iterator[Classifier]:
    classifier = Classifier(version, engine)
    yield classifier
    classifier.close()


@pytest.fixture
def slot(classifier: Classifier) -> Iterator[Slot]:
    """A slot in which an echo answers."""
    slot = Slot()
    slot.take(classifier)
    yield slot
    slot.close()


@pytest.fixture(scope="session")
def make_engine() -> Callable[..., EchoEngine]:
    """An echo engine whose `result` first does something else; what that returns, if anything, is the result."""

    def make(instead: Callable[[EchoEngine], Any]) -> EchoEngine:
        class Changed(EchoEngine):
            def result(self) -> Any:
                found = instead(self)
                return super().result() if found is None else found

        return Changed()

    return make


@pytest.fixture
def held(version: Version, make_engine: Callable[..., Any]) -> Iterator[tuple[Slot, threading.Event]]:
    """A slot whose engine answers nothing before it is told to, and room for six waiting tokens."""
    go = threading.Event()

    def wait_for_it(engine: Any) -> None:
        assert go.wait(60)

    slot = Slot()
    slot.take(Classifier(version, make_engine(wait_for_it), max_queue_tokens=6))
    yield slot, go
    go.set()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_environ({"MODEL_PATH": str(tmp_path / "models"), "MAX_BODY_KB": "4"})


@pytest.fixture
def fill(settings: Settings, held: tuple[Slot, threading.Event]) -> Iterator[Callable[..., Full]]:
    ends: list[Any] = []

    def start(*headers: str, key: str = "", access_log: bool = False, **options: Any) -> Full:
        slot, go = held
        changed = settings.model_copy(update={"api_key": SecretStr(key), "access_log": access_log})
        context = served(changed, slot, **options)
        port = context.__enter__()
        ends.append(context)
        full = Full(slot, go, port, *headers)
        ends.append(full)
        return full

    yield start
    for one in reversed(ends):
        one.close() if isinstance(one, Full) else one.__exit__(None, None, None)
