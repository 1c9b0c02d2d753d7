"""The record of every request: its id, its figures in the metrics, and a line in the log where that is wanted."""

import logging
import os
from collections.abc import Iterable, Iterator

from prometheus_client import Counter, Histogram

from tuneserve.errors import OverloadedError
from tuneserve.serving.metrics import Metrics

logger = logging.getLogger(__name__)

NO_ROUTE = "(none)"
"""The route of a request that came to none."""

REQUEST_ID = b"x-request-id"
MAX_ID_BYTES = 128
ID_BYTES = 16

Headers = Iterable[tuple[bytes, bytes]]
"""Names in lower case, and values."""


class RequestLog:
    """Counts and times every answer by its route and status, and logs it if that is wanted."""

    def __init__(self, metrics: Metrics, *, logs: bool = False) -> None:
        self._metrics, self._logs = metrics, logs
        self._figures: dict[tuple[str, int], tuple[Counter, Histogram]] = {}

    def note(self, route: str, status: int, seconds: float, request_id: str, *, timed: bool = True) -> None:
        """Note an answer. A 429 is counted and not timed: it would hide how long answers take."""
        count, time_taken = self._figures.get((route, status)) or self._find(route, status)
        count.inc()
        if timed and status != OverloadedError.status:
            time_taken.observe(seconds)
        if self._logs:
            shown = {"route": route, "status": status, "ms": round(seconds * 1000, 1), "id": request_id}
            logger.info("%(route)s %(status)d %(ms).1f ms %(id)s", shown, extra={"request": shown})

    def _find(self, route: str, status: int) -> tuple[Counter, Histogram]:
        """Looked up once: finding a figure by its labels costs more than counting."""
        found = self._metrics.requests.labels(route, str(status)), self._metrics.seconds.labels(route)
        self._figures[route, status] = found
        return found


def request_id_of(headers: Headers) -> bytes:
    """The id that the client gave its request, or a new one that nobody can guess."""
    sent = next((value for name, value in headers if name == REQUEST_ID), b"")
    return sent if 0 < len(sent) <= MAX_ID_BYTES and sent.isascii() else next(_new_ids)


def _make_ids() -> Iterator[bytes]:
    """Each call of `os.urandom` gives up the interpreter, so one call serves for many ids."""
    while True:
        block = os.urandom(256 * ID_BYTES)
        for begin in range(0, len(block), ID_BYTES):
            yield block[begin : begin + ID_BYTES].hex().encode()


_new_ids = _make_ids()
