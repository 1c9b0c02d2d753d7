"""What is refused before anything of it is read: a refusal that costs something takes it from what was accepted."""

from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from tuneserve.errors import NoModelError, OverloadedError
from tuneserve.serving.middleware import ENGINE_PATHS, has_key
from tuneserve.serving.problems import problem
from tuneserve.serving.slot import Slot


class Admission:
    """The rule, for whoever meets a request first.

    Args:
        slot: whose model answers.
        key: the API key; whoever does not show it is the API's to refuse.
    """

    def __init__(self, slot: Slot, *, key: bytes) -> None:
        self._slot, self._key = slot, key

    def refusal(self, method: str, path: str, headers: Iterable[tuple[bytes, bytes]]) -> OverloadedError | None:
        """Why the request would not be answered soon; None if it may come in."""
        if path not in ENGINE_PATHS or method != "POST" or self._slot.phase != "ready":
            return None
        try:
            self._slot.model().batcher.require_room()
        except OverloadedError as error:
            return error if not self._key or has_key(headers, self._key) else None
        except NoModelError:  # it has died since
            return None
        return None


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
