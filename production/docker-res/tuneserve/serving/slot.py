"""The model that answers now: empty, loading, ready, or failed for a reason."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from opentelemetry import trace

from tuneserve.errors import NoModelError, TextError, TimeoutExceededError, TuneserveError
from tuneserve.serving.batcher import Batcher, Outcome, Stages
from tuneserve.serving.classifier import Classifier, Prediction
from tuneserve.serving.metrics import Metrics
from tuneserve.tokenization import Tokens

logger = logging.getLogger(__name__)

Phase = Literal["empty", "loading", "ready", "failed"]

INLINE_CHARACTERS = 4000
"""Texts that together are shorter are tokenized by the event loop itself: a thread would cost more than it spares."""

CHUNK_BATCHES = 2
"""Batches' worth of one request that are queued at a time: a large request leaves room for small ones."""


class ServedModel:
    """A classifier with its queue.

    Args:
        classifier: whose engine belongs to the queue's thread from now on.
        metrics: told of everything.
        max_queue_tokens: that may wait.
        on_death: called if the engine's thread ends by an error.
    """

    def __init__(
        self,
        classifier: Classifier,
        metrics: Metrics,
        *,
        max_queue_tokens: int,
        on_death: Callable[[BaseException], None],
    ) -> None:
        self.classifier = classifier
        self.metrics = metrics
        self.batcher = Batcher(classifier.engine, metrics, max_queue_tokens=max_queue_tokens, on_death=on_death)

    async def predict(self, texts: Sequence[str], *, timeout_s: float) -> list[Prediction | TuneserveError]:
        """The prediction of each text in order, or why there is none.

        Raises:
            OverloadedError: too much waits already.
            TimeoutExceededError: the time is over.
            NoModelError: the engine has ended.
        """
        self.batcher.require_room(timeout_s)
        began = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                return await self._predict(texts, deadline=began + timeout_s)
        except TimeoutError:
            raise TimeoutExceededError(f"There was no answer within {timeout_s:g} s.") from None

    async def _predict(self, texts: Sequence[str], *, deadline: float) -> list[Prediction | TuneserveError]:
        span = trace.get_current_span()
        stages = Stages() if span.is_recording() else None
        began = time.perf_counter()
        if sum(map(len, texts)) < INLINE_CHARACTERS:
            readings = self.classifier.read(texts)
        else:
            readings = await asyncio.to_thread(self.classifier.read, texts)
        tokenize_s = time.perf_counter() - began
        self.metrics.stages.labels("tokenize").observe(tokenize_s)
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
            for chunk in _chunks(ids, CHUNK_BATCHES * self.batcher.max_batch_tokens):
                waiting.append(self.batcher.submit(chunk, deadline=deadline, stages=stages))
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
            if isinstance(outcome, TuneserveError):
                return outcome
            logits.append(outcome)
        prediction = self.classifier.describe(reading, logits)
        self.metrics.texts.inc()
        self.metrics.labels.labels(prediction.label).inc()
        if prediction.truncated:
            self.metrics.truncated.inc()
        return prediction


def _chunks(ids: list[list[int]], max_tokens: int) -> list[list[list[int]]]:
    chunks: list[list[list[int]]] = []
    tokens = 0
    for one in ids:
        if not chunks or tokens + len(one) > max_tokens:
            chunks.append([])
            tokens = 0
        chunks[-1].append(one)
        tokens += len(one)
    return chunks


class Slot:
    """Holds at most one model, which gets there only once it is warm.

    Args:
        load: makes the classifier, which has proved itself.
        metrics: of the server.
        max_queue_tokens: that may wait for the engine.
    """

    def __init__(
        self, load: Callable[[], Classifier], *, metrics: Metrics | None = None, max_queue_tokens: int = 16384
    ) -> None:
        self.phase: Phase = "empty"
        self.failure: BaseException | None = None
        self.metrics = metrics or Metrics()
        self.on_failure: Callable[[], None] = lambda: None
        self._max_queue_tokens = max_queue_tokens
        self._load = load
        self._model: ServedModel | None = None
        self._loader: threading.Thread | None = None

    def model(self) -> ServedModel:
        """The model to ask.

        Raises:
            NoModelError: there is none, or not yet, or it has died.
        """
        if self._model is None or self.phase != "ready":
            raise NoModelError(f"No model can answer yet (phase: {self.phase}).")
        return self._model

    def fill(self) -> None:
        """Load the model and let it prove itself. What goes wrong is kept in `failure`, not raised."""
        self.phase = "loading"
        try:
            classifier = self._load()
            classifier.engine.warm_up()
        except NoModelError as error:
            self._fail("empty", error)
            logger.warning("%s", error)
        except Exception as error:  # whatever it is, the server must not look healthy
            self._fail("failed", error)
            logger.exception(
                "the model cannot be loaded", exc_info=None if isinstance(error, TuneserveError) else error
            )
        else:
            self._model = ServedModel(
                classifier, self.metrics, max_queue_tokens=self._max_queue_tokens, on_death=self._die
            )
            self.phase = "ready"
            logger.info("ready: version %s answers", classifier.version.id)

    def fill_in_background(self) -> None:
        """Do the same on a thread of its own."""
        self._loader = threading.Thread(target=self.fill, name="load-model", daemon=True)
        self._loader.start()

    def close(self) -> None:
        """Answer what waits and end the threads: a library that computes while its process ends would abort it."""
        if self._loader is not None:
            self._loader.join()
        if self._model is not None:
            self._model.batcher.close()

    def _die(self, error: BaseException) -> None:
        self._fail("failed", error if isinstance(error, TuneserveError) else NoModelError(f"The engine died: {error}"))

    def _fail(self, phase: Phase, error: BaseException) -> None:
        self.phase, self.failure = phase, error
        self.on_failure()
