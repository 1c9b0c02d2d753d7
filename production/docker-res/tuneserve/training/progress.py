"""How far a loop has come: a bar on a terminal, a line now and then in a log."""

import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

LINE_SECONDS = 15.0


class Progress:
    """Counts texts of one pass; shows what it is told (the loss, say), texts/s and the time left."""

    def __init__(self, title: str, *, total: int, done: int = 0) -> None:
        self.title, self.total, self.done = title, total, done
        self._first, self._began = done, time.monotonic()
        self._spoke = self._began
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = tqdm(desc=title, total=total, initial=done, unit="text", dynamic_ncols=True, leave=False)

    def advance(self, texts: int, **shown: float) -> None:
        """Count some texts done; the figures shown are of this moment."""
        self.done += texts
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.4f}" for name, value in shown.items()}, refresh=False)
            self._bar.update(texts)
        elif time.monotonic() - self._spoke >= LINE_SECONDS:
            self._spoke = time.monotonic()
            rate = (self.done - self._first) / (self._spoke - self._began)
            figures = " ".join(f"{name}={value:.4f}" for name, value in shown.items())
            left_s = (self.total - self.done) / rate
            logger.info(
                "%s: %d/%d texts, %.0f/s, %.0f s left %s", self.title, self.done, self.total, rate, left_s, figures
            )

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def counted(items: list[Any], title: str) -> Iterator[Any]:
    """The items one by one, with a bar on a terminal and silence in a log."""
    return iter(tqdm(items, desc=title, leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty()))
