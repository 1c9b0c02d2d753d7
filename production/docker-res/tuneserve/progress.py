"""Progress of a loop: a bar on a terminal, a line every LINE_S seconds in a log."""

import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

LINE_S = 15.0
"""Seconds between two lines where there is no terminal for a bar."""


class Progress:
    """Counts finished items; shows figures (the loss, say), the rate and the time left.

    Args:
        title: of the bar and the lines.
        total: number of items; None if only the share that is done is known, which `advance` takes then.
        unit: what an item is, in the singular.
        done: items that were finished before.
    """

    def __init__(self, title: str, *, total: int | None, unit: str = "text", done: int = 0) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self._first, self._began = done, time.monotonic()
        self._spoke = self._began
        self._bar: Any = None
        if sys.stderr.isatty() and total is None:
            shape = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
            self._bar = tqdm(desc=title, total=1.0, bar_format=shape, dynamic_ncols=True, leave=False)
        elif sys.stderr.isatty():
            self._bar = tqdm(desc=title, total=total, initial=done, unit=unit, dynamic_ncols=True, leave=False)

    def advance(self, count: int, *, share: float = 0.0, **figures: float) -> None:
        """Count some items done.

        Args:
            count: items since the last call.
            share: of the whole that is done, from 0 to 1; used only without a total.
            figures: current values to be shown.
        """
        self.done += count
        now = time.monotonic()
        rate = (self.done - self._first) / max(now - self._began, 1e-9)
        shown = {name: f"{value:.4f}" for name, value in figures.items()}
        if self._bar is not None:
            if self.total is None:
                shown = {f"{self.unit}s": str(self.done), "rate": f"{rate:.0f}/s", **shown}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(count if self.total is not None else share - self._bar.n)
        elif now - self._spoke >= LINE_S:
            self._spoke = now
            if self.total is None:
                state = f"{self.done} {self.unit}s, {rate:.0f}/s, {share:.1%} done"
            else:
                left_s = (self.total - self.done) / max(rate, 1e-9)
                state = f"{self.done}/{self.total} {self.unit}s, {rate:.0f}/s, {left_s:.0f} s left"
            logger.info("%s: %s", self.title, " ".join([state, *(f"{name}={value}" for name, value in shown.items())]))

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def counted(items: list[Any], title: str) -> Iterator[Any]:
    """The items one by one, with a bar on a terminal and nothing in a log."""
    return iter(tqdm(items, desc=title, leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty()))
