"""uvicorn's HTTP protocol with what it leaves open: bounds on what a connection may send and wait for, other protocols.

Bounded are heads, bodies and answers that nobody reads, and requests that wait behind others of their connection.
httptools takes no body of a request that offers another protocol (`Upgrade: h2c`, as Java's client and `curl --http2`
send with every request), so the head of such a request is read again without the offer.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from tuneserve.errors import HeadersTooLargeError, InvalidRequestError, TuneserveError
from tuneserve.serving.http.problems import problem
from tuneserve.serving.http.request_log import NO_ROUTE, REQUEST_ID, RequestLog, request_id_of

HEAD_BYTES = 64 << 10
"""Most that is read of a request without any of its body: its headers, or what follows a body in chunks."""

MAX_HEADERS = 100
"""Most headers of a request: a short one takes thirty times its bytes once it is read."""

UNREAD_BYTES = 16 << 20
"""Of a body whose request has its answer this much is read for the sake of the connection, which then is closed."""


MAX_PIPELINED = 16
"""Requests that may wait on one connection for the answers before theirs; until then nothing more is read of it."""

SLICE_BYTES = 4 << 10
"""Most that is parsed at a time, so that what was read at once makes few requests more than these."""


class Flow(FlowControl):
    """uvicorn's, which reads a connection on only while it is not `held`."""

    held = False

    def resume_reading(self) -> None:
        """See uvicorn."""
        if not self.held:
            super().resume_reading()


class Parser(httptools.HttpRequestParser):
    """httptools' parser, which ends at a request that offers another protocol; here it keeps what follows the head."""

    def __init__(self, protocol: Any) -> None:
        super().__init__(protocol)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self.rest: bytes | None = None

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]
        """See httptools."""
        try:
            super().feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self.rest = bytes(data[upgrade.args[0] :])


