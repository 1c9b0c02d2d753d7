"""Classifiers that share a body: each is a head of its own on an encoder that is there once.

Versions that were trained with TRAIN_BODY=0 on one base model have the same body, and their metadata name it by a hash.
What a head reads of a text comes from the body's one queue, in whose batches texts for all heads go together; its
logits are a product or two in NumPy. To load a head its own files are read and checked, and no other.
"""

import logging
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from tuneserve.artifact import GOLDEN, HEAD, Version, require_whole
from tuneserve.errors import NoModelError, StoreError
from tuneserve.network.numpy_head import NumpyHead
from tuneserve.serving.engines.choice import ENGINES
from tuneserve.serving.model import Answers, wait_for
from tuneserve.settings import Settings
from tuneserve.tasks.body import Body, Reading
from tuneserve.tasks.classifier import Classifier

logger = logging.getLogger(__name__)

FILES = (HEAD, GOLDEN)
"""What is read of a version whose body is there already; besides its metadata."""

MOST_KNOWN = 64
"""Golden texts of which a body keeps the states: all versions of one release have the same."""

Key = tuple[Any, ...]


class SharedBody(Body):
    """A body whose outputs are what heads read, float32 [channels] of each window."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.known: dict[str, Reading] = {}
        """What it found of golden texts."""


class Head(Classifier):
    """A classifier on a body that is others' too."""

    def __init__(self, version: Version, body: SharedBody, head: NumpyHead) -> None:
        self._states, self._head = body, head
        super().__init__(version, body)

    @property
    def small(self) -> bool:
        """See `Model`: the last head's end is its body's."""
        return not self.body.closed

    def warm_up(self) -> None:
        """The body is warm, and its engine is the queue's thread's."""

    def conclude(self, found: Sequence[Reading]) -> Answers:
        """See `Encoder`; the logits of all windows are one product."""
        states = [one for _, outcomes in found for one in outcomes if isinstance(one, np.ndarray)]
        logits = iter(self._head(np.stack(states)) if states else ())
        return super().conclude(
            [
                (reading, [next(logits) if isinstance(one, np.ndarray) else one for one in outcomes])
                for reading, outcomes in found
            ]
        )

    def answers_to(self, golden_texts: Sequence[str]) -> Answers:
        """See `Classifier`; the body reads a golden text once for all its heads."""
        known = self._states.known
        found = dict(known)
        if new := [text for text in golden_texts if text not in known]:
            found |= zip(new, wait_for(self.body.ask(new, max_windows=1)), strict=True)
            good = {one: found[one] for one in new if all(isinstance(of, np.ndarray) for of in found[one][1])}
            if len(known) + len(good) <= MOST_KNOWN:
                known.update(good)
        return self.conclude([found[text] for text in golden_texts])


class Bodies:
    """The bodies that are loaded, and the way to a head on one of them; safe to use from any thread.

    Args:
        settings: of the server.
        threads: CPU threads to compute with.
    """

    def __init__(self, settings: Settings, *, threads: int) -> None:
        self._settings, self._threads = settings, threads
        self._loaded = WeakValueDictionary[Key, SharedBody]()  # each is held by its heads
        self._turns: dict[Key, threading.Lock] = {}
        self._change = threading.Lock()

    def size(self, version: Version) -> int | None:
        """Bytes of the files that will be read of a version whose body is there already; None if it is not."""
        key = self._key(version)
        body = self._loaded.get(key) if key is not None else None
        if body is None or not body.usable:
            return None
        return _size(version)

    def open(self, version: Version) -> Head | None:
        """A version as a head on its body, which is loaded with the first one; None if it has to be loaded alone.

        Raises:
            StoreError: its files are damaged, or it does not answer as it did when it was saved.
            DeviceError: the device asked for cannot be had.
        """
        key = self._key(version)
        if key is None:
            return None
        with self._change:
            turn = self._turns.setdefault(key, threading.Lock())
        require_whole(version, FILES)
        head = NumpyHead.read(version.folder / HEAD)
        with turn:
            model = self._join(key, version, head)
        try:
            if model is not None:
                model.prove()
        except BaseException:
            assert model is not None
            model.close()
            raise
        return model

    def _join(self, key: Key, version: Version, head: NumpyHead) -> Head | None:
        body = self._loaded.get(key)
        if body is not None:
            with suppress(NoModelError):  # its last head has just left, or its engine has died
                model = Head(version, body, head)
                model.bytes = _size(version)
                return model
        body = self._load(version)
        if body is None:
            return None
        self._loaded[key] = body
        return Head(version, body, head)

    def _key(self, version: Version) -> Key | None:
        """What versions have in common that may share a body; None if this one shares none.

        The int8 graph is a version's own, for its own texts have decided on its ranges.
        """
        name = (version.metadata.get("body") or {}).get("sha256")
        hashes = version.metadata.get("sha256") or {}
        if name is None or self._settings.precision == "int8" or not {*FILES, "tokenizer.json"} <= set(hashes):
            return None
        engine = version.metadata.get("engine") or {}
        formats = tuple(engine.get("formats") or ())  # number formats that cost this version's own texts nothing
        return name, hashes["tokenizer.json"], version.max_tokens, engine.get("layout"), formats

    def _load(self, version: Version) -> SharedBody | None:
        """The body out of this version's files, warm."""
        require_whole(version)
        for choice in ENGINES:
            engine = (
                None if choice.optional else choice.load(version, self._settings, threads=self._threads, states=True)
            )
            if engine is None:
                continue
            engine.warm_up()
            options: dict[str, Any] = {
                "max_tokens": version.max_tokens,
                "long_text": self._settings.long_text,
                "max_queue_tokens": self._settings.max_queue_tokens,
            }
            try:
                body = SharedBody(version.folder, engine, **options)
            except Exception as error:  # the tokenizers' library has no exception of its own for a damaged file
                raise StoreError(f"The tokenizer in {version.folder} cannot be loaded: {error}") from error
            logger.info("a body is loaded, which all versions with the same will share")
            return body
        return None


def _size(version: Version) -> int:
    """Bytes of the files of a head."""
    return sum(path.stat().st_size for name in FILES if (path := version.folder / name).is_file())
