"""What every composition root has: it is started and closed by its application's lifespan, or by whoever made it."""

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from tuneserve.lifecycle.trainer import Trainer
from tuneserve.serving.http.front import Drain
from tuneserve.serving.http.traces import Traces
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings

LOAD_S = 0.5
"""Seconds that a model which is just being loaded is waited for."""


class Root(ABC):
    """The ASGI application `asgi` and the threads behind it, which its lifespan starts and ends.

    Args:
        settings: of the server.

    Raises:
        SettingsError: traces cannot be sent.
    """

    asgi: FastAPI
    slot: Slot
    trainer: Trainer | None = None

    def __init__(self, settings: Settings) -> None:
        self.was_loading = False
        """Whether a model was still being loaded when all else had been closed."""
        self.drain = Drain()
        self._traces = Traces(settings.otel_exporter_otlp_endpoint)
        self._closing = threading.Lock()
        self._closed = False

    @abstractmethod
    def start(self) -> None:
        """Begin what answers need; nothing is waited for."""

    @abstractmethod
    def _end(self) -> None:
        """Answer what waits, and end the threads."""

    def close(self) -> None:
        """Answer what waits, and end the threads; a second time does nothing."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._end()
            self._traces.close()

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.start()
        yield
        await asyncio.to_thread(self.close)
