"""The model that answers now: none yet, ready, or failed for a reason; and the one before it, for a while."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from tuneserve.errors import NoModelError, TuneserveError
from tuneserve.lifecycle.drift import Window
from tuneserve.serving.metrics import Metrics
from tuneserve.serving.model import Answers, Model
from tuneserve.serving.monitor import Monitor

logger = logging.getLogger(__name__)

Phase = Literal["empty", "loading", "ready", "failed"]

HOLD_S = 600.0
"""Seconds that a model which was replaced stays loaded, so that going back to it takes no time."""

SETTLE_S = 2.0
"""Seconds in which a request that has just asked for the old model may still reach it."""


@dataclass(eq=False)
class Served:
    """A model that answers, or did until just now."""

    model: Model
    monitor: Monitor
    in_flight: int = 0
    """Requests that wait for it."""
    released: threading.Event = field(default_factory=threading.Event)
    """Set when it is no longer held: another model is, or it answers again."""


class Slot:
    """Holds the model that answers. Models come warm, and change between two requests.

    Args:
        metrics: of the server.
        new_window: makes an empty window for what a version answers.
    """

    def __init__(self, *, metrics: Metrics | None = None, new_window: Callable[[], Window] = Window) -> None:
        self.phase: Phase = "empty"
        self.failure: BaseException | None = None
        self.trouble = ""
        """Why no other model can come just now, though one may answer; empty while all is well."""
        self.metrics = metrics or Metrics()
        self.on_failure: Callable[[], None] = lambda: None
        self.shadow: Callable[[Sequence[Any], Answers, float], None] | None = None
        self._new_window = new_window
        self._now: Served | None = None
        self._held: Served | None = None
        self._change = threading.RLock()
        self._closed = threading.Event()
        self._leaving: list[threading.Thread] = []

    @property
    def ready(self) -> Served | None:
        """What answers, if anything does."""
        return self._now if self.phase == "ready" else None

    @property
    def small(self) -> bool:
        """Whether what answers, or did, takes hardly any memory of its own; see `Model`."""
        return self._now is not None and self._now.model.small

    @contextmanager
    def served(self) -> Iterator[Served]:
        """What answers, which is not closed while the block runs.

        Raises:
            NoModelError: there is none yet, or it has died.
        """
        served = self._ask()
        served.in_flight += 1
        try:
            yield served
        finally:
            served.in_flight -= 1

    def model(self) -> Model:
        """The model that answers.

        Raises:
            NoModelError: there is none yet, or it has died.
        """
        return self._ask().model

    def monitor(self) -> Monitor:
        """What it has answered lately.

        Raises:
            NoModelError: there is none yet, or it has died.
        """
        return self._ask().monitor

    @property
    def empty(self) -> bool:
        """Whether no model has come yet."""
        return self._now is None

    @property
    def version_id(self) -> str | None:
        """The id of the version that answers."""
        return self._now.model.id if self._now is not None else None

    def take(self, model: Model) -> None:
        """Let this one answer from the next request on; the one before stays loaded for a while."""
        served = Served(model, Monitor(model, self._new_window()))
        model.attach(self.metrics, lambda error: self._die(served, error))
        self._change_to(served)

    def bring_back(self, version_id: str) -> bool:
        """Change to the model that is still held, if it is this version's."""
        with self._change:
            held = self._held
            if held is None or held.model.id != version_id or held.model.dead:
                return False
            self._held = None
            self._change_to(held)
        return True

    def fail(self, error: BaseException) -> None:
        """Nothing can answer, and nothing will."""
        self.phase, self.failure = "failed", error
        self.on_failure()

    def close(self) -> None:
        """Answer what waits and end the threads: a library that computes while its process ends would abort it."""
        self._closed.set()
        for served in (self._now, self._held):
            if served is not None:
                served.released.set()
        for thread in self._leaving:
            thread.join()
        for served in (self._now, self._held):
            if served is not None:
                served.model.close()

    def _ask(self) -> Served:
        if self._now is None or self.phase != "ready":
            raise NoModelError(f"No model can answer yet (phase: {self.phase}).")
        return self._now

    def _change_to(self, served: Served) -> None:
        with self._change:
            before, dropped = self._now, self._held
            for one in (served, dropped):
                if one is not None:
                    one.released.set()
            self._now, self._held, self.phase = served, before, "ready"
            self.metrics.swaps.labels("served").inc()
            logger.info("ready: version %s answers", served.model.id)
            if before is not None:
                before.released = threading.Event()
                self._leaving = [thread for thread in self._leaving if thread.is_alive()]
                self._leaving.append(threading.Thread(target=self._retire, args=[before, before.released], daemon=True))
                self._leaving[-1].start()

    def _retire(self, served: Served, released: threading.Event) -> None:
        """Drop a model that was replaced, once nobody waits for it, unless it is brought back before.

        It is held for HOLD_S, or until another one is held, and not a moment longer: this thread would keep it.
        """
        if released.wait(HOLD_S):
            self._closed.wait(SETTLE_S)
        with self._change:
            if served is self._now or served.released is not released or self._closed.is_set():
                return
            if served is self._held:
                self._held = None
        while served.in_flight and not self._closed.wait(0.1):
            pass
        served.model.close()
        logger.info("version %s is no longer held", served.model.id)

    def _die(self, served: Served, error: BaseException) -> None:
        if served is self._now:
            self.fail(error if isinstance(error, TuneserveError) else NoModelError(f"The engine died: {error}"))
