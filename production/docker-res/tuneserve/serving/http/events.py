"""`GET /events`: what the page shows of the server, as server-sent events, whenever it has changed."""

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from tuneserve.errors import OverloadedError
from tuneserve.lifecycle.trainer import Trainer
from tuneserve.serving.http.front import Drain, has_key
from tuneserve.serving.http.routes import event_of
from tuneserve.serving.service import Service
from tuneserve.tasks.task import Task

EVERY_S = 1.0
"""Seconds between two looks at the server, one for all who listen."""

SILENCE_S = 15.0
"""Seconds after which a comment says that the connection is still there."""

MOST_STREAMS = 64
"""That are open together, with the key and without it; the next is refused."""

RETRY_AFTER_S = 10

EVENTS_RESPONSE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}},
}


class Watch:
    """Looks at the server, once for all who listen.

    Args:
        service: that answers.
        trainer: of a server that trains.
        key: the API key; empty for none.
        task: what the model is asked.
    """

    def __init__(self, service: Service, trainer: Trainer | None, *, key: bytes, task: Task) -> None:
        self._service, self._trainer, self._key, self._task = service, trainer, key, task
        self._routes = frozenset(route.path for route in task.routes)
        self._events: tuple[bytes, bytes] = (b"", b"")
        self._stale_at = 0.0
        self._turn = asyncio.Lock()

    async def event(self, *, keyed: bool) -> bytes:
        """The newest, for who has shown the key or for everybody."""
        async with self._turn:
            if time.monotonic() >= self._stale_at:
                self._events = await asyncio.to_thread(self._look)  # it reads the training's file
                self._stale_at = time.monotonic() + EVERY_S / 2
        return self._events[keyed]

    def _look(self) -> tuple[bytes, bytes]:
        service, trainer = self._service, self._trainer
        seen: dict[str, Any] = {
            "phase": service.phase(),
            "reason": service.reason(),
            "version": service.version_id(),
            "task": self._task.name,
            "trains": trainer is not None,
            "keyed": bool(self._key),
            "training": trainer.progress() if trainer is not None else {},
        }
        job = trainer.last if trainer is not None else None
        known = {
            "job": asdict(job) if job is not None else None,
            "course": trainer.course() if trainer is not None else {},
            "figures": service.figures(self._routes),
        }
        return event_of(seen | {"shown": False}), event_of(seen | known | {"shown": True})


def events_routes(service: Service, trainer: Trainer | None, *, key: bytes, task: Task, drain: Drain) -> APIRouter:
    """The stream. Without the key, where there is one, it says no more than `/readyz`."""
    routes = APIRouter(tags=["operations"])
    watch = Watch(service, trainer, key=key, task=task)
    streams = {True: 0, False: 0}  # who has shown the key finds room whatever others do

    @routes.get("/events", response_class=StreamingResponse, responses=EVENTS_RESPONSE)
    async def events(request: Request) -> StreamingResponse:
        """The server's state as server-sent events: one at once, then one whenever something has changed."""
        keyed = not key or has_key(request.headers.raw, key)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        if getattr(request.state, "is_head", False):
            return StreamingResponse(iter(()), headers=headers, media_type="text/event-stream")
        if streams[keyed] >= MOST_STREAMS:
            words = f"{MOST_STREAMS} clients follow this server's events already."
            raise OverloadedError(words, retry_after_s=RETRY_AFTER_S)
        request.state.endless = True
        streams[keyed] += 1

        async def lines() -> AsyncGenerator[bytes]:
            sent, silent_s = b"", 0.0
            try:
                yield b":\n\n"
                while True:
                    silent_s += EVERY_S
                    if (event := await watch.event(keyed=keyed)) != sent:
                        sent, silent_s = event, 0.0
                        yield event
                    elif silent_s >= SILENCE_S:
                        silent_s = 0.0
                        yield b":\n\n"
                    if await drain.begins_within(EVERY_S):  # Starlette ends the stream of a client that leaves
                        return
            finally:
                streams[keyed] -= 1

        found = lines()
        await anext(found)  # once it has begun, its end is noted even if nobody reads on
        return StreamingResponse(found, headers=headers, media_type="text/event-stream")

    return routes
