"""What every composition root does with its lifetime."""

import asyncio
import threading
from pathlib import Path

import pytest
from fastapi import FastAPI

from tuneserve.serving.lifetime import Root
from tuneserve.settings import Settings


class Counted(Root):
    """Counts its starts and ends."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.asgi = FastAPI(lifespan=self._lifespan)
        self.said: list[str] = []
        self.go = threading.Event()
        self.go.set()

    def start(self) -> None:
        self.said.append("start")

    def _end(self) -> None:
        assert self.go.wait(60)
        self.said.append("end")


@pytest.fixture
def root(tmp_path: Path) -> Counted:
    return Counted(Settings.from_environ({"MODEL_PATH": str(tmp_path)}))


def test_an_application_is_started_and_ended_with_its_lifespan(root: Counted) -> None:
    async def live() -> list[str]:
        async with root.asgi.router.lifespan_context(root.asgi):
            return list(root.said)

    assert asyncio.run(live()) == ["start"]
    assert root.said == ["start", "end"]


def test_what_was_closed_by_hand_is_not_ended_again_by_the_lifespan(root: Counted) -> None:
    async def live() -> None:
        async with root.asgi.router.lifespan_context(root.asgi):
            root.close()

    asyncio.run(live())
    assert root.said == ["start", "end"]


def test_who_closes_meanwhile_waits_for_the_end(root: Counted) -> None:
    root.go.clear()
    seen: list[list[str]] = []
    first = threading.Thread(target=root.close)
    second = threading.Thread(target=lambda: (root.close(), seen.append(list(root.said))))
    first.start()
    while not root._closing.locked():
        pass
    second.start()
    assert seen == []
    root.go.set()
    first.join()
    second.join()
    assert seen == [["end"]]
