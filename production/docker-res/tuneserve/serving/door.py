"""uvicorn's HTTP protocol with a door: what cannot be answered soon gets its 429 when its headers are there.

An ASGI application is asked in a task of its own, with a scope, a body and a response, which is most of what a small
request costs. A refusal needs none of it. The door also bounds what uvicorn waits for and reads without end: headers
that do not come, bodies that nobody reads, and bodies that are not there when the server leaves.
"""

import asyncio
import json
import time
from functools import partial
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from tuneserve.errors import LeavingError, OverloadedError, TuneserveError
from tuneserve.serving.admission import Admission
from tuneserve.serving.middleware import ENGINE_PATHS, RETRY_AFTER_S, Journal, request_id_of

ENGINE_URLS = {path.encode(): path for path in ENGINE_PATHS}
"""As they stand in a request; one that is written otherwise is the middleware's to refuse."""

UNREAD_BYTES = 16 << 20
"""Of a body whose request has its answer, as many are read for the sake of the connection; then it is closed."""

BODY_S = 2.0
"""Seconds that a body may take once the server is to leave."""


class Parser(httptools.HttpRequestParser):
    """httptools' parser, which takes no body of a request that offers another protocol: it keeps what follows the head.

    Java's client and `curl --http2` always make that offer.
    """

    def __init__(self, door: "Door") -> None:
        super().__init__(door)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self.untaken: bytes | None = None

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]
        """See httptools."""
        try:
            super().feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self.untaken = data[upgrade.args[0] :]


class Door(HttpToolsProtocol):
    """One connection.

    Args:
        admission: the rule for what is refused.
        journal: told of refusals.
        head_s: seconds that a request's headers may take.
        options: uvicorn's.
    """

    def __init__(self, admission: Admission, journal: Journal, head_s: float, **options: Any) -> None:
        super().__init__(**options)
        self.parser: Parser = Parser(self)
        self._admission, self._journal, self._head_s = admission, journal, head_s
        self._refused = self._in_head = self._upgrading = False
        self._unread_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first headers."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        self._head_is_there()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read it; headers that have only begun must go on. An offer of another protocol is passed over."""
        super().data_received(data)
        while (untaken := self.parser.untaken) is not None:
            data = self._head_without_upgrade() + untaken
            self.parser = Parser(self)
            super().data_received(data)
        if self._in_head:
            self._expect_head()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_head, self._unread_bytes = True, 0

    def on_headers_complete(self) -> None:
        """Refuse the request, or let uvicorn do with it what it does."""
        self._head_is_there()
        method = self.parser.get_method().decode("ascii")
        self._upgrading = self.parser.should_upgrade() and method != "CONNECT"
        if self._upgrading:
            return
        path = ENGINE_URLS.get(self.url)
        if path is not None and self._can_answer():
            error = self._admission.refusal(method, path, self.headers)
            if error is not None:
                self._refuse(error, ENGINE_PATHS[path])
                return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """What belongs to a request that has its answer is read and forgotten, up to a limit."""
        if self._refused or self.cycle.response_complete:
            self._unread_bytes += len(body)
            if self._unread_bytes > UNREAD_BYTES:
                self.transport.close()
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """After a refused request the connection waits for the next, as after any other."""
        if self._refused:
            self._refused = False
            self.on_response_complete()
        elif not self._upgrading:
            super().on_message_complete()

    def shutdown(self) -> None:
        """The server is to leave: answer what is under way, but wait for no body that does not come."""
        super().shutdown()
        if self._body_is_missing():
            self.loop.call_later(BODY_S, self._give_up)

    def _head_without_upgrade(self) -> bytes:
        """The head of the request that offered another protocol, without the offer; nothing of one for a tunnel."""
        if not self._upgrading:
            return b""
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        for name, value in self.headers:
            if name == b"connection":
                value = b",".join(one for one in value.split(b",") if one.strip().lower() != b"upgrade")
            if name != b"upgrade" and value:
                lines.append(b"%b: %b" % (name, value))
        return b"\r\n".join([*lines, b"", b""])

    def _give_up(self) -> None:
        if self._body_is_missing() and not self.transport.is_closing():
            self._write(LeavingError(), RETRY_AFTER_S, request_id_of(self.headers), keep=False)

    def _body_is_missing(self) -> bool:
        return self.cycle is not None and self.cycle.more_body and not self.cycle.response_complete

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._head_s, self.transport.close)

    def _head_is_there(self) -> None:
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _can_answer(self) -> bool:
        """Whether an answer may be written now: those before it have theirs, and the client reads them."""
        answered = self.cycle is None or self.cycle.response_complete
        return answered and not self.flow.write_paused and not self.transport.is_closing()

    def _refuse(self, error: OverloadedError, route: str) -> None:
        began = time.perf_counter()
        self._refused = True
        request_id = request_id_of(self.headers)
        # Who asked whether to send the body is told no: what comes next on this connection could be either.
        keep = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        self._write(error, error.retry_after_s, request_id, keep=keep and not self.expect_100_continue)
        self._journal.note(route, error.status, time.perf_counter() - began, request_id.decode())

    def _write(self, error: TuneserveError, retry_after_s: int, request_id: bytes, *, keep: bool) -> None:
        body = json.dumps({"detail": str(error)}, ensure_ascii=False, separators=(",", ":")).encode()
        head = [STATUS_LINE[error.status]]
        head += [b"%b: %b\r\n" % header for header in self.server_state.default_headers]
        head.append(
            b"retry-after: %d\r\ncontent-length: %d\r\ncontent-type: application/json\r\nx-request-id: %b\r\n%b\r\n"
            % (retry_after_s, len(body), request_id, b"" if keep else b"connection: close\r\n")
        )
        self.transport.write(b"".join([*head, body]))
        if not keep:
            self.transport.close()


def open_door(admission: Admission, journal: Journal, *, head_s: float) -> type[asyncio.Protocol]:
    """The class of protocol that uvicorn makes a connection of; for the arguments see `Door`."""
    return cast("type[asyncio.Protocol]", partial(Door, admission, journal, head_s))
