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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import NoReturn, cast

import uvicorn

from tuneserve.artifact import Version
from tuneserve.errors import BusyError, SettingsError, StoreError
from tuneserve.lifecycle.drift import Window
from tuneserve.lifecycle.feedback import FILE, Feedback
from tuneserve.lifecycle.retraining import Retraining
from tuneserve.lifecycle.schedule import Schedule
from tuneserve.lifecycle.store import Store
from tuneserve.lifecycle.trainer import FailedTrainingError, Job, Trainer
from tuneserve.serving.api import create_app
from tuneserve.serving.classifier import Classifier, load_classifier
from tuneserve.serving.follower import Follower
from tuneserve.serving.front import Drain
from tuneserve.serving.protocol import Protocol
from tuneserve.serving.request_log import RequestLog
from tuneserve.serving.shadow import Shadowing
from tuneserve.serving.slot import Slot
from tuneserve.serving.traces import Traces
from tuneserve.settings import Settings

logger = logging.getLogger(__name__)

LEAVE_S = 25
"""Seconds after SIGTERM until the process has ended, whatever hangs; Kubernetes kills after 30."""

DRAIN_S = 22
"""Seconds of these that accepted requests get to finish; the rest is for the ends of the training and the log."""

IDLE_S = 75
"""Seconds that a connection without a request stays open: longer than proxies and load balancers keep theirs."""

LOAD_S = 0.5
"""Seconds that a model which is just being loaded is waited for."""

ACCEPT_S = 0.25
"""Seconds in which connections are accepted that were there when the server was told to leave."""
READ_S = 0.02
"""Seconds in which a request that is there when the server is told to leave is found on its connection."""

SWITCH_S = 0.0005
"""Seconds that the event loop may keep the interpreter while the engine's thread, which has work to give, wants it."""

YOUNG_OBJECTS = 10_000
"""New objects after which the garbage collector looks for cycles. With Python's 700 it would look through hundreds of
requests that wait, most of which are gone soon without its help, over and over."""

BUSY_S = 15.0
"""Seconds after which a first training is tried again that another process's training kept away."""


class Server(uvicorn.Server):
    """uvicorn's, which tells a training of the signal at once: its checkpoint is written while requests finish."""

    def __init__(self, config: uvicorn.Config, drain: Drain, trainer: Trainer | None = None) -> None:
        super().__init__(config)
        self.drain, self.trainer = drain, trainer
        self._told = threading.Event()
        # Started before there is a signal: in its handler no thread can be started safely.
        threading.Thread(target=self._end_in_time, name="leave", daemon=True).start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn."""
        self._told.set()
        if self.trainer is not None:
            self.trainer.interrupt()
        super().handle_exit(sig, frame)

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


def open_slot(settings: Settings) -> Slot:
    """An empty slot."""
    return Slot(
        max_queue_tokens=settings.max_queue_tokens,
        new_window=lambda: Window(max_texts=settings.drift_window, hours=settings.drift_window_hours),
    )


def open_feedback(settings: Settings) -> Feedback:
    """The feedback of the settings' store, not yet started."""
    return Feedback(settings.model_path / FILE, max_rows=settings.feedback_max_rows, keep_texts=settings.keep_texts)


def open_server(
    listener: socket.socket, settings: Settings, slot: Slot, feedback: Feedback, traces: Traces, trainer: Trainer | None
) -> Server:
    """The server behind the socket, not yet started."""
    drain = Drain()
    protocol = partial(
        Protocol,
        request_log=RequestLog(slot.metrics, logs=settings.access_log),
        timeout_s=settings.request_timeout_s,
    )
    return Server(
        uvicorn.Config(
            create_app(settings, slot, trainer, feedback, telemetry=traces.telemetry, drain=drain, listener=listener),
            host=settings.host,
            port=settings.port,
            http=cast("type[asyncio.Protocol]", protocol),
            ws="none",
            log_config=None,
            access_log=False,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=DRAIN_S,
        ),
        drain,
        trainer,
    )


