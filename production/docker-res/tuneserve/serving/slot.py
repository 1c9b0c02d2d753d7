"""The model that answers now: none yet, ready, or failed for a reason; and the one before it, for a while."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from opentelemetry import trace

from tuneserve.errors import NoModelError, TextError, TuneserveError
from tuneserve.lifecycle.drift import Window
from tuneserve.serving.batcher import Batcher, Outcome, Stages
from tuneserve.serving.classifier import Classifier, Prediction
from tuneserve.serving.metrics import Metrics
from tuneserve.serving.monitor import Monitor
from tuneserve.text import Tokens, split_by_tokens

logger = logging.getLogger(__name__)

Answers = list[Prediction | TuneserveError]

Phase = Literal["empty", "loading", "ready", "failed"]

HOLD_S = 600.0
"""Seconds that a model which was replaced stays loaded, so that going back to it takes no time."""

SETTLE_S = 2.0
"""Seconds in which a request that has just asked for the old model may still reach it."""

INLINE_CHARACTERS = 4000
"""Texts that together are shorter are tokenized by the event loop itself: a thread would cost more than it spares."""

CHUNK_BATCHES = 2
"""Batches' worth of one request that are queued at a time: a large request leaves room for small ones."""


class ServedModel:
    """A classifier with its queue.

    Args:
        classifier: whose engine belongs to the queue's thread from now on.
        metrics: told of everything.
        window: empty, for what it answers.
        max_queue_tokens: that may wait.
        on_death: called if the engine's thread ends by an error.
    """

    def __init__(
        self,
        classifier: Classifier,
        metrics: Metrics,
        window: Window,
        *,
        max_queue_tokens: int,
        on_death: Callable[[BaseException], None],
    ) -> None:
        self.classifier = classifier
        self.metrics = metrics
        self.monitor = Monitor(classifier, window)
        self.in_flight = 0
        self.batcher = Batcher(classifier.engine, metrics, max_queue_tokens=max_queue_tokens, on_death=on_death)

    async def predict(self, texts: Sequence[str], *, timeout_s: float) -> list[Prediction | TuneserveError]:
        """The prediction of each text in order, or why there is none.

        Raises:
            OverloadedError: too much waits already.
            TimeoutExceededError: the time is over.
            NoModelError: the engine has ended.
        """
        if refusal := self.batcher.refusal(timeout_s):
            raise refusal
        began = time.monotonic()
        self.in_flight += 1
        try:
            return await self._predict(texts, deadline=began + timeout_s)
        finally:
            self.in_flight -= 1

    async def _predict(self, texts: Sequence[str], *, deadline: float) -> list[Prediction | TuneserveError]:
        span = trace.get_current_span()
        stages = Stages() if span.is_recording() else None
        began = time.perf_counter()
        if sum(map(len, texts)) < INLINE_CHARACTERS:
            readings = self.classifier.read(texts)
        else:
            readings = await asyncio.to_thread(self.classifier.read, texts)
            if refusal := self.batcher.refusal():  # others have filled the queue meanwhile
                raise refusal
        tokenize_s = time.perf_counter() - began
        self.metrics.stages["tokenize"].observe(tokenize_s)
        ids = [window for one in readings if isinstance(one, Tokens) for window in one.windows]
        outcomes = iter(await self._compute(ids, deadline, stages))
        if stages is not None:
            span.set_attributes(
                {
                    "tuneserve.model_version": self.classifier.version.id,
                    "tuneserve.texts": len(texts),
                    "tuneserve.tokens": sum(map(len, ids)),
                    "tuneserve.tokenize_s": tokenize_s,
                    "tuneserve.queue_s": max(0.0, stages.taken_at - stages.queued_at),
                    "tuneserve.infer_s": max(0.0, stages.answered_at - stages.taken_at),
                }
            )
        return [self._answer(one, outcomes) for one in readings]

    async def _compute(self, ids: list[list[int]], deadline: float, stages: Stages | None) -> list[Outcome]:
        """Outcomes in order; few chunks of a large request wait at once."""
        outcomes: list[Outcome] = []
        waiting: deque[asyncio.Future[list[Outcome]]] = deque()
        try:
            for chunk in split_by_tokens([*map(len, ids)], CHUNK_BATCHES * self.batcher.max_batch_tokens):
                waiting.append(self.batcher.submit(ids[chunk], deadline=deadline, stages=stages))
                if len(waiting) > 1:
                    outcomes += await waiting[0]
                    waiting.popleft()
            while waiting:
                outcomes += await waiting[0]
                waiting.popleft()
        finally:
            for future in waiting:
                future.cancel()  # nobody waits any more: what has not begun is dropped
        return outcomes

    def _answer(self, reading: Tokens | TextError, outcomes: Iterator[Outcome]) -> Prediction | TuneserveError:
        if isinstance(reading, TextError):
            return reading
        logits = []
        for outcome in [next(outcomes) for _ in reading.windows]:
            if isinstance(outcome, NoModelError):
                raise NoModelError(str(outcome))  # it is no fault of this text
            if isinstance(outcome, TuneserveError):
                return outcome
            logits.append(outcome)
        prediction = self.classifier.describe(reading, logits)
        self.metrics.texts.inc()
        self.metrics.labels.labels(prediction.label).inc()
        self.monitor.observe(reading, prediction)
        if prediction.truncated:
            self.metrics.truncated.inc()
        return prediction


