"""One request at a time for the model, a bounded number waiting, the rest sent away at once."""

from collections.abc import Callable
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

from tuneserve.errors import OverloadedError

Result = TypeVar("Result")


class Turns:
    """Runs blocking work on a thread, first come first served."""

    def __init__(self, *, max_waiting: int) -> None:
        self.waiting = 0
        self._max_waiting = max_waiting
        self._limiter = CapacityLimiter(1)

    async def run(self, work: Callable[[], Result]) -> Result:
        """Wait for a turn and return what `work` returns.

        Raises:
            OverloadedError: too many wait already.
        """
        if self.waiting >= self._max_waiting:
            raise OverloadedError(f"{self.waiting} requests are waiting; try again shortly.")
        self.waiting += 1
        try:
            return await to_thread.run_sync(work, limiter=self._limiter)
        finally:
            self.waiting -= 1
