"""The server process: opens the port at once, loads the model behind it, ends when told to or left without a model."""

import logging
import signal
import socket
import sys

import uvicorn

from tuneserve.errors import SettingsError
from tuneserve.lifecycle.store import Store
from tuneserve.serving.api import create_app
from tuneserve.serving.classifier import Classifier, load_classifier
from tuneserve.serving.slot import Slot
from tuneserve.serving.traces import Traces
from tuneserve.settings import Settings

logger = logging.getLogger(__name__)

DRAIN_S = 25
"""Seconds that accepted requests get to finish after SIGTERM; Kubernetes kills after 30, `docker stop` after 10."""

SWITCH_S = 0.0005
"""Seconds that the event loop may keep the interpreter while the engine's thread, which has work to give, wants it."""


def champion_slot(settings: Settings, *, threads: int) -> Slot:
    """An empty slot that loads the store's champion when filled."""
    store = Store(settings.model_path)

    def load() -> Classifier:
        return load_classifier(store.champion(), settings, threads=threads)

    return Slot(load, max_queue_tokens=settings.max_queue_tokens)


def serve(settings: Settings, *, threads: int) -> None:
    """Serve the champion until SIGTERM or SIGINT.

    Raises:
        NoModelError: the store holds no model.
        TuneserveError: its model cannot be loaded.
        SettingsError: the address cannot be listened on, or traces cannot be sent.
    """
    sys.setswitchinterval(SWITCH_S)
    traces = Traces(settings.otel_exporter_otlp_endpoint)
    champion = Store(settings.model_path).champion()
    slot = champion_slot(settings, threads=threads)
    config = uvicorn.Config(
        create_app(settings, slot, telemetry=traces.telemetry),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=DRAIN_S,
    )
    server = uvicorn.Server(config)

    def leave() -> None:
        server.should_exit = True

    with listen(settings.host, settings.port) as listener:
        logger.info("serving version %s on http://%s:%d (docs at /docs)", champion.id, settings.host, settings.port)
        slot.on_failure = leave
        slot.fill_in_background()
        try:
            server.run(sockets=[listener])
        except SystemExit as end:
            # uvicorn repeats the signal that ended it; for a server that finished its work this is no failure.
            if end.code not in (128 + signal.SIGTERM, 128 + signal.SIGINT):
                raise
        finally:
            slot.close()
            traces.close()
    if slot.failure is not None:
        raise slot.failure


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address.

    Raises:
        SettingsError: the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP, for only then does asyncio switch off the delay that joins small packets.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise SettingsError(f"HOST={host} PORT={port} cannot be listened on: {error.strerror}.") from None
    return listener
