"""A challenger that answers a copy of live traffic, unseen, before it may take over."""

import asyncio
import logging
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tuneserve.artifact import Version
from tuneserve.errors import StoreError, TuneserveError
from tuneserve.lifecycle.decision import Check, Decision, read_decision, write_decision
from tuneserve.lifecycle.store import Store
from tuneserve.serving.metrics import Metrics
from tuneserve.serving.model import Answer, Answers, Model
from tuneserve.serving.slot import Slot

logger = logging.getLogger(__name__)

TIMEOUT_S = 30.0


class Shadow:
    """Asks a challenger what the champion has just answered, one text at a time, and compares.

    Args:
        model: the challenger, warm.
        wanted: texts that it is to answer.
    """

    def __init__(self, model: Model, *, wanted: int) -> None:
        self.model = model
        self._dead: BaseException | None = None
        model.attach(Metrics(), self._die)  # what it answers is nobody's answer, and counted apart
        self._wanted = wanted
        self._agreed: list[bool] = []
        self._ms: list[tuple[float, float]] = []
        self._failures = 0
        self._asking = threading.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def done(self) -> bool:
        """Whether it has answered enough."""
        return self._dead is not None or len(self._agreed) + self._failures >= self._wanted

    def copy(self, inputs: Sequence[Any], answers: Answers, seconds: float) -> None:
        """Pass on one input of a request that took so long; while one is asked, others go by: users come first."""
        answer = answers[0]
        if self.done or not isinstance(answer, Answer) or not self._asking.acquire(blocking=False):
            return
        task = asyncio.ensure_future(self._ask(inputs[0], answer, seconds if len(inputs) == 1 else None))
        self._tasks.add(task)  # asyncio itself keeps none
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, asked: Any, champions: Answer, champion_s: float | None) -> None:
        began = time.perf_counter()
        try:
            [answer] = await self.model.answer([asked], deadline=time.monotonic() + TIMEOUT_S)
            if isinstance(answer, TuneserveError):
                raise answer
            self._agreed.append(answer.agrees_with(champions))
            if champion_s is not None:
                self._ms.append((1000 * champion_s, 1000 * (time.perf_counter() - began)))
        except TuneserveError as error:
            self._failures += 1
            logger.warning("the challenger %s failed: %s", self.model.id, error)
        finally:
            self._asking.release()

    def _die(self, error: BaseException) -> None:
        self._dead = error

    def judged(self, decision: Decision) -> Decision:
        """The gate's decision with what the shadow showed. A failure refuses; agreement and latency are recorded.

        The gate has judged the latency, each model by itself. Here they take each other's time: a client that asks
        again at once makes the champion run beside every answer of the challenger, and not the other way round.
        """
        agreement = sum(self._agreed) / max(1, len(self._agreed))
        before, now = (statistics.median(column) for column in zip(*self._ms, strict=True)) if self._ms else (0.0, 0.0)
        figures = {
            "texts": len(self._agreed),
            "failures": self._failures,
            "agreement": round(agreement, 4),
            "latency_ms": round(now, 3),
            "champion_latency_ms": round(before, 3),
        }
        sentence = (
            f"in the champion's shadow it answered {len(self._agreed)} texts, {agreement:.1%} of them alike, in "
            f"{now:.1f} ms where the champion took {before:.1f}; {self._failures} failed"
        )
        passed = not self._failures and self._dead is None
        return replace(
            decision,
            verdict="accepted" if passed else "refused",
            sentence=f"{decision.sentence}; {sentence}" if passed else sentence,
            checks=[*decision.checks, Check("shadow", passed, round(agreement, 4), None, sentence)],
            figures={**decision.figures, "shadow": figures},
        )


class Shadowing:
    """Follows the store's challenger: loads it, has it shadow the champion, and lets it take over or not.

    Args:
        store: whose challenger is followed.
        slot: whose traffic is copied.
        load: makes a warm model of a version, which has proved itself.
        wanted: texts that a challenger is to answer; 0 if this server shadows none.
    """

    def __init__(
        self,
        store: Store,
        slot: Slot,
        load: Callable[[Version], Model],
        *,
        wanted: int,
    ) -> None:
        self._store, self._slot, self._load = store, slot, load
        self._wanted = wanted
        self._shadow: Shadow | None = None

    def look(self) -> None:
        """Begin, go on, or conclude. Whatever is wrong with a challenger, the champion goes on."""
        if not self._wanted or self._slot.phase != "ready":
            return
        try:
            name = self._store.challenger_id()
            if self._shadow is not None and (self._shadow.done or name != self._shadow.model.id):
                self._conclude(self._shadow, wanted=name == self._shadow.model.id)
            elif self._shadow is None and name is not None:
                self._begin(self._store.version(name))
        except StoreError as error:
            logger.error("the challenger cannot go on: %s", error)
            self._drop()
            self._store.set_challenger(None)

    def close(self) -> None:
        """End it; the challenger stays one, and begins again with the next server."""
        self._drop()

    def _begin(self, version: Version) -> None:
        try:
            model = self._load(version)
        except Exception as error:
            raise StoreError(f"version {version.id} cannot be loaded: {error}") from error
        self._shadow = Shadow(model, wanted=self._wanted)
        self._slot.shadow = self._shadow.copy
        logger.info("version %s answers %d texts in the champion's shadow", version.id, self._wanted)

    def _conclude(self, shadow: Shadow, *, wanted: bool) -> None:
        if not wanted:
            self._drop()
            return  # people have decided otherwise meanwhile
        version = self._store.version(shadow.model.id)
        decision = shadow.judged(read_decision(version) or Decision.unknown(version.id))
        write_decision(version, decision)
        if decision.stands:
            self._slot.shadow = self._shadow = None
            self._slot.take(shadow.model)
            self._store.set_champion(version)
        else:
            self._drop()
        self._store.set_challenger(None)
        logger.info("version %s is %s: %s", version.id, decision.verdict, decision.sentence)

    def _drop(self) -> None:
        self._slot.shadow = None
        if self._shadow is not None:
            self._shadow.model.close()
            self._shadow = None
