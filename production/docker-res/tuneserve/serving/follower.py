"""Follows the store's champion: loads it beside the one that answers, proves it, and lets the slot change over.

It reads a one-line file a few times a second, which works on every file system, network ones too.
"""

import gc
import logging
import threading
import time
from collections.abc import Callable

from tuneserve.artifact import Version
from tuneserve.errors import NoModelError, StoreError, TuneserveError
from tuneserve.lifecycle.store import Store
from tuneserve.serving.model import Model
from tuneserve.serving.shadow import Shadowing
from tuneserve.serving.slot import Slot

logger = logging.getLogger(__name__)

EVERY_S = 0.2
RETRY_S = 2.0
LONGEST_RETRY_S = 60.0
"""A version that was refused is tried again later: on a network file system its files may come after the pointer."""


class Follower:
    """A thread that keeps the slot at the champion.

    Args:
        store: whose champion is followed.
        slot: that it goes into.
        load: makes a warm model of a version, which has proved itself.
        required: whether it is a failure now if there is nothing to answer with.
        shadowing: of challengers, looked after by the same thread.
    """

    def __init__(
        self,
        store: Store,
        slot: Slot,
        load: Callable[[Version], Model],
        *,
        required: Callable[[], bool] = lambda: True,
        shadowing: Shadowing | None = None,
    ) -> None:
        self._shadowing = shadowing
        self._store, self._slot, self._load, self._required = store, slot, load, required
        self._refused, self._again_at, self._pause_s = "", 0.0, RETRY_S
        self._complaint = ""
        self._said: dict[str, str] = {}
        self.filled = threading.Event()
        """Set when it is known whether the store held anything at the start that can answer."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow-champion", daemon=True)

    def start(self) -> None:
        """Load what is there, and follow from then on."""
        self._thread.start()

    def close(self, *, wait_s: float | None = None) -> bool:
        """Stop following; whether that has ended, for a model that is just being loaded is waited for so long only."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(wait_s)
        self.filled.set()
        if self._thread.is_alive():
            return False
        if self._shadowing is not None:
            self._shadowing.close()
        return True

    def _follow(self) -> None:
        done = self._attempt("the store cannot be looked through", self._fill)
        self.filled.set()
        while not self._ended.wait(EVERY_S) and self._slot.phase != "failed":
            if not done:
                done = self._attempt("the store cannot be looked through", self._fill)
                continue
            self._attempt("the champion cannot be looked after", self.look)
            if self._shadowing is not None:
                self._attempt("the challenger cannot be looked after", self._shadowing.look)

    def _attempt(self, words: str, act: Callable[[], None]) -> bool:
        """Do it; whatever is raised, the next time may go better, and the model that answers goes on.

        What nobody foresaw makes health red until that goes well again; either is logged once.
        """
        try:
            act()
        except Exception as error:
            known = isinstance(error, TuneserveError)
            if self._said.get(words) != repr(error):
                self._said[words] = repr(error)
                logger.error("%s: %s", words, error, exc_info=None if known else error)
            self._slot.trouble = self._slot.trouble if known else words
            return False
        self._said.pop(words, None)
        if self._slot.trouble == words:
            self._slot.trouble = ""
            logger.info("no longer so: %s", words)
        return True

    def _fill(self) -> None:
        """The first model: the champion or, if it cannot answer, the last one that could."""
        champion, failure = None, None
        try:
            champion = self._store.champion_id()
            failure = self._take(champion) if champion is not None else None
        except StoreError as error:
            self._complain(error)
            failure = error
        if failure is not None:
            for version in self._store.last_good():
                if version.id != champion and self._take(version.id) is None:
                    logger.warning("version %s answers instead of the champion", version.id)
                    return
        if self._slot.empty and self._required():
            self._slot.fail(
                failure or NoModelError(f"There is no model in MODEL_PATH={self._store.root} that can be served.")
            )

    def look(self) -> None:
        """Change over if the pointer names another version than the one that answers."""
        try:
            champion = self._store.champion_id()
        except StoreError as error:
            self._complain(error)
            return
        self._complaint = ""
        if champion is None or champion == self._slot.version_id:
            self._refused = ""
            return
        if champion == self._refused and time.monotonic() < self._again_at:
            return
        failure = self._take(champion)
        if failure is not None and self._slot.empty and self._required():
            self._slot.fail(failure)

    def _take(self, name: str) -> Exception | None:
        """Let this version answer; what speaks against it is logged once, counted and returned."""
        if self._slot.bring_back(name):
            return None
        if self._slot.empty:
            self._slot.phase = "loading"
        try:
            model = self._load(self._store.version(name))
        except Exception as error:  # whatever it is, the model that answers must go on
            if self._slot.empty:
                self._slot.phase = "empty"
            self._slot.metrics.swaps.labels("refused").inc()
            if name != self._refused:
                self._refused, self._pause_s = name, RETRY_S
                known = isinstance(error, TuneserveError)
                logger.error("version %s cannot serve: %s", name, error, exc_info=None if known else error)
            self._again_at = time.monotonic() + self._pause_s
            self._pause_s = min(LONGEST_RETRY_S, 2 * self._pause_s)
            return error
        self._refused = ""
        set_aside()
        self._slot.take(model)
        return None

    def _complain(self, error: StoreError) -> None:
        if str(error) != self._complaint:
            self._complaint = str(error)
            logger.error("%s", error)


def set_aside() -> None:
    """Let the garbage collector look at what was loaded for the last time.

    Otherwise it goes through the libraries' and the model's objects again after every few hundred requests, tens of
    milliseconds in which nothing else runs.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
