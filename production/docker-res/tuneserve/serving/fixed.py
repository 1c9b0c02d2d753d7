"""The composition root where one version answers for good, as in a serverless function: nothing follows the store."""

from fastapi import FastAPI

from tuneserve.adapters.catalog import adapters_of
from tuneserve.lifecycle.drift import Window
from tuneserve.lifecycle.store import Store
from tuneserve.serving.follower import set_aside
from tuneserve.serving.http.app import create_app
from tuneserve.serving.service import Service
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings
from tuneserve.tasks.catalog import task_of


class FixedApplication:
    """The ASGI application `asgi` over the store's champion, which is loaded when this returns.

    As `Application`, but for what needs time between requests, or a disk to write to: a new champion, shadow, labels.

    Args:
        settings: of the server.
        threads: CPU threads to compute with.

    Raises:
        NoModelError: the store has no champion.
        StoreError: it cannot be read, or does not answer as it did when it was saved.
        DeviceError: the device asked for cannot be had.
    """

    def __init__(self, settings: Settings, *, threads: int) -> None:
        version = Store(settings.model_path).champion()
        self.task = task_of(version)
        self.slot = Slot(new_window=lambda: Window(max_texts=settings.drift_window, hours=settings.drift_window_hours))
        model = self.task.load(version, settings, threads=threads)
        try:
            model.warm_up()
        except BaseException:
            model.close()
            raise
        set_aside()
        self.slot.take(model)
        self.asgi: FastAPI = create_app(
            settings,
            Service.of(self.slot, timeout_s=settings.request_timeout_s, max_inputs=settings.max_batch_texts),
            self.task,
            adapters=adapters_of(settings, self.task),
        )

    def close(self) -> None:
        """Unload the model."""
        self.slot.close()
