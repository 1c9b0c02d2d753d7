"""The Model seam: something loaded that answers. Slot, swap, shadow, drift, the gate and the service know only this."""

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from tuneserve.errors import OverloadedError, TuneserveError
from tuneserve.lifecycle.drift import Observation, Reference
from tuneserve.serving.metrics import Metrics

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model answers to one input; a task's own answer has its fields besides."""

    model_version: str
    truncated: bool = False
    """Whether only the beginning of the input was read."""
    abstain: bool | None = None
    """Whether it is less sure than the version's answers must be to be given; None where it promises nothing."""
    observation: Observation | None = field(default=None, repr=False, compare=False)
    """What drift is judged by; None where it is not judged."""

    @property
    def verdict(self) -> tuple[str, float] | None:
        """The label that people may correct, and its probability; None where an answer is no label."""
        return None

    @property
    def probabilities(self) -> Mapping[str, float]:
        """Of each label; none where an answer is no label."""
        return {}

    def agrees_with(self, other: "Answer") -> bool:
        """Whether another model's answer to the same input says the same."""
        if self.verdict is not None and other.verdict is not None:
            return self.verdict[0] == other.verdict[0]
        return replace(self, model_version=other.model_version) == other


Answers = list[Answer | TuneserveError]
"""One answer or error for each input, in order."""


class Model(ABC):
    """A loaded model with what it needs to answer many requests at once.

    A task brings its own: `id`, `room` and `answer` are what it must have. All but `attach` and `close` may be called
    from any thread; `answer` on the event loop.
    """

    id: str
    """The version, as answers name it."""

    metadata: Mapping[str, Any] = {}
    """What `GET /model` shows beside the id."""

    task: str = ""
    """The name of the task by which it is asked."""

    labels: Sequence[str] = ()
    """The label names by id, where answers are labels."""

    bytes: int | None = None
    """Of the files that were read for it, where these are not all in its folder."""

    @property
    def reference(self) -> Reference | None:
        """The answers to the test texts, with which drift compares."""
        return None

    @property
    def small(self) -> bool:
        """Whether what it takes, or has given back with its end, is hardly worth counting: the rest is others' too."""
        return False

    @property
    def dead(self) -> bool:
        """Whether it cannot answer any more."""
        return False

    @property
    def queue_tokens(self) -> int:
        """Tokens that wait."""
        return 0

    @property
    def drain_s(self) -> float:
        """Seconds that what waits will take, by the measured rate."""
        return 0.0

    @abstractmethod
    def room(self, wait_s: float = math.inf) -> OverloadedError | None:
        """Why a request that may wait so many seconds could not be answered in time; None if it can.

        It is returned and not raised: its traceback would hold the caller's frames, and these the error, so that each
        refusal would leave a cycle for the garbage collector.
        """

    @abstractmethod
    async def answer(self, inputs: Sequence[Any], *, deadline: float = math.inf) -> Answers:
        """One answer or error for each input, in order, until the deadline of the monotonic clock.

        Raises:
            OverloadedError: too much waits already.
            TimeoutExceededError: the deadline has passed.
            NoModelError: the model cannot answer any more.
        """

    async def stream(self, wanted: Any, *, deadline: float = math.inf) -> AsyncGenerator[Answer]:
        """The answer to one input as it comes to be, again and again; the last one is whole. Others come at once.

        Raises:
            TuneserveError: there is none; see `answer`.
        """
        [answer] = await self.answer([wanted], deadline=deadline)
        if isinstance(answer, TuneserveError):
            raise answer
        yield answer

    def predict(self, inputs: Sequence[Any]) -> Answers:
        """`answer` for code that is not asynchronous, in notebooks too, where an event loop is running already."""
        return wait_for(self.answer(inputs))

    def prove(self) -> None:  # noqa: B027 (nothing to prove unless a task has something)
        """Ask what was stored with the model when it was saved, and compare the answers.

        Raises:
            StoreError: an answer differs.
        """

    def warm_up(self) -> None:  # noqa: B027
        """Run what requests will need, so that hardly a user waits for what is set up once."""

    def attach(self, metrics: Metrics, on_death: Callable[[BaseException], None]) -> None:  # noqa: B027
        """Count in these metrics from now on, and call `on_death` should the model end by an error."""

    def close(self) -> None:  # noqa: B027
        """Answer what waits, then end the threads."""


def wait_for(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end; where an event loop is running already, as in a notebook, on another thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