def follow(settings: Settings, slot: Slot, *, threads: int, trainer: Trainer | None = None) -> Follower:
    """What keeps the slot at the store's champion, not yet started."""

    def load(version: Version) -> Classifier:
        return load_classifier(version, settings, threads=threads)

    def required() -> bool:
        return trainer is None or trainer.running is None

    store = Store(settings.model_path)
    shadowing = Shadowing(store, slot, load, wanted=settings.shadow_requests)
    return Follower(store, slot, load, required=required, shadowing=shadowing)


def serve(
    settings: Settings, *, threads: int, training: Sequence[str] = (), environ: Mapping[str, str] | None = None
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
    sys.setswitchinterval(SWITCH_S)
    gc.set_threshold(YOUNG_OBJECTS)
    traces = Traces(settings.otel_exporter_otlp_endpoint)
    store = Store(settings.model_path)
    if not training and store.champion_id() is None:
        store.champion()  # raises, and says what to do
    slot = open_slot(settings)
    trainer = None
    if training:
        trainer = Trainer(training, store, serves=lambda: not slot.empty or bool(store.versions()), environ=environ)
    feedback = open_feedback(settings)
    with listen(settings.host, settings.port) as listener:
        server = open_server(listener, settings, slot, feedback, traces, trainer)

        def leave() -> None:
            server.should_exit = True

        logger.info("listening on http://%s:%d (docs at /docs)", settings.host, settings.port)
        slot.on_failure = leave
        follower = follow(settings, slot, threads=threads, trainer=trainer)
        retraining = None
        if trainer is not None:
            _prepare(store)
            _train_first(trainer, slot, follower)
            retraining = Retraining(
                trainer,
                schedule=_schedule(settings, store),
                drift=partial(_drifted, slot) if settings.retrain_on_drift else lambda: None,
            )
            retraining.start()
        follower.start()
        feedback.start()
        try:
            server.run(sockets=[listener])
        except SystemExit as end:
            # uvicorn repeats the signal that ended it; for a server that finished its work this is no failure.
            if end.code not in (128 + signal.SIGTERM, 128 + signal.SIGINT) or (trainer is not None and slot.empty):
                raise
        finally:
            loading = not follower.close(wait_s=LOAD_S)
            if retraining is not None:
                retraining.close()
            if trainer is not None:
                trainer.close()
            slot.close()
            feedback.close()
            traces.close()
        if loading and slot.failure is None:
            logger.info("left while a model was being loaded")
            end_at_once(0)
    if slot.failure is not None:
        raise slot.failure


def _prepare(store: Store) -> None:
    """Make the store's folders. One that cannot be written to is no reason not to serve what is in it."""
    try:
        store.prepare()
    except StoreError as error:
        if not store.versions():
            raise
        logger.error("%s; nothing can be trained, and what is in the store answers", error)


def _schedule(settings: Settings, store: Store) -> Schedule | None:
    if not settings.retrain_schedule:
        return None
    return Schedule(
        settings.retrain_schedule,
        settings.retrain_time_zone,
        jitter_s=settings.retrain_jitter_s,
        memory=store.root / "schedule.json",
        host=socket.gethostname(),
    )


def _drifted(slot: Slot) -> str | None:
    """What has drifted, in words."""
    if slot.phase != "ready":
        return None
    report = slot.model().monitor.report()
    return report.sentence if report.drifted else None


def _train_first(trainer: Trainer, slot: Slot, follower: Follower) -> None:
    """Train at the start, which finds out by itself if there is nothing to do; without a model a failure is the end."""

    def look(job: Job) -> None:
        if job.exit_code == BusyError.exit_code:
            again = threading.Timer(BUSY_S, start)
            again.daemon = True
            again.start()
        elif job.state != "finished":
            follower.filled.wait()  # it may fail before what is in the store has been loaded
            if slot.empty:
                slot.fail(FailedTrainingError(job))

    def start() -> None:
        with suppress(BusyError):
            trainer.start("the container's start, once more")

    trainer.on_end = look
    trainer.start("the container's start")


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