class Protocol(HttpToolsProtocol):
    """One connection.

    Args:
        request_log: told of what is answered here, and not by the application.
        timeout_s: seconds that a head may take, the rest of a body that has its answer, and a client that does not
            read its answers.
        options: uvicorn's.
    """

    def __init__(self, *, request_log: RequestLog, timeout_s: float, **options: Any) -> None:
        super().__init__(**options)
        self.parser: Parser = Parser(self)
        self._request_log, self._timeout_s = request_log, timeout_s
        self._in_message = self._in_head = self._offers = self._broken = self._has_too_many = False
        self._bodiless_bytes = self._unread_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._running: RequestResponseCycle | None = None
        self._unparsed = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first head."""
        super().connection_made(transport)
        self.flow: Flow = Flow(transport)
        self._expect_more()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more. Of pipelined requests uvicorn tells only the last that its client is gone."""
        self._stop_timer()
        self._unparsed = b""
        self.resume_writing()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse it, unless enough requests wait already."""
        if len(data) <= SLICE_BYTES and not self.flow.held:
            self._parse(data)
            if len(self.pipeline) >= MAX_PIPELINED:
                self._hold(True)
        else:
            self._unparsed += data
            self._parse_on()

    def _parse_on(self) -> None:
        """Parse what has been read, as far as requests may wait."""
        unparsed, begin = memoryview(self._unparsed), 0
        while begin < len(unparsed) and len(self.pipeline) < MAX_PIPELINED and not self._is_over():
            self._parse(unparsed[begin : begin + SLICE_BYTES])
            begin += SLICE_BYTES
        self._unparsed = b"" if self._is_over() else bytes(unparsed[begin:])
        self._hold(bool(self._unparsed) or len(self.pipeline) >= MAX_PIPELINED)

    def _hold(self, held: bool) -> None:
        """Read no more of this connection, or go on."""
        if self._is_over():
            return
        if held:
            self.flow.held = True
            self.flow.pause_reading()
            self._stop_timer()  # what is missing may have come
        elif self.flow.held:
            self.flow.held = False
            self.flow.resume_reading()

    def _is_over(self) -> bool:
        return self._broken or self.parser is None or self.transport.is_closing()

    def _parse(self, data: bytes | memoryview) -> None:
        """Parse it, and bound what is not a whole request yet."""
        if self._broken:
            return
        self._bodiless_bytes += len(data)
        super().data_received(data)  # type: ignore[arg-type]
        while self.parser is not None and (rest := self.parser.rest) is not None:
            head = b""  # a tunnel's has been answered
            if self._offers:
                version = self.parser.get_http_version().encode()
                head = head_without_offer(self.parser.get_method(), self.url, version, self.headers)
            self.parser = Parser(self)
            super().data_received(head + rest)
        if not self._in_message:
            self._bodiless_bytes = 0
        elif self._bodiless_bytes > HEAD_BYTES:
            self._end_early(HeadersTooLargeError())
        elif self._in_head or self._is_answered():
            self._expect_more()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_message = self._in_head = True
        self._bodiless_bytes = self._unread_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; what follows a body in chunks is none, or it could bring a key past a proxy."""
        if not self._in_head:
            return
        if len(self.headers) == MAX_HEADERS:  # none may be dropped: the parser stops before the request is handed on
            self._has_too_many = True
            raise HeadersTooLargeError
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Hand the request to the application, unless its head is to be read again."""
        self._in_head = False
        self._stop_timer()
        self._offers = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"
        if not self._offers:
            super().on_headers_complete()
            if self._running is None or self._running.response_complete:
                self._running = self.cycle

    def on_body(self, body: bytes) -> None:
        """Keep it for the application; after the answer it is discarded, up to a limit."""
        self._bodiless_bytes = 0
        if self._is_answered():
            self._unread_bytes += len(body)
            if self._unread_bytes > UNREAD_BYTES:
                self.transport.close()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._in_message = False
        self._stop_timer()
        if not self._offers:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """See uvicorn. Behind a broken request nothing is answered; a body that is still sent must go on coming."""
        if self._broken and (not self.pipeline or self.pipeline[-1][0].more_body):
            self.transport.close()
        if self._running is not None:
            self._running.body = bytearray()  # of which nobody will read what is left
        if self.pipeline:
            self._running = self.pipeline[-1][0]
        super().on_response_complete()
        if self.flow.held:
            self.loop.call_soon(self._parse_on)
        if self._in_message and self._is_answered():
            self._expect_more()

    def pause_writing(self) -> None:
        """Close the connection of a client that reads nothing of its answers."""
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(self._timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """See uvicorn."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def send_400_response(self, msg: str) -> None:
        """What came is not HTTP, or has too many headers. Whole requests before it are answered first."""
        self._end_early(HeadersTooLargeError() if self._has_too_many else InvalidRequestError(msg))

    def _end_early(self, error: TuneserveError) -> None:
        """Answer a request that is not whole and will not be, and close the connection."""
        cycle = self.cycle
        waiting = cycle is not None and not cycle.response_complete
        if waiting and (self.pipeline or not cycle.more_body):
            self._broken = True
            cycle.keep_alive = False
            return
        if self._in_message and not self._in_head and not waiting:  # it has its answer
            self.transport.close()
            return
        request_id = request_id_of(self.headers if self._in_message else ())
        if waiting:  # the application waits for the body, and notes this answer when it is told that nothing comes
            cycle.scope["state"]["status"] = error.status
            cycle.disconnected = True
            cycle.message_event.set()
            request_id = cycle.scope["state"].get("request_id", request_id.decode()).encode()
        else:
            self._request_log.note(NO_ROUTE, error.status, 0.0, request_id.decode())
        response = problem(error, close=True)
        headers = (*self.server_state.default_headers, *response.raw_headers, (REQUEST_ID, request_id))
        head = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.transport.write(STATUS_LINE[error.status] + head + b"\r\n" + bytes(response.body))
        self.transport.close()

    def _is_answered(self) -> bool:
        return self.cycle is not None and self.cycle.response_complete

    def _expect_more(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self._timeout_s, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def head_without_offer(method: bytes, url: bytes, version: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The head of a request as bytes, its header names in lower case, without the offer of another protocol."""
    lines = [b"%b %b HTTP/%b" % (method, url, version)]
    for name, value in headers:
        if name == b"connection":
            value = b",".join(one for one in value.split(b",") if one.strip().lower() != b"upgrade")
        if name != b"upgrade" and value:
            lines.append(b"%b: %b" % (name, value))
    return b"\r\n".join([*lines, b"", b""])
