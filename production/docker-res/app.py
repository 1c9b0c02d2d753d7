"""The API as an ASGI application, for servers of one's own: `uvicorn app:app` in this folder."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from tuneserve.hardware import set_threads
from tuneserve.serving.api import create_app
from tuneserve.serving.server import follow, open_feedback, open_slot
from tuneserve.serving.traces import Traces
from tuneserve.settings import Settings

settings = Settings.from_environ(os.environ)
slot = open_slot(settings)
feedback = open_feedback(settings)
follower = follow(settings, slot, threads=set_threads(settings.omp_num_threads))
traces = Traces(settings.otel_exporter_otlp_endpoint)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load the model while the port is already open."""
    follower.start()
    feedback.start()
    yield
    await asyncio.to_thread(follower.close)
    await asyncio.to_thread(slot.close)
    await asyncio.to_thread(feedback.close)
    await asyncio.to_thread(traces.close)


app = create_app(settings, slot, feedback=feedback, lifespan=lifespan, telemetry=traces.telemetry)
