"""A model that brings its own code, as SageMaker's archives do: `code/inference.py` answers, in a process of its own.

One thread looks after the process: it starts it, hands it one request after another, ends it when a request takes too
long, and starts it anew after that or a crash.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tuneserve.errors import HandlerError, NoModelError, OverloadedError, TimeoutExceededError, TuneserveError
from tuneserve.serving.metrics import Metrics
from tuneserve.serving.model import Answer, Answers, Model
from tuneserve.tasks.handler_process import MAX_HEAD, Process, environment_of, resident_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Invocation:
    """A request as it came: its body, and the headers that a handler sees."""

    body: bytes
    content_type: str = "application/json"
    accept: str = "*/*"
    custom_attributes: str = ""

    def headers(self) -> dict[str, str]:
        """Their names in lower case."""
        attributes = {"x-amzn-sagemaker-custom-attributes": self.custom_attributes} if self.custom_attributes else {}
        return {"content-type": self.content_type, "accept": self.accept, **attributes}


@dataclass(frozen=True, slots=True, kw_only=True)
class Response(Answer):
    """A handler's answer, byte for byte."""

    body: bytes
    content_type: str


class Handler(Model):
    """The code of a folder, in a process of its own; made at once, and `wait` returns when it has loaded.

    Args:
        folder: of the unpacked archive, which `model_fn` gets.
        name: of the model, for answers and the log.
        program: the file with the functions; see `archives.find_program`.
        environ: variables of the server; secrets among them are not passed on.
        task: Hugging Face's name of what a model without `model_fn` is for; empty: by its architecture.
        threads: CPU threads to compute with.
        max_waiting: requests that may wait.
        max_bytes: of an answer.
        timeout_s: that one request may compute, from when it begins; then the process is ended and started anew.
        load_s: until the code and its model must be loaded.
        clock: in seconds.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        program: Path,
        environ: Mapping[str, str],
        task: str = "",
        threads: int = 1,
        max_waiting: int = 16,
        max_bytes: int = 64 << 20,
        timeout_s: float = 60.0,
        load_s: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.id = name
        self.metadata = {"handler": program.name}
        self._max_waiting, self._timeout_s, self._load_s, self._clock = max_waiting, timeout_s, load_s, clock
        config = {"folder": str(folder), "name": name, "program": str(program), "task": task, "max_bytes": max_bytes}
        self._max_bytes, self._aborted = max_bytes, threading.Event()
        self._start = partial(Process, config, environment_of(environ, threads), clock=clock, aborted=self._aborted)
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Invocation, Future[Response | TuneserveError]]] = deque()
        self._mean_s, self._busy, self._closing = 0.0, False, False
        self._process: Process | None = None
        self._death: TuneserveError | None = None
        self._on_death: Callable[[BaseException], None] = lambda error: None
        self._loaded: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=f"handler {name}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until it has loaded.

        Raises:
            HandlerError: it cannot be loaded: what the code raised, or how its process ended.
        """
        self._loaded.result()

    @property
    def dead(self) -> bool:
        """Whether the process ended and could not be loaded again."""
        return self._death is not None

    @property
    def drain_s(self) -> float:
        """Seconds that what waits will take, by the mean of the last answers."""
        return (len(self._waiting) + self._busy) * self._mean_s

    @property
    def memory_bytes(self) -> int:
        """Memory that the process and its children hold now."""
        process = self._process
        return resident_bytes(process.pid) if process is not None else 0

    def room(self, wait_s: float = math.inf) -> OverloadedError | None:
        """See `Model`."""
        return self._refusal(1, wait_s)

    def _refusal(self, count: int, wait_s: float) -> OverloadedError | None:
        if len(self._waiting) + count <= self._max_waiting and self.drain_s <= wait_s:
            return None
        words = f"{len(self._waiting)} requests wait for model {self.id} already."
        return OverloadedError(words, retry_after_s=max(1, math.ceil(self.drain_s / 2)))

    async def answer(self, inputs: Sequence[Invocation], *, deadline: float = math.inf) -> Answers:
        """See `Model`; an input's error is a HandlerError with what the code raised."""
        if not inputs:
            return []
        with self._changed:
            if self._closing or self._death is not None:
                raise NoModelError(f"Model {self.id} cannot answer any more.")
            if refusal := self._refusal(len(inputs), deadline - self._clock()):
                raise refusal
            jobs = [(one, Future[Response | TuneserveError]()) for one in inputs]
            self._waiting.extend(jobs)
            self._changed.notify()
        try:
            async with asyncio.timeout(deadline - self._clock() if deadline < math.inf else None):
                found = await asyncio.gather(*(asyncio.wrap_future(future) for _, future in jobs))
        except TimeoutError:
            raise TimeoutExceededError("There was no answer in time.") from None
        for one in found:
            if isinstance(one, NoModelError):
                raise one
        return list(found)

    def attach(self, metrics: Metrics, on_death: Callable[[BaseException], None]) -> None:
        """See `Model`."""
        self._on_death = on_death

    def close(self) -> None:
        """Answer what waits, for as long as one request may take; the process and its children are gone then."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if not self._loaded.done():
            self._aborted.set()
        if self._thread is not threading.current_thread():
            self._thread.join(self._timeout_s)
            self._aborted.set()
            self._thread.join()

    def _run(self) -> None:
        # The kernel ends the process when the thread that started it ends, so this thread stays.
        try:
            self._load()
            self._loaded.set_result(None)
            while job := self._next():
                self._serve(*job)
        except Exception as error:  # of the process's start, or one that nobody foresaw
            said = error if isinstance(error, TuneserveError) else HandlerError(str(error), kind=type(error).__name__)
            logger.error("model %s cannot answer any more: %s", self.id, said)
            self._death = said
        finally:
            self._stop()
            with self._changed:
                self._closing = True
                left = [future for _, future in self._waiting if future.set_running_or_notify_cancel()]
                self._waiting.clear()
            for future in left:
                future.set_result(NoModelError(f"Model {self.id} cannot answer any more."))
            if self._death is not None and self._loaded.done():
                self._on_death(self._death)
            elif self._death is not None:
                self._loaded.set_exception(self._death)

    def _load(self) -> None:
        self._process = self._start()
        try:
            head, _ = self._process.receive(self._clock() + self._load_s, MAX_HEAD)
            if head:
                raise HandlerError(head["message"], kind=head["kind"])
        except TimeoutError:
            raise HandlerError(f"It was not loaded within {self._load_s:g} s.", kind="TimeoutError") from None
        except (EOFError, ValueError, KeyError):
            raise HandlerError(f"{self._stop()} while it was loaded.", kind="ProcessEnded", status=500) from None

    def _stop(self) -> str:
        process, self._process = self._process, None
        return process.stop() if process is not None else ""

    def _next(self) -> tuple[Invocation, Future[Response | TuneserveError]] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            return self._waiting.popleft() if self._waiting and not self._aborted.is_set() else None

    def _serve(self, invocation: Invocation, future: Future[Response | TuneserveError]) -> None:
        if not future.set_running_or_notify_cancel():  # the client has gone, or its deadline has passed
            return
        began = self._clock()
        self._busy, why = True, ""
        try:
            if self._process is not None and self._process.has_ended():  # since the last request
                logger.warning("model %s: %s; it is started again", self.id, self._stop())
                self._load()
            future.set_result(self._ask(invocation, self._clock() + self._timeout_s))
            seconds = self._clock() - began
            self._mean_s = 0.8 * self._mean_s + 0.2 * seconds if self._mean_s else seconds
        except TimeoutError:
            why = f"It computed for more than {self._timeout_s:g} s, and was ended."
            self._stop()
            future.set_result(TimeoutExceededError(why))
        except (EOFError, ValueError, KeyError):
            why = f"{self._stop()} while it computed."
            future.set_result(HandlerError(why, kind="ProcessEnded", status=500))
        finally:
            self._busy = False
            if not future.done():
                future.set_result(NoModelError(f"Model {self.id} cannot answer any more."))
        if why and not self._aborted.is_set():
            logger.warning("model %s: %s It is started again.", self.id, why)
            self._load()

    def _ask(self, invocation: Invocation, until: float) -> Response | TuneserveError:
        assert self._process is not None
        self._process.send({"headers": invocation.headers()}, invocation.body, until)
        head, body = self._process.receive(until, self._max_bytes)
        if "kind" in head:
            return HandlerError(head["message"], kind=head["kind"])
        return Response(model_version=self.id, body=body, content_type=head["content_type"])
