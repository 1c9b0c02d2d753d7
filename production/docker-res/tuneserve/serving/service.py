"""The use case: every way in asks here and nothing below, so that none can forget feedback, shadow or drift."""

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from tuneserve.errors import NotFoundError, OverloadedError, TimeoutExceededError, UnavailableError
from tuneserve.lifecycle.feedback import WRITE_EVERY_S, Feedback, Kept
from tuneserve.serving.metrics import Metrics
from tuneserve.serving.model import Answer, Answers, Model, wait_for
from tuneserve.serving.monitor import Monitor
from tuneserve.serving.registry import Registry
from tuneserve.serving.slot import Phase, Served, Slot

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

DEFAULT = "default"
"""The name of the model that answers where none is named."""


MOST_CHARACTERS = 500
"""Of a reason."""

MOST_CONSULTING = 8
"""Consultations that are going on or wait; the next is refused."""

YIELD_EVERY = 256
"""Answers of one request that are noted before the event loop has its turn."""


class Service:
    """Named models, each in its slot, and what happens around every answer.

    Args:
        slots: by name, of the models that are there as long as the server.
        metrics: of the server.
        feedback: where answers are remembered and labels kept; None for nowhere.
        timeout_s: seconds that an answer may take where its request does not say.
        models: that come and go.
        max_inputs: of one request; beyond it 413.
    """

    def __init__(
        self,
        slots: Mapping[str, Slot],
        *,
        metrics: Metrics,
        feedback: Feedback | None = None,
        timeout_s: float = 30.0,
        models: Registry | None = None,
        max_inputs: int = 4096,
    ) -> None:
        self.metrics, self.feedback, self.timeout_s = metrics, feedback, timeout_s
        self.models, self.max_inputs = models, max_inputs
        self._slots = slots
        self._rendering = threading.Lock()
        self._consulting = 0
        self._broken: set[str] = set()
        self._turns = WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore]()

    @classmethod
    def of(
        cls, slot: Slot, feedback: Feedback | None = None, *, timeout_s: float = 30.0, max_inputs: int = 4096
    ) -> "Service":
        """A service with one model."""
        return cls({DEFAULT: slot}, metrics=slot.metrics, feedback=feedback, timeout_s=timeout_s, max_inputs=max_inputs)

    async def answer(
        self,
        inputs: Sequence[Any] | Callable[[Model], Sequence[Any]],
        *,
        timeout_s: float | None = None,
        request_id: str = "",
        name: str = DEFAULT,
    ) -> Answers:
        """One answer or error for each input, in order.

        Args:
            inputs: as the model's task has them, or what makes them of the model, where only its name is known.
            timeout_s: seconds that this may take; None for the service's.
            request_id: by which people may correct the answers later.
            name: of the model.

        Raises:
            NotFoundError: there is no model of this name.
            NoModelError: it is not loaded yet, or has died.
            OverloadedError: too much waits already.
            TimeoutExceededError: the time is over.
            TuneserveError: it should be loaded now, and cannot be.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        if self.models is None or name in self._slots:
            return await self._answer(self._slot(name), inputs, timeout_s, request_id)
        began = time.monotonic()
        async with self.models.hold(name, timeout_s) as slot:
            return await self._answer(slot, inputs, timeout_s - (time.monotonic() - began), request_id)

    async def _answer(
        self,
        slot: Slot,
        inputs: Sequence[Any] | Callable[[Model], Sequence[Any]],
        timeout_s: float,
        request_id: str,
    ) -> Answers:
        with slot.served() as served:
            if callable(inputs):
                inputs = inputs(served.model)
            if refusal := served.model.room(timeout_s):
                raise refusal
            began = time.monotonic()
            answers = await served.model.answer(inputs, deadline=began + timeout_s)
        seconds = time.monotonic() - began
        if slot.shadow is not None:
            slot.shadow(inputs, answers, seconds)
        for index, (asked, one) in enumerate(zip(inputs, answers, strict=True)):
            if isinstance(one, Answer):
                self._note(one, served.monitor)
                if index % YIELD_EVERY == YIELD_EVERY - 1:
                    await asyncio.sleep(0)
                if self.feedback is not None and (verdict := one.verdict) is not None:
                    self.feedback.remember(request_id, index, one.model_version, *verdict, asked)
        return answers

    async def stream(
        self, wanted: Any | Callable[[Model], Any], *, timeout_s: float | None = None, name: str = DEFAULT
    ) -> AsyncGenerator[Answer]:
        """The answer to one input as it comes to be; see `answer` for the arguments and errors, and `Model.stream`."""
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        async with self._hold(name, timeout_s) as slot:
            with slot.served() as served:
                if callable(wanted):
                    wanted = wanted(served.model)
                if refusal := served.model.room(deadline - time.monotonic()):
                    raise refusal
                last = None
                async with aclosing(served.model.stream(wanted, deadline=deadline)) as pieces:
                    async for last in pieces:
                        yield last
                if last is not None:
                    self._note(last, served.monitor)

    async def consult(
        self,
        work: Callable[[Model, float], Awaitable[Result]],
        *,
        timeout_s: float | None = None,
        name: str = DEFAULT,
    ) -> Result:
        """What `work` finds out of the model until a deadline of the monotonic clock, one such at a time.

        It is none of the answers that drift, feedback, shadow and figures tell of.

        Raises:
            OverloadedError: too many wait for their turn, or too much waits for the model.
            TimeoutExceededError: the time is over.
            TuneserveError: see `answer`; and what `work` raises.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        if self._consulting >= MOST_CONSULTING:
            raise OverloadedError(f"{MOST_CONSULTING} others are being explained, or wait to be.")
        self._consulting += 1
        turns = self._turns.setdefault(asyncio.get_running_loop(), asyncio.Semaphore())
        try:
            async with (
                asyncio.timeout(timeout_s if timeout_s < math.inf else None),
                turns,
                self._hold(name, timeout_s) as slot,
            ):
                with slot.served() as served:
                    if refusal := served.model.room(deadline - time.monotonic()):
                        raise refusal
                    return await work(served.model, deadline)
        except TimeoutError:
            raise TimeoutExceededError("There was no answer in time.") from None
        finally:
            self._consulting -= 1

    def predict(self, inputs: Sequence[Any], *, name: str = DEFAULT) -> Answers:
        """`answer` for code that is not asynchronous, without a limit of time.

        Raises:
            TuneserveError: see `answer`.
        """
        return wait_for(self.answer(inputs, timeout_s=float("inf"), name=name))

    def room(self, name: str = DEFAULT) -> OverloadedError | None:
        """Why a request could not be answered soon; None if it may come in, or if there is no model to wait for."""
        served = self._ready(name)
        return served.model.room() if served is not None else None

    def drain_s(self, name: str = DEFAULT) -> float:
        """Seconds until nothing waits any more, by the measured rate."""
        served = self._ready(name)
        return served.model.drain_s if served is not None else 0.0

    def phase(self, name: str = DEFAULT) -> Phase:
        """Whether the model is there: empty, loading, ready or failed.

        A server without one of its own is loading until all pinned models have been loaded, and ready then.
        """
        if name in self._slots or self.models is None:
            return self._slot(name).phase
        return "loading" if self.models.awaited() else "ready"

    def reason(self) -> str | None:
        """What a server without a model of its own waits for, in a sentence."""
        awaited = self.models.awaited() if self.models is not None else []
        return f"Pinned models are being loaded: {', '.join(awaited)}."[:MOST_CHARACTERS] if awaited else None

    def is_alive(self, name: str = DEFAULT) -> bool:
        """Whether the model has not died, and the store is followed."""
        if name not in self._slots and self.models is not None:
            return True
        slot = self._slot(name)
        return slot.phase != "failed" and not slot.trouble

    def version_id(self, name: str = DEFAULT) -> str | None:
        """The version that answers, if there is one of this name."""
        served = self._ready(name)
        return served.model.id if served is not None else None

    def model(self, name: str = DEFAULT) -> Model:
        """The model that answers, to look at.

        Raises:
            NoModelError: there is none yet, or it has died.
        """
        return self._slot(name).model()

    def monitor(self, name: str = DEFAULT) -> Monitor:
        """What the model that answers has answered lately.

        Raises:
            NoModelError: there is none yet, or it has died.
        """
        return self._slot(name).monitor()

    async def label(
        self, label: str, *, text: str | None = None, request_id: str = "", index: int = 0, client: str = ""
    ) -> bool:
        """Keep the right label of a text, or of a request's answer; False if just that was said before.

        `client` is the sender's address, of which a pseudonym is kept.

        Raises:
            NotFoundError: no such answer is remembered.
            ConflictError: several answers have this id.
            UnavailableError: it cannot be written.
        """
        if self.feedback is None:
            raise NotFoundError("This server keeps no labels.")
        keep = partial(self.feedback.keep, label, text=text, request=request_id, index=index, client=client)
        try:
            stored = await keep()
        except NotFoundError:
            await asyncio.sleep(2 * WRITE_EVERY_S)  # perhaps another server of this store is about to write it
            stored = await keep()
        served = self._ready(DEFAULT)
        if stored and text is None and served is not None and "abstention" in served.model.metadata:
            with suppress(UnavailableError):  # the label is kept all the same
                await asyncio.to_thread(self._check_promise, served.model)
        return stored

    def labels_kept(self) -> dict[str, Any]:
        """How many labels there are, and the accuracy of the model that answers on the newest of them.

        Raises:
            NoModelError: no model answers.
            UnavailableError: they cannot be read.
        """
        if self.feedback is None:
            raise NotFoundError("This server keeps no labels.")
        model = self.model()
        accuracy = self.feedback.accuracy(model.id)
        kept = self._check_promise(model)
        return {
            **self.feedback.counts(),
            "accuracy": asdict(accuracy) if accuracy is not None else None,
            **({"promise": asdict(kept)} if kept is not None else {}),
        }

    def _check_promise(self, model: Model) -> Kept | None:
        """Whether labels show that a version breaks what it promises, which the log says once; None without a promise.

        Raises:
            UnavailableError: they cannot be read.
        """
        said = model.metadata.get("abstention")
        if self.feedback is None or not said or said.get("threshold") is None:
            return None
        found = self.feedback.kept(model.id, threshold=said["threshold"], max_error=said["max_error"])
        if found.kept is False and model.id not in self._broken:
            self._broken.add(model.id)
            logger.warning(
                "version %s does not keep MAX_ERROR=%g: of the last %d labelled answers that did not abstain %d are "
                "wrong (p=%.2g); train again with texts like these",
                *(model.id, found.max_error, found.count, found.wrong, found.p_value),
            )
        return found

    def figures(self, routes: Collection[str]) -> dict[str, Any]:
        """What is going on: how requests to these routes ended, and what waits; see `Metrics.totals`."""
        served = self._ready(DEFAULT)
        waits = {"queue_tokens": served.model.queue_tokens, "drain_s": served.model.drain_s} if served else {}
        return {**self.metrics.totals(routes), **waits}

    def render_metrics(self) -> bytes:
        """All figures in Prometheus' text format. It takes milliseconds: not for the event loop."""
        with self._rendering:
            return self._render()

    def _render(self) -> bytes:
        self.metrics.model.clear()
        if (served := self._ready(DEFAULT)) is not None:
            model = served.model
            self.metrics.model.labels(model.id).set(1)
            self.metrics.queue_tokens.set(model.queue_tokens)
            self.metrics.show_drift(served.monitor.report())
            if self.feedback is not None:
                self.metrics.show_feedback(self.feedback, model.id)
                with suppress(UnavailableError):
                    kept = self._check_promise(model)
                    self.metrics.show_promise(kept.kept if kept is not None else None)
        return self.metrics.render()

    def _hold(self, name: str, timeout_s: float) -> AbstractAsyncContextManager[Slot]:
        if self.models is None or name in self._slots:
            return nullcontext(self._slot(name))
        return self.models.hold(name, timeout_s)

    def _ready(self, name: str) -> Served | None:
        slot = self._slots.get(name)
        return slot.ready if slot is not None else None

    def _slot(self, name: str) -> Slot:
        try:
            return self._slots[name]
        except KeyError:
            raise NotFoundError(f"There is no model {name!r} here.") from None

    def _note(self, answer: Answer, monitor: Monitor) -> None:
        self.metrics.texts.inc()
        if answer.verdict is not None:
            self.metrics.labels.labels(answer.verdict[0]).inc()
        if answer.truncated:
            self.metrics.truncated.inc()
        if answer.abstain:
            self.metrics.abstained.inc()
        if answer.observation is not None:
            monitor.observe(answer.observation)
