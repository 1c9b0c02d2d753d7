"""The echo that the tests of serving have, models of the other tasks that answer by a rule, and their servers."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from serving.conftest import classifier, engine, fill, held, make_engine, settings, slot, version
from wire import app_of, served

from tuneserve.adapters.catalog import adapters_of
from tuneserve.errors import EngineError, TextError
from tuneserve.serving.model import Model
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings
from tuneserve.tasks.catalog import TASKS
from tuneserve.tasks.embedder import Embedding
from tuneserve.tasks.generator import Generated

__all__ = ["classifier", "engine", "fill", "held", "make_engine", "settings", "slot", "version"]


class Ruled(Model):
    """A text's vector is its length and 1; what is written on it are its words in capitals."""

    def __init__(self, task: str) -> None:
        self.id, self.task, self.asked = "v1", task, []

    def room(self, wait_s: float = 0.0) -> None:
        return None

    async def answer(self, inputs: Any, *, deadline: float = 0.0) -> list[Any]:
        self.asked += inputs
        return [self.describe(one) for one in inputs]

    async def stream(self, wanted: Any, *, deadline: float = 0.0) -> Any:
        words = wanted.text.upper().split()
        for count in range(1, len(words) + 1):
            await asyncio.sleep(0)
            yield self.written(wanted, " ".join(words[:count]), finish="end" if count == len(words) else "")

    def describe(self, one: Any) -> Any:
        if not one.text or one.text == "fail":
            return TextError("the text is empty") if not one.text else EngineError("The engine failed.")
        if self.task == "feature-extraction":
            vector = np.array([len(one.text), 1], dtype=np.float32)
            return Embedding(model_version=self.id, truncated=len(one.text) > 50, vector=vector, tokens=3)
        return self.written(one, one.text.upper(), finish="end")

    def written(self, one: Any, text: str, **how: Any) -> Generated:
        prompt = one.text if one.full else ""
        return Generated(
            model_version=self.id, text=text, ids=(1,), prompt_tokens=1, device="cpu", prompt=prompt, **how
        )


@pytest.fixture
def ask(settings: Settings, slot: Slot) -> Iterator[Callable[..., TestClient]]:
    """A client of a server with all adapters: `ask(task, **settings)`; without a task it classifies."""
    with ExitStack() as stack:

        def start(task: str = "", **changed: Any) -> TestClient:
            app = app_of(*server_of(settings, slot, task, changed), **options_of(settings, task, changed))
            return stack.enter_context(TestClient(app))

        yield start


@pytest.fixture
def serve(settings: Settings, slot: Slot) -> Iterator[Callable[..., str]]:
    """The same on a real socket: its address."""
    with ExitStack() as stack:

        def start(task: str = "", **changed: Any) -> str:
            server = served(*server_of(settings, slot, task, changed), **options_of(settings, task, changed))
            return f"http://127.0.0.1:{stack.enter_context(server)}"

        yield start


def server_of(settings: Settings, slot: Slot, task: str, changed: dict[str, Any]) -> tuple[Settings, Slot]:
    if task:
        slot = Slot()
        slot.take(Ruled(task))
    return settings.model_copy(update=changed), slot


def options_of(settings: Settings, task: str, changed: dict[str, Any]) -> dict[str, Any]:
    found = TASKS[task or "text-classification"]
    return {"task": found, "adapters": adapters_of(settings.model_copy(update=changed), found)}
