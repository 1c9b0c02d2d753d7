"""uvicorn's HTTP protocol with a door: what cannot be answered soon gets its 429 when its headers are there.

An ASGI application is asked in a task of its own, with a scope, a body and a response, which is most of what a small
request costs. A refusal needs none of it.
"""

import asyncio
import json
import time
from functools import partial
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from tuneserve.errors import OverloadedError
from tuneserve.serving.admission import Admission
from tuneserve.serving.middleware import ENGINE_PATHS, Journal, request_id_of

ENGINE_URLS = {path.encode(): path for path in ENGINE_PATHS}
"""As they stand in a request; one that is written otherwise is the middleware's to refuse."""


class Door(HttpToolsProtocol):
    """One connection."""

    def __init__(self, admission: Admission, journal: Journal, **options: Any) -> None:
        super().__init__(**options)
        self._admission, self._journal = admission, journal
        self._refused = False

    def on_headers_complete(self) -> None:
        """Refuse the request, or let uvicorn do with it what it does."""
        path = ENGINE_URLS.get(self.url)
        if path is not None and self._can_answer():
            error = self._admission.refusal(self.parser.get_method().decode("ascii"), path, self.headers)
            if error is not None and not self.parser.should_upgrade():
                self._refuse(error, ENGINE_PATHS[path])
                return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """What belongs to a refused request is read and forgotten."""
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """After a refused request the connection waits for the next, as after any other."""
        if not self._refused:
            super().on_message_complete()
            return
        self._refused = False
        self.on_response_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """The request is answered over HTTP; the log is not the client's to fill."""

    def _can_answer(self) -> bool:
        """Whether an answer may be written now: those before it have theirs, and the client reads them."""
        answered = self.cycle is None or self.cycle.response_complete
        return answered and not self.flow.write_paused and not self.transport.is_closing()

    def _refuse(self, error: OverloadedError, route: str) -> None:
        began = time.perf_counter()
        self._refused = True
        request_id = request_id_of(self.headers)
        body = json.dumps({"detail": str(error)}, ensure_ascii=False, separators=(",", ":")).encode()
        # Who asked whether to send the body is told no: what comes next on this connection could be either.
        keep = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        keep = keep and not self.expect_100_continue
        head = [STATUS_LINE[error.status]]
        head += [b"%b: %b\r\n" % header for header in self.server_state.default_headers]
        head.append(
            b"retry-after: %d\r\ncontent-length: %d\r\ncontent-type: application/json\r\nx-request-id: %b\r\n%b\r\n"
            % (error.retry_after_s, len(body), request_id, b"" if keep else b"connection: close\r\n")
        )
        self.transport.write(b"".join([*head, body]))
        self._journal.note(route, error.status, time.perf_counter() - began, request_id.decode())
        if not keep:
            self.transport.close()


def open_door(admission: Admission, journal: Journal) -> type[asyncio.Protocol]:
    """The class of protocol that uvicorn makes a connection of."""
    return cast("type[asyncio.Protocol]", partial(Door, admission, journal))