class Slot:
    """The place of the model that answers. Models come warm, and change between two requests.

    Args:
        metrics: of the server.
        max_queue_tokens: that may wait for an engine.
        new_window: makes an empty window for what a version answers.
    """

    def __init__(
        self,
        *,
        metrics: Metrics | None = None,
        max_queue_tokens: int = 32768,
        new_window: Callable[[], Window] = Window,
    ) -> None:
        self.phase: Phase = "empty"
        self.failure: BaseException | None = None
        self.metrics = metrics or Metrics()
        self.on_failure: Callable[[], None] = lambda: None
        self.shadow: Callable[[Sequence[str], Answers, float], None] | None = None
        self._max_queue_tokens = max_queue_tokens
        self._new_window = new_window
        self._model: ServedModel | None = None
        self._held: ServedModel | None = None
        self._change = threading.RLock()
        self._closed = threading.Event()
        self._leaving: list[threading.Thread] = []

    def model(self) -> ServedModel:
        """The model to ask.

        Raises:
            NoModelError: there is none yet, or it has died.
        """
        model = self._model
        if model is None or self.phase != "ready":
            raise NoModelError(f"No model can answer yet (phase: {self.phase}).")
        return model

    @property
    def empty(self) -> bool:
        """Whether no model has come yet."""
        return self._model is None

    @property
    def version_id(self) -> str | None:
        """The id of the version that answers."""
        return self._model.classifier.version.id if self._model is not None else None

    def take(self, classifier: Classifier) -> None:
        """Let this one answer from the next request on; the one before stays loaded for a while."""
        model = ServedModel(
            classifier,
            self.metrics,
            self._new_window(),
            max_queue_tokens=self._max_queue_tokens,
            on_death=lambda error: self._die(model, error),
        )
        self._change_to(model)

    def bring_back(self, version_id: str) -> bool:
        """Change to the model that is still held, if it is this version's."""
        with self._change:
            held = self._held
            if held is None or held.classifier.version.id != version_id or held.batcher.dead:
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
        for thread in self._leaving:
            thread.join()
        for model in (self._model, self._held):
            if model is not None:
                model.batcher.close()

    def _change_to(self, model: ServedModel) -> None:
        with self._change:
            before, dropped = self._model, self._held
            self._model, self._held, self.phase = model, before, "ready"
            self.metrics.swaps.labels("served").inc()
            logger.info("ready: version %s answers", model.classifier.version.id)
            for old, after_s in ((dropped, SETTLE_S), (before, HOLD_S)):
                if old is not None:
                    self._leaving = [thread for thread in self._leaving if thread.is_alive()]
                    self._leaving.append(threading.Thread(target=self._let_go, args=[old, after_s], daemon=True))
                    self._leaving[-1].start()

    def _let_go(self, model: ServedModel, after_s: float) -> None:
        """Drop a model that was replaced, once nobody waits for it, unless it is brought back before."""
        self._closed.wait(after_s)
        with self._change:
            if model is self._model or self._closed.is_set():
                return
            if model is self._held:
                self._held = None
        while model.in_flight and not self._closed.wait(0.1):
            pass
        model.batcher.close()
        logger.info("version %s is no longer held", model.classifier.version.id)

    def _die(self, model: ServedModel, error: BaseException) -> None:
        if model is self._model:
            self.fail(error if isinstance(error, TuneserveError) else NoModelError(f"The engine died: {error}"))
