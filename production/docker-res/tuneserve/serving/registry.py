"""Named models that come and go while the server runs: loaded, held by requests, unloaded, evicted for memory.

All that happens to a name is here, under one lock, which makes the module a little long.
"""

import asyncio
import gc
import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuneserve.errors import (
    ConflictError,
    InvalidRequestError,
    LeavingError,
    NoModelError,
    NotFoundError,
    OutOfMemoryError,
    StoreError,
    TuneserveError,
)
from tuneserve.hardware import give_memory_back, memory_used
from tuneserve.logs import in_one_line
from tuneserve.serving.metrics import Metrics, ModelFigures
from tuneserve.serving.model import Model
from tuneserve.serving.slot import Slot

logger = logging.getLogger(__name__)

LOADS = 2
"""Models that are loaded at a time."""

PATIENCE_S = 10.0
"""Seconds that a load waits for memory while requests keep what could be unloaded."""

LAST_LOADS, OUTLIERS = 8, 2
"""Loads of which is known what they took beyond the size of their files, and those among them that took most."""

AGAIN_S = 5.0
"""Seconds for which a model that could not be loaded on first use is refused without another try."""


@dataclass(eq=False)
class Entry:
    """A model by its name: being loaded while it has no slot, leaving once it has `gone`."""

    name: str
    folder: Path
    loaded: "Future[None]" = field(default_factory=Future)
    slot: Slot | None = None
    gone: "Future[None] | None" = None
    users: int = 0
    """Requests that wait for it."""
    hits: int = 0
    bytes: int = 0
    """Of its files."""
    reserved: int = 0
    """Bytes of memory that its load may still take."""
    opening: bool = False

    @property
    def state(self) -> str:
        """In a word."""
        return "unloading" if self.gone is not None else "loading" if self.slot is None else "loaded"


