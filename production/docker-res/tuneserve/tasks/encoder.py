"""An encoder as a Model: a body, and what makes answers of what comes out of it.

What its answers are is its task's to say: see `classifier.py` and `embedder.py`.
"""

import asyncio
import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

from tuneserve.artifact import GOLDEN, Version, require_whole
from tuneserve.errors import NoModelError, OverloadedError, StoreError, TextError, TuneserveError
from tuneserve.serving.batcher import Batcher, Outcome
from tuneserve.serving.engines.choice import ENGINES
from tuneserve.serving.engines.engine import Engine
from tuneserve.serving.metrics import Metrics
from tuneserve.serving.model import Answer, Answers, Model
from tuneserve.settings import Settings
from tuneserve.tasks.body import READ_AT_ONCE, Array, Body, Reading
from tuneserve.text import Tokens

logger = logging.getLogger(__name__)

Made = TypeVar("Made", bound="Encoder")


class Encoder(Model):
    """A version on its body; `describe` makes an answer of what the engine computes of a text.

    Args:
        version: in the store.
        body: which may be others' too.
    """

    def __init__(self, version: Version, body: Body) -> None:
        self.version, self.body = version, body
        self.id, self.metadata = version.id, version.metadata
        body.join(self)

    @property
    def batcher(self) -> Batcher:
        """The queue before the engine."""
        return self.body.batcher

    @property
    def dead(self) -> bool:
        """See `Model`."""
        return self.batcher.dead is not None

    @property
    def queue_tokens(self) -> int:
        """See `Model`."""
        return self.batcher.tokens_waiting

    @property
    def drain_s(self) -> float:
        """See `Model`."""
        return self.batcher.drain_s

    def room(self, wait_s: float = math.inf) -> OverloadedError | None:
        """See `Model`."""
        return self.batcher.refusal(wait_s)

    @abstractmethod
    def describe(self, tokens: Tokens, outputs: Sequence[Array]) -> Answer:
        """The answer that follows from what the engine computed of each of a text's windows: float [values] each."""

    @abstractmethod
    def prove(self, golden: str = GOLDEN) -> None:
        """Ask what stands in this file of the version, and compare the answers; see `Model`."""

    async def answer(self, inputs: Sequence[str], *, deadline: float = math.inf) -> Answers:
        """The answer to each text in order, or why there is none; see `Model`."""
        return await self.read_and_compute(inputs, deadline)

    def warm_up(self) -> None:
        """See `Model`."""
        self.body.engine.warm_up()

    def attach(self, metrics: Metrics, on_death: Callable[[BaseException], None]) -> None:
        """See `Model`."""
        self.body.attach(self, metrics, on_death)

    def close(self) -> None:
        """See `Model`."""
        self.body.leave(self)

    async def read_and_compute(
        self, texts: Sequence[str], deadline: float = math.inf, *, max_windows: int | None = None
    ) -> Answers:
        """See `answer`; of each text so many windows count."""
        found = await self.body.ask(texts, deadline, max_windows=max_windows, asker=self.id)
        return self.conclude(found) if len(texts) <= READ_AT_ONCE else await asyncio.to_thread(self.conclude, found)

    def conclude(self, found: Sequence[Reading]) -> Answers:
        """The answer that follows from what the body found of each text."""
        return [self._conclude(*one) for one in found]

    def _conclude(self, reading: Tokens | TextError, outcomes: Sequence[Outcome]) -> Answer | TuneserveError:
        """The answer that follows from the outcome of each of a text's windows."""
        if isinstance(reading, TextError):
            return reading
        outputs: list[Array] = []
        for outcome in outcomes:
            if isinstance(outcome, NoModelError):
                raise NoModelError(str(outcome))  # it is no fault of this text
            if isinstance(outcome, TuneserveError):
                return outcome
            outputs.append(outcome)
        return self.describe(reading, outputs)


def load_encoder(
    make: Callable[[Version, Engine, Settings], Made], version: Version, settings: Settings, *, threads: int
) -> Made:
    """The version with the first engine that it can have here, after it has proved itself.

    Raises:
        StoreError: the version's files are damaged, or it does not answer as it did when it was saved.
        DeviceError: the device asked for cannot be had.
    """
    require_whole(version)
    for choice in ENGINES:
        try:
            engine = choice.load(version, settings, threads=threads)
            if engine is not None:
                return _proved(make, version, engine, settings, choice.golden)
        except StoreError as error:
            if not choice.optional:
                raise
            logger.warning("%s does not serve, PRECISION=auto does: %s", choice.optional, error)
    raise StoreError(f"version {version.id} has no engine here.")


def _proved(
    make: Callable[[Version, Engine, Settings], Made],
    version: Version,
    engine: Engine,
    settings: Settings,
    golden: str,
) -> Made:
    try:
        model = make(version, engine, settings)
    except TuneserveError:
        raise
    except Exception as error:  # the tokenizers' library has no exception of its own for a damaged file
        raise StoreError(f"The tokenizer in {version.folder} cannot be loaded: {error}") from error
    try:
        model.prove(golden)
    except BaseException:
        model.close()
        raise
    return model
