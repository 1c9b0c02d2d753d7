"""Named models that come and go while the server runs: loaded, held by requests, unloaded, evicted for memory.

All that happens to a name is here, under one lock, which makes the module a little long.
"""

import asyncio
import gc
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
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

    @property
    def state(self) -> str:
        """In a word."""
        return "unloading" if self.gone is not None else "loading" if self.slot is None else "loaded"


class Registry:
    """Loads, holds and unloads models by name; safe to call from any thread.

    Args:
        open_model: makes a warm model of a folder that `prepare` has returned; the seam behind which all kinds of
            models are.
        prepare: makes a folder, or what else `load` is given, one that can be opened: unpacks, converts.
        find: of a name, what to load on first use; None: a model is there only if `load` was called.
        metrics: of the server.
        limit: bytes that the process and its children may take; 0 for no limit.
        used: measures how many they take now.
        pinned: names of models that are not evicted.
        evicts: whether the least recently used models are unloaded for want of memory; else that is an error.
        patience_s: see PATIENCE_S.
    """

    def __init__(
        self,
        open_model: Callable[[Path], Model],
        *,
        prepare: Callable[[Path], Path] = lambda folder: folder,
        find: Callable[[str], Path] | None = None,
        metrics: Metrics | None = None,
        limit: int = 0,
        used: Callable[[], int] = memory_used,
        pinned: Collection[str] = (),
        evicts: bool = True,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.metrics, self.limit, self.used, self.pinned = metrics or Metrics(), limit, used, frozenset(pinned)
        self.figures = ModelFigures(self.metrics)
        self._open, self._prepare, self._find = open_model, prepare, find
        self._evicts, self._patience_s = evicts, patience_s
        self._entries: OrderedDict[str, Entry] = OrderedDict()  # the least recently used first
        self._failures: dict[str, tuple[float, Exception]] = {}
        self._changed = threading.Condition()
        self._making_room = threading.Lock()
        self._reserved, self._empty, self._closed = 0, used(), False
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
            entry.bytes = size_of(folder)
            with self._room_for(entry):
                slot = Slot(metrics=self.metrics)
                slot.on_failure = lambda: self._lose(entry)
                slot.take(self._open(folder))
        except Exception as caught:  # whatever it is, the other models go on
            error = caught
            if not isinstance(caught, TuneserveError):
                logger.error("model %r cannot be loaded", entry.name, exc_info=caught)
                error = StoreError(f"The model {entry.name!r} cannot be loaded: {in_one_line(caught)}")
            # What failed is kept for a while, and with its frames whatever they hold.
            error.__traceback__ = error.__cause__ = error.__context__ = None
        with self._changed:
            if error is None:
                entry.slot = slot
            self._note(entry, error)
            if entry.gone is not None:
                self._unloads.submit(self._close, entry)
                error = error or NotFoundError(f"The model {entry.name!r} was unloaded while it was being loaded.")
        entry.loaded.set_exception(error) if error is not None else entry.loaded.set_result(None)

    def _note(self, entry: Entry, error: Exception | None) -> None:
        self.figures.loads.labels("refused" if error is not None else "loaded").inc()
        self._failures.pop(entry.name, None)
        if error is None:
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
        slot = None
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

    @contextmanager
    def _room_for(self, entry: Entry) -> Iterator[None]:
        """Let a model be loaded during the block, by the size of its files and the memory measured.

        Raises:
            OutOfMemoryError: there is not enough, and nothing more can be unloaded.
        """
        with self._making_room:
            if self.limit:
                self._make_room(entry)
            with self._changed:
                self._reserved += entry.bytes
        try:
            yield
        finally:
            with self._changed:
                self._reserved -= entry.bytes

    def _make_room(self, entry: Entry) -> None:
        until = time.monotonic() + self._patience_s
        while (taken := self.used() + self._reserved) + entry.bytes > self.limit:
            with self._changed:
                others = [one for one in self._entries.values() if one.slot is not None and one.name not in self.pinned]
                stay = sum(one.bytes for one in self._entries.values() if one.name in self.pinned)
                if not self._evicts or not others or self._empty + stay + entry.bytes > self.limit:
                    raise OutOfMemoryError(
                        f"The model {entry.name!r} has files of {entry.bytes >> 20} MiB; {taken >> 20} MiB of the "
                        f"{self.limit >> 20} MiB that MEMORY_LIMIT grants are taken."
                    )
                idle = next((one for one in others if one.gone is None and not one.users), None)
                if idle is None:
                    if not self._changed.wait(max(0.0, until - time.monotonic())):
                        raise OutOfMemoryError("All models are in use, and the memory does not suffice for one more.")
                    continue
                gone = self._leave(idle)
            logger.info("model %r is evicted for %r", idle.name, entry.name)
            self.evicted += 1
            self.figures.evictions.inc()
            gone.result()


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _ends(future: "Future[Any]", wait_s: float) -> bool:
    try:
        future.exception(wait_s)
    except TimeoutError:
        return False
    return True
