"""The server process: opens the port at once, follows the champion behind it, and may train beside it."""

import asyncio
import gc
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn, cast

import uvicorn

from tuneserve.errors import SettingsError
from tuneserve.lifecycle.store import Store
from tuneserve.lifecycle.trainer import Trainer
from tuneserve.serving.application import Application, prepare
from tuneserve.serving.folder import FolderApplication
from tuneserve.serving.http.app import Adapter
from tuneserve.serving.http.front import Drain
from tuneserve.serving.http.protocol import Protocol
from tuneserve.serving.http.request_log import RequestLog
from tuneserve.serving.lifetime import Root
from tuneserve.serving.many import ManyApplication
from tuneserve.settings import Settings

logger = logging.getLogger(__name__)

LEAVE_S = 25
"""Seconds after SIGTERM until the process has ended, whatever hangs; Kubernetes kills after 30."""

DRAIN_S = 22
"""Seconds of these that accepted requests get to finish; the rest is for the ends of the training and the log."""

IDLE_S = 75
"""Seconds that a connection without a request stays open: longer than proxies and load balancers keep theirs."""

ACCEPT_S = 0.25
"""Seconds in which connections are accepted that were there when the server was told to leave."""
READ_S = 0.02
"""Seconds in which a request that is there when the server is told to leave is found on its connection."""

SWITCH_S = 0.0005
"""Seconds that the event loop may keep the interpreter while the engine's thread, which has work to give, wants it."""

YOUNG_OBJECTS = 10_000
"""New objects after which the garbage collector looks for cycles. With Python's 700 it would look through hundreds of
requests that wait, most of which are gone soon without its help, over and over."""


class Server(uvicorn.Server):
    """uvicorn's, which tells a training of the signal at once: its checkpoint is written while requests finish."""

    def __init__(self, config: uvicorn.Config, drain: Drain, trainer: Trainer | None = None) -> None:
        super().__init__(config)
        self.drain, self.trainer = drain, trainer
        self._told = threading.Event()
        # Started before there is a signal: in its handler no thread can be started safely.
        threading.Thread(target=self._end_in_time, name="leave", daemon=True).start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn. A second signal waits for nothing: not for requests, nor for a training's checkpoint."""
        again = self._told.is_set()
        self._told.set()
        if self.trainer is not None:
            self.trainer.kill() if again else self.trainer.interrupt()
        super().handle_exit(sig, frame)
        self.force_exit |= again

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn. Who has connected by now gets an answer: the system would reset what is not accepted yet."""
        newcomers = select.poll()
        for listener in sockets or ():
            newcomers.register(listener, select.POLLIN)
        end = time.monotonic() + ACCEPT_S
        while time.monotonic() < end and newcomers.poll(0):
            await asyncio.sleep(0)
        await asyncio.sleep(READ_S)
        self.drain.begin()
        await super().shutdown(sockets)

    def _end_in_time(self) -> None:
        """End a process that hangs in an engine, a training or a file system when it was told to leave."""
        self._told.wait()
        time.sleep(LEAVE_S)
        logger.error("not all that was accepted could be finished within %g s", LEAVE_S)
        end_at_once(128 + signal.SIGTERM)


def end_at_once(code: int) -> NoReturn:
    """End the process under threads that cannot be waited for; the log is written first."""
    logging.shutdown()
    os._exit(code)


def open_server(application: Root, settings: Settings) -> Server:
    """Uvicorn with this application, not yet started."""
    log = RequestLog(application.slot.metrics, logs=settings.access_log)
    protocol = partial(Protocol, request_log=log, timeout_s=settings.request_timeout_s)
    config = uvicorn.Config(
        application.asgi,
        host=settings.host,
        port=settings.port,
        http=cast("type[asyncio.Protocol]", protocol),
        ws="none",
        log_config=None,
        access_log=False,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=DRAIN_S,
    )
    return Server(config, application.drain, application.trainer)


def serve(
    settings: Settings,
    *,
    threads: int,
    training: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> None:
    """Serve the champion until SIGTERM or SIGINT.

    Args:
        settings: of the run.
        threads: CPU threads to compute with.
        training: the command that trains as a child, at once and when asked; empty for a server that only serves.
        environ: that command's environment variables; None for this process's own.

    Raises:
        NoModelError: the store holds no model, and none will be trained.
        FailedTrainingError: the first training failed; the exit code is its own.
        TuneserveError: the model cannot be loaded.
        SettingsError: the address cannot be listened on, or traces cannot be sent.
        SystemExit: a signal came before there was a first model.
    """
    store = Store(settings.model_path)
    if not training and store.champion_id() is None:
        store.champion()  # raises, and says what to do

    def make(listener: socket.socket) -> Root:
        application = Application(settings, threads=threads, training=training, environ=environ, listener=listener)
        if training:
            prepare(store)
        return application

    _run(make, settings)


def serve_many(settings: Settings, *, threads: int, importing: Sequence[str], environ: Mapping[str, str]) -> None:
    """Serve the models of the folder MODELS, or what a platform says, until SIGTERM or SIGINT.

    Args:
        settings: of the run.
        threads: CPU threads to compute with.
        importing: the command that makes a version of a model that was trained elsewhere.
        environ: that command's environment variables.

    Raises:
        TuneserveError: a pinned model cannot be loaded.
        SettingsError: the address cannot be listened on, or MODELS or PINNED_MODELS name what is not there.
    """
    _run(lambda _: ManyApplication(settings, threads=threads, importing=importing, environ=environ), settings)


def serve_folder(
    settings: Settings,
    folder: Path,
    *,
    threads: int,
    importing: Sequence[str],
    environ: Mapping[str, str],
    adapters: Sequence[Adapter],
) -> None:
    """Serve what is in a folder until SIGTERM or SIGINT; see `FolderApplication` for the arguments.

    Raises:
        TuneserveError: the model cannot be loaded.
        SettingsError: the address cannot be listened on, or traces cannot be sent.
    """
    made = partial(
        FolderApplication, settings, folder, threads=threads, importing=importing, environ=environ, adapters=adapters
    )
    _run(lambda _: made(), settings)


def _run(make: Callable[[socket.socket], Root], settings: Settings) -> None:
    """Serve until the end what is made once the address is taken, and close it; see `serve`."""
    sys.setswitchinterval(SWITCH_S)
    gc.set_threshold(YOUNG_OBJECTS)
    with listen(settings.host, settings.port) as listener:
        _answer(make(listener), settings, listener)


def _answer(application: Root, settings: Settings, listener: socket.socket) -> None:
    slot = application.slot
    server = open_server(application, settings)

    def leave() -> None:
        server.should_exit = True

    logger.info("listening on http://%s:%d (docs at /docs)", settings.host, settings.port)
    slot.on_failure = leave
    try:
        server.run(sockets=[listener])
    except SystemExit as end:
        # uvicorn repeats the signal that ended it; for a server that finished its work this is no failure.
        if end.code not in (128 + signal.SIGTERM, 128 + signal.SIGINT) or (application.trainer and slot.empty):
            raise
    finally:
        application.close()
    if application.was_loading and slot.failure is None:
        logger.info("left while a model was being loaded")
        end_at_once(0)
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