class Registry:
    """Loads, holds and unloads models by name; safe to call from any thread.

    Args:
        open_model: makes a warm model of a folder that `prepare` has returned, and of its name; the seam behind which
            all kinds of models are.
        prepare: makes a folder, or what else `load` is given, one that can be opened: unpacks, converts.
        size: bytes that a folder which `prepare` has returned will take, as far as its files tell.
        find: of a name, what to load on first use; None: a model is there only if `load` was called.
        metrics: of the server.
        limit: bytes that the process and its children may take; 0 for no limit.
        headroom: bytes of them that are left free for what requests take, where there is a choice.
        used: measures how many they take now.
        pinned: names of models that are not evicted.
        evicts: whether the least recently used models are unloaded for want of memory; else that is an error.
        patience_s: see PATIENCE_S.
    """

    def __init__(
        self,
        open_model: Callable[[Path, str], Model],
        *,
        prepare: Callable[[Path], Path] = lambda folder: folder,
        size: Callable[[Path], int] | None = None,
        find: Callable[[str], Path] | None = None,
        metrics: Metrics | None = None,
        limit: int = 0,
        headroom: int = 0,
        used: Callable[[], int] = memory_used,
        pinned: Collection[str] = (),
        evicts: bool = True,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.metrics, self.limit, self.used, self.pinned = metrics or Metrics(), limit, used, frozenset(pinned)
        self.figures = ModelFigures(self.metrics)
        self._open, self._prepare, self._find, self._size = open_model, prepare, find, size or size_of
        self._evicts, self._patience_s = evicts, patience_s
        self._entries: OrderedDict[str, Entry] = OrderedDict()  # the least recently used first
        self._failures: dict[str, tuple[float, Exception]] = {}
        self._changed = threading.Condition()
        self._making_room = threading.Lock()
        self._empty, self._closed, self._headroom = used(), False, headroom
        self._beyond: dict[int, deque[int]] = {}  # by the bits of the files' size
        self._awaited = self.pinned
        self.evicted = 0
        """Models that were unloaded for want of memory."""
        self._loads = ThreadPoolExecutor(LOADS, "load-model")
        self._unloads = ThreadPoolExecutor(LOADS, "unload-model")
        gc.freeze()  # what is there already is no model's: at an unload the collector need not look at it, for seconds

    def load(self, name: str, folder: Path) -> "Future[None]":
        """Begin to load a model; if one of this name is just leaving, after that.

        Raises:
            ConflictError: there is a model of this name, or it is being loaded.
            LeavingError: the server is about to end.
        """
        with self._changed:
            before = self._entries.get(name)
            if before is not None and before.gone is None:
                raise ConflictError(f"The model {name!r} is {before.state} already.")
            if self._closed:
                raise LeavingError
            entry = self._entries[name] = Entry(name, folder)
            self._entries.move_to_end(name)
            if before is None or before.gone is None:
                self._loads.submit(self._load, entry)
            else:
                before.gone.add_done_callback(lambda _: self._loads.submit(self._load, entry))
        return entry.loaded

    def unload(self, name: str) -> "Future[None]":
        """Let no new request reach a model; it is closed and its memory given back after the last that is in flight.

        Raises:
            NotFoundError: there is none of this name.
        """
        with self._changed:
            entry = self._entries.get(name)
            if entry is None or entry.gone is not None:
                raise NotFoundError(f"There is no model {name!r} here.")
            return self._leave(entry)

    def entry(self, name: str) -> Entry:
        """What is loaded or about to be under this name.

        Raises:
            NotFoundError: nothing is.
        """
        with self._changed:
            entry = self._entries.get(name)
        if entry is None and self._find is not None:
            entry = self._entries.get(self._find(name).name)
        if entry is None or entry.gone is not None:
            raise NotFoundError(f"The model {name[:200]!r} is not loaded.")
        return entry

    def locate(self, name: str, url: str = "") -> tuple[str, Path]:
        """The name by which a model is kept, and where it is: where the request says, or where its name does.

        Raises:
            NotFoundError: nothing of this name can be found.
            InvalidRequestError: the request does not say, or says what is not its to say.
        """
        if self._find is None:
            if not Path(url).is_absolute():
                raise InvalidRequestError("`url` should be the absolute path of the folder that holds the model.")
            return name, Path(url)
        path = self._find(name)
        if url and Path(url) != path:
            raise InvalidRequestError(f"`url` may be left out here: models are in MODELS, {name!r} among them.")
        return path.name, path

    def entries(self) -> list[Entry]:
        """What is loaded or about to be, by name."""
        with self._changed:
            return sorted((one for one in self._entries.values() if one.gone is None), key=lambda one: one.name)

    def awaited(self) -> list[str]:
        """The pinned models that have not been loaded yet, by name; one that is unloaded later is not waited for."""
        return sorted(self._awaited)

    @asynccontextmanager
    async def hold(self, name: str, timeout_s: float = math.inf) -> AsyncIterator[Slot]:
        """The model's slot, which stays while the block runs; it is loaded first, if that is asked for by name.

        Raises:
            NotFoundError: there is none of this name.
            NoModelError: it is still being loaded after so many seconds.
            OutOfMemoryError: there is not enough memory to load it.
            TuneserveError: it cannot be loaded.
        """
        deadline = time.monotonic() + timeout_s
        hit = True
        while isinstance(entry := self._take(name), Future):
            hit = False
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic()) if deadline < math.inf else None):
                    await asyncio.shield(asyncio.wrap_future(entry))
            except TimeoutError:
                raise NoModelError(f"The model {name!r} is still being loaded.") from None
            except NotFoundError:
                if self._find is None:
                    raise
                # Somebody had it unloaded while it was being loaded; what is loaded on first use is loaded again.
        try:
            if hit:
                self.figures.hits.inc()
            assert entry.slot is not None
            yield entry.slot
        finally:
            self._release(entry)

    def close(self, *, wait_s: float) -> bool:
        """Unload all and load nothing more; False if a load has not ended after so many seconds."""
        with self._changed:
            self._closed = True
            entries = list(self._entries.values())
            leaving = [one.gone or self._leave(one) for one in entries]
        ended = all(_ends(one.loaded, wait_s) for one in entries) and all(_ends(one, wait_s) for one in leaving)
        for executor in (self._loads, self._unloads) if ended else ():
            executor.shutdown()
        gc.unfreeze()
        return ended

    def _take(self, name: str) -> "Entry | Future[None]":
        """The model, for one request more; or what must come to an end before there is one."""
        with self._changed:
            entry = self._entries.get(name)
        path = self._find(name) if self._find is not None and (entry is None or entry.gone is not None) else None
        name = name if path is None else path.name  # an archive may be named without the end of its name
        with self._changed:
            entry = self._entries.get(name)
            if entry is not None and entry.gone is None:
                if entry.slot is None:
                    return entry.loaded
                entry.users, entry.hits = entry.users + 1, entry.hits + 1
                self._entries.move_to_end(name)
                return entry
            if path is None:
                raise NotFoundError(f"There is no model {name!r} here.")
            until, error = self._failures.get(name, (0.0, None))
            if error is not None and time.monotonic() < until:
                raise error.with_traceback(None)
            return self.load(name, path)

    def _release(self, entry: Entry) -> None:
        with self._changed:
            entry.users -= 1
            if not entry.users:
                if entry.gone is not None:
                    with suppress(RuntimeError):  # the process ends
                        self._unloads.submit(self._close, entry)
                self._changed.notify_all()

    def _leave(self, entry: Entry) -> "Future[None]":
        entry.gone = Future()
        if entry.slot is not None and not entry.users:
            self._unloads.submit(self._close, entry)
        return entry.gone

    def _load(self, entry: Entry) -> None:
        error: Exception | None = None
        try:
            if self._closed:
                raise LeavingError
            folder = self._prepare(entry.folder)
            entry.bytes = self._size(folder)
            before = self._reserve(entry)
            slot = Slot(metrics=self.metrics)
            slot.on_failure = lambda: self._lose(entry)
            model = self._open(folder, entry.name)
            entry.bytes = entry.bytes if model.bytes is None else model.bytes
            slot.take(model)
            if self.limit and not slot.small:
                self._keep_limit(entry, slot, self._learn(entry, before))
        except Exception as caught:  # whatever it is, the other models go on
            error = caught
            if not isinstance(caught, TuneserveError):
                logger.error("model %r cannot be loaded", entry.name, exc_info=caught)
                error = StoreError(f"The model {entry.name!r} cannot be loaded: {in_one_line(caught)}")
            # What failed is kept for a while, and with its frames whatever they hold.
            error.__traceback__ = error.__cause__ = error.__context__ = None
        with self._changed:
            entry.reserved, entry.opening = 0, False
            if error is None:
                entry.slot = slot
            self._note(entry, error)
            self._changed.notify_all()
            if entry.gone is not None:
                self._unloads.submit(self._close, entry)
                error = error or NotFoundError(f"The model {entry.name!r} was unloaded while it was being loaded.")
        entry.loaded.set_exception(error) if error is not None else entry.loaded.set_result(None)

    def _note(self, entry: Entry, error: Exception | None) -> None:
        self.figures.loads.labels("refused" if error is not None else "loaded").inc()
        self._failures.pop(entry.name, None)
        if error is None:
            self._awaited -= {entry.name}
            logger.info("model %r is loaded from %s", entry.name, entry.folder)
        else:
            logger.error("model %r cannot be loaded: %s", entry.name, error)
            if not isinstance(error, OutOfMemoryError):
                self._failures[entry.name] = time.monotonic() + AGAIN_S, error
            if entry.gone is None:
                del self._entries[entry.name]
        self._show()

    def _close(self, entry: Entry) -> None:
        slot, entry.slot = entry.slot, None
        try:
            if slot is not None:
                slot.close()
        except Exception:
            logger.exception("model %r did not end as it should", entry.name)
        slot, small = None, slot is not None and slot.small
        if not small:  # to look for cycles takes the longer the more models there are
            gc.collect()
        give_memory_back()
        with self._changed:
            if self._entries.get(entry.name) is entry:
                del self._entries[entry.name]
            self._show()
            self._changed.notify_all()
        logger.info("model %r is unloaded", entry.name)
        assert entry.gone is not None
        entry.gone.set_result(None)

    def _lose(self, entry: Entry) -> None:
        """Unload a model that has died; asked for again it is loaded again."""
        with self._changed:
            if entry.gone is None:
                self._leave(entry)

    def _show(self) -> None:
        self.figures.loaded.set(sum(one.slot is not None for one in self._entries.values()))

    def _reserve(self, entry: Entry) -> int:
        """Make room for what a load may need, and return the bytes that are used before it.

        Raises:
            OutOfMemoryError: there is not enough, and nothing more can be unloaded.
        """
        with self._making_room:
            needs = self._needs(entry) if self.limit else 0
            before = self._make_room(entry, needs) if self.limit else 0
            with self._changed:
                entry.reserved, entry.opening = needs, True
        return before

    def _needs(self, entry: Entry) -> int:
        """Bytes of memory that a load may take: of its files, and what others of about this size took beyond theirs.

        Of the last loads the largest few do not count: what is set up once, for all models, is set up in one of them.
        """
        size = entry.bytes.bit_length()
        beyond = [
            sorted(self._beyond[one])[-OUTLIERS - 1 :][0] for one in (size - 1, size, size + 1) if one in self._beyond
        ]
        return entry.bytes + max(beyond, default=0)

    def _learn(self, entry: Entry, before: int) -> int:
        """Keep what a load took, while nothing of it has been given back, and return the bytes that are used.

        What other loads took meanwhile is a margin.
        """
        used = self.used()
        beyond = max(0, used - before - entry.bytes)
        with self._changed:
            self._beyond.setdefault(entry.bytes.bit_length(), deque(maxlen=LAST_LOADS)).append(beyond)
            entry.reserved = 0
        return used

    def _make_room(self, entry: Entry, needs: int) -> int:
        """Unload what must go, and return the bytes that are used then.

        Raises:
            OutOfMemoryError: there is not enough, and nothing more can be unloaded.
        """
        until = time.monotonic() + self._patience_s
        trimmed = False
        while True:
            used = self.used()
            gone = None
            with self._changed:
                taken = used + sum(one.reserved for one in self._entries.values())
                if taken + needs + self._headroom <= self.limit:
                    return used
                if trimmed:
                    others, opens = self._others(entry), any(one.opening for one in self._entries.values())
                    stay = sum(one.bytes for one in self._entries.values() if one.name in self.pinned)
                    if not others and not opens and taken + entry.bytes <= self.limit:
                        return used  # it is alone: what others have taken is no reason not to try
                    if not self._evicts or not (others or opens) or self._empty + stay + entry.bytes > self.limit:
                        raise self._out_of_memory(entry, taken)
                    gone = self._evict_one(others, entry, until)
            if gone is not None:
                gone.result()
            elif not trimmed:  # what was freed is given back before a model has to go
                trimmed = True
                give_memory_back()

    def _keep_limit(self, entry: Entry, slot: Slot, used: int) -> None:
        """Unload others if a model has taken more than it should have needed, or else itself.

        Raises:
            OutOfMemoryError: it has been closed.
        """
        if used + self._headroom <= self.limit:
            return
        give_memory_back()
        until = time.monotonic() + self._patience_s
        while (used := self.used()) + self._headroom > self.limit:
            gone = None
            with self._changed:
                others = self._others(entry)
                if self._evicts and others:
                    try:
                        gone = self._evict_one(others, entry, until)
                    except OutOfMemoryError:
                        return  # they are in use, and the next load will find them
                elif used <= self.limit:
                    return
            if gone is not None:
                gone.result()
            elif not (self._evicts and others):
                slot.close()
                raise self._out_of_memory(entry, used)

    def _others(self, entry: Entry) -> list[Entry]:
        """What may be unloaded for a model, the least recently used first."""
        pinned, entries = self.pinned, self._entries.values()
        return [one for one in entries if one.slot is not None and one.name not in pinned and one is not entry]

    def _evict_one(self, others: list[Entry], entry: Entry, until: float) -> "Future[None] | None":
        """Begin to unload the first of these that is idle; None if none was, and something has changed since.

        Raises:
            OutOfMemoryError: nothing has changed until then.
        """
        idle = next((one for one in others if one.gone is None and not one.users), None)
        if idle is None:
            if not self._changed.wait(max(0.0, until - time.monotonic())):
                raise OutOfMemoryError("All models are in use, and the memory does not suffice for one more.")
            return None
        logger.info("model %r is evicted for %r", idle.name, entry.name)
        self.evicted += 1
        self.figures.evictions.inc()
        return self._leave(idle)

    def _out_of_memory(self, entry: Entry, taken: int) -> OutOfMemoryError:
        return OutOfMemoryError(
            f"The model {entry.name!r} has files of {entry.bytes >> 20} MiB; {taken >> 20} MiB of the "
            f"{self.limit >> 20} MiB that MEMORY_LIMIT grants are taken."
        )


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _ends(future: "Future[Any]", wait_s: float) -> bool:
    try:
        future.exception(wait_s)
    except TimeoutError:
        return False
    return True
