"""What is refused before anything of it is read: a refusal that costs something takes it from what was accepted."""

import asyncio
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from tuneserve.errors import NoModelError, OverloadedError
from tuneserve.serving.middleware import ENGINE_PATHS, has_key
from tuneserve.serving.problems import problem
from tuneserve.serving.slot import Slot

BYTES_A_TOKEN = 4
MOST_TOKENS = 64
"""Of a body that has just come, a token is counted for each 4 bytes, which is about right for words, and at most 64:
long texts may be cut, and one for which there is no room after all is refused a little later."""


class Admission:
    """The rule, for whoever meets a request first.

    Args:
        slot: whose model answers.
        key: the API key; whoever does not show it is the API's to refuse.
    """

    def __init__(self, slot: Slot, *, key: bytes) -> None:
        self._slot, self._key = slot, key
        self._coming = 0

    def count(self, num_bytes: int, loop: asyncio.AbstractEventLoop) -> None:
        """Count a body that a task, made just now, will put into the queue: those behind it must not overfill it.

        The task has its turn before the loop looks at another connection, and what is forgotten then waits by itself.
        """
        if not self._coming:
            loop.call_soon(self._forget)
        self._coming += min(num_bytes // BYTES_A_TOKEN, MOST_TOKENS)

    def _forget(self) -> None:
        self._coming = 0

    def drain_s(self) -> float:
        """Seconds until the queue is empty."""
        try:
            return self._slot.model().batcher.drain_s
        except NoModelError:
            return 0.0

    def refusal(self, method: str, path: str, headers: Iterable[tuple[bytes, bytes]]) -> OverloadedError | None:
        """Why the request would not be answered soon; None if it may come in."""
        if path not in ENGINE_PATHS or method != "POST" or self._slot.phase != "ready":
            return None
        try:
            # Not raised: its traceback would hold the caller's frames, and these the error, for the collector to find.
            error = self._slot.model().batcher.refusal(coming=self._coming)
        except NoModelError:  # it has died since
            return None
        return error if error is None or not self._key or has_key(headers, self._key) else None


class Refused:
    """The route of a request that never came to the router, for the figures."""

    def __init__(self, path: str) -> None:
        self.path = path


class AdmissionMiddleware:
    """Keeps the rule under any ASGI server; under this project's own, `Door` has refused most before."""

    def __init__(self, app: ASGIApp, *, admission: Admission) -> None:
        self.app, self.admission = app, admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request pass if it can be answered soon."""
        if scope["type"] == "http":
            error = self.admission.refusal(scope["method"], scope["path"], scope["headers"])
            if error is not None:
                scope["route"] = Refused(ENGINE_PATHS[scope["path"]])
                await problem(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)
