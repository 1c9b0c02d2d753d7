"""A model that writes beside a classifier in one server: neither waits for the other."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from serving.conftest import EchoEngine
from serving.test_writer import Counting
from wire import wait_until

from tuneserve.artifact import Version
from tuneserve.network.wishes import Wishes
from tuneserve.serving.model import Model
from tuneserve.serving.registry import Registry
from tuneserve.serving.service import Service
from tuneserve.tasks.classifier import Classifier
from tuneserve.tasks.generator import Generated, Generator, Prompt

ABOUT = {"max_tokens": 1000, "encoder_decoder": False, "prefix": "", "ends": []}
WORDS = 30
"""That each text has to have."""


@pytest.mark.parametrize("streams", [False, True])
def test_a_classifier_answers_and_models_come_and_go_while_texts_are_written(
    version: Version, tmp_path: Path, streams: bool
) -> None:
    writing = Counting()
    about = replace(version, metadata={**version.metadata, "task": "text-generation", "writer": ABOUT})

    def open_model(folder: Path, name: str) -> Model:
        usual = Wishes(WORDS)
        return Generator(about, writing, usual=usual) if name == "writes" else Classifier(version, EchoEngine())

    for name in ("writes", "one", "two"):
        (tmp_path / name).mkdir()
    registry = Registry(open_model, find=tmp_path.joinpath)
    service = Service({}, metrics=registry.metrics, models=registry)

    async def write() -> int:
        prompt = Prompt("film", {})
        if streams:
            last = [one async for one in service.stream(prompt, name="writes")][-1]
        else:
            [last] = await service.answer([prompt], name="writes")
        assert isinstance(last, Generated)
        return len(last.ids)

    async def live() -> None:
        texts = [asyncio.ensure_future(write()) for _ in range(8)]
        await asyncio.to_thread(wait_until, lambda: writing.log)
        for number in range(20):  # not a step is made meanwhile
            name = ("one", "two")[number % 2]
            [answer] = await service.answer(["film"], name=name)
            assert answer.verdict is not None
            if number % 5 == 4:
                await asyncio.wrap_future(registry.unload(name))
        assert not any(text.done() for text in texts)
        assert "step" not in {one[0] for one in writing.log}
        writing.steps.release(10_000)
        assert await asyncio.gather(*texts) == 8 * [WORDS]

    try:
        asyncio.run(live())
    finally:
        writing.steps.release(10_000)
        assert registry.close(wait_s=30)
