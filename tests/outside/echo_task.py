"""A task that the package does not know: its model answers what it is asked, once it may."""

import asyncio
import threading
from dataclasses import asdict, dataclass

from pydantic import create_model

from tuneserve.errors import OverloadedError
from tuneserve.serving.model import Answer, Model
from tuneserve.tasks.task import Route, Task, only

GO, ROOM = threading.Event(), 2
Asked = create_model("Asked", texts=list[str])


@dataclass(frozen=True, slots=True, kw_only=True)
class Echo(Answer):
    text: str


class EchoModel(Model):
    def __init__(self, version):
        self.id, self.waiting = version.id, 0

    def room(self, wait_s=0.0):
        return OverloadedError("Too many echoes.", retry_after_s=7) if self.waiting >= ROOM else None

    async def answer(self, inputs, *, deadline=0.0):
        self.waiting += 1
        await asyncio.to_thread(GO.wait)
        self.waiting -= 1
        return [Echo(text=text, model_version=self.id) for text in inputs]


ONE = Route("/echo", Asked, Asked, lambda asked: asked.texts[:1], lambda answers: asdict(only(answers, "texts")))
MANY = Route("/echo/batch", Asked, Asked, lambda asked: asked.texts, lambda answers: [asdict(one) for one in answers])
ECHO = Task("echo", [ONE, MANY], load=lambda version, settings, *, threads: EchoModel(version))
