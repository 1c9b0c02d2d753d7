"""The composition root: everything that a server consists of, put together once, for `run.py serve` and `app.py`."""

import logging
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial

from tuneserve.adapters.catalog import adapters_of
from tuneserve.artifact import Version
from tuneserve.errors import BusyError, NoModelError, StoreError
from tuneserve.lifecycle.drift import Window
from tuneserve.lifecycle.feedback import Feedback
from tuneserve.lifecycle.feedback_database import FILE
from tuneserve.lifecycle.retraining import Retraining, Schedule
from tuneserve.lifecycle.store import Store
from tuneserve.lifecycle.trainer import FailedTrainingError, Job, Trainer
from tuneserve.serving.follower import Follower
from tuneserve.serving.http.app import Adapter, create_app
from tuneserve.serving.lifetime import LOAD_S, Root
from tuneserve.serving.metrics import Metrics
from tuneserve.serving.model import Model
from tuneserve.serving.service import Service
from tuneserve.serving.shadow import Shadowing
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings
from tuneserve.tasks.catalog import TASKS, task_of
from tuneserve.tasks.task import Task
from tuneserve.text import CHARACTERS_PER_TOKEN

logger = logging.getLogger(__name__)

BUSY_S = 15.0
"""Seconds after which a first training is tried again that another process's training kept away."""


class Application(Root):
    """A server of the champion of a store, which follows it and, where that is wanted, trains.

    Args:
        settings: of the server.
        threads: CPU threads to compute with.
        training: the command that trains as a child, at the start and when asked; empty for a server that only serves.
        environ: that command's environment variables, a platform's among them; None for this process's own, and none of
            a platform.
        listener: the socket on which connections arrive, if it is known.
        task: what the model is asked, of whichever version; None: the task of the version that answers first.
        adapters: of the platforms that the server speaks to; None: as settings and environment have it.

    Raises:
        SettingsError: traces cannot be sent.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        threads: int,
        training: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        listener: socket.socket | None = None,
        task: Task | None = None,
        adapters: Sequence[Adapter] | None = None,
    ) -> None:
        super().__init__(settings)
        self.metrics = Metrics()
        self._settings, self._threads = settings, threads
        self._store = store = Store(settings.model_path)
        self._only_task, self._task = task, task or _first_task(store, TASKS[settings.task])
        self.slot = slot = Slot(
            metrics=self.metrics,
            new_window=lambda: Window(max_texts=settings.drift_window, hours=settings.drift_window_hours),
        )
        self._feedback = (
            None
            if not self._task.labels
            else Feedback(
                settings.model_path / FILE,
                max_rows=settings.feedback_max_rows,
                max_bytes=settings.feedback_max_mb << 20,
                max_characters=CHARACTERS_PER_TOKEN * settings.num_max_positions,
                keep_texts=settings.keep_texts,
                keyed=bool(settings.api_key.get_secret_value()),
            )
        )
        self.trainer = self.retraining = None
        if training:
            self.trainer = Trainer(
                training, store, serves=lambda: not slot.empty or bool(store.versions()), environ=environ
            )
            drift = partial(_drifted, slot) if settings.retrain_on_drift else lambda: None
            self.retraining = Retraining(self.trainer, schedule=_schedule(settings, store), drift=drift)
        self._follower = Follower(
            store,
            slot,
            self._load,
            required=lambda: self.trainer is None or self.trainer.running is None,
            shadowing=Shadowing(store, slot, self._load, wanted=settings.shadow_requests),
        )
        self.asgi = create_app(
            settings,
            Service.of(slot, self._feedback, timeout_s=settings.request_timeout_s, max_inputs=settings.max_batch_texts),
            self._task,
            self.trainer,
            adapters=adapters_of(settings, self._task, environ=environ or {}) if adapters is None else adapters,
            lifespan=self._lifespan,
            telemetry=self._traces.telemetry,
            drain=self.drain,
            listener=listener,
            store=store,
        )

    def start(self) -> None:
        """Train, if that is wanted, and load the model; neither is waited for."""
        for line in what_is_open(self._settings, trains=self.trainer is not None, labels=self._task.labels):
            logger.warning("%s", line)
        if self.trainer is not None and self.retraining is not None:
            self._train_first(self.trainer)
            self.retraining.start()
        self._follower.start()
        if self._feedback is not None:
            self._feedback.start()

    def _end(self) -> None:
        """Let a training write its checkpoint, too."""
        self.was_loading = not self._follower.close(wait_s=LOAD_S)
        if self.retraining is not None:
            self.retraining.close()
        if self.trainer is not None:
            self.trainer.close()
        self.slot.close()
        if self._feedback is not None:
            self._feedback.close()

    def _load(self, version: Version) -> Model:
        task = self._only_task or task_of(version)
        if task is not self._task:
            raise StoreError(
                f"version {version.id} is for the task {task.name!r}, and this server was started with the routes of "
                f"{self._task.name!r}; start it again."
            )
        model = task.load(version, self._settings, threads=self._threads)
        try:
            model.warm_up()
        except BaseException:
            model.close()
            raise
        return model

    def _train_first(self, trainer: Trainer) -> None:
        """Train at the start, which finds out by itself what is to be done; without a model a failure is the end."""

        def look(job: Job) -> None:
            if job.exit_code == BusyError.exit_code:
                again = threading.Timer(BUSY_S, start)
                again.daemon = True
                again.start()
            elif job.state != "finished":
                self._follower.filled.wait()  # it may fail before what is in the store has been loaded
                if self.slot.empty:
                    self.slot.fail(FailedTrainingError(job))

        def start() -> None:
            with suppress(BusyError):
                trainer.start("the container's start, once more")

        trainer.on_end = look
        trainer.start("the container's start")


def what_is_open(settings: Settings, *, trains: bool, labels: bool = True) -> list[str]:
    """What anybody who reaches the port may do, in sentences; none if there is a key."""
    if settings.api_key.get_secret_value():
        return []
    lines = [
        "API_KEY is not set: whoever reaches the port may ask for predictions, /model, /versions, /drift, the labels' "
        "figures, and eight short texts of the test (/examples)"
    ]
    if labels:
        lines.append(
            "API_KEY is not set: labels sent to /feedback are anonymous, kept apart, and never trained on nor tested "
            "with (run.py feedback shows them)"
        )
    else:
        lines = ["API_KEY is not set: whoever reaches the port may ask for answers and /model"]
    if trains:
        lines.append("API_KEY is not set: /retrain, /promote and /rollback are refused; /jobs and /events are open")
    return lines


def prepare(store: Store) -> None:
    """Make the store's folders. One that cannot be written to is no reason not to serve what is in it."""
    try:
        store.prepare()
    except StoreError as error:
        if not store.versions():
            raise
        logger.error("%s; nothing can be trained, and what is in the store answers", error)


def _first_task(store: Store, otherwise: Task) -> Task:
    """The task of the champion or, if that cannot answer, of what may instead; a store without a model will get one.

    What is wrong with the champion is the follower's to say, and the task is known once: routes do not change.
    """
    with suppress(NoModelError, StoreError):
        return task_of(store.champion())
    for version in store.last_good():
        with suppress(StoreError):
            return task_of(version)
    return otherwise


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
    report = slot.monitor().report()
    return report.sentence if report.drifted else None
