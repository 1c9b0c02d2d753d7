"""uvicorn's HTTP protocol with a door, which answers the engine's two routes itself.

What an ASGI application puts around a small request was a third of what it cost the event loop. So the door gives the
bodies of these routes to `Inference` and writes its responses. What cannot be answered soon gets its 429 when its
headers are there. All else goes to the application. The door also bounds what uvicorn waits for and reads without end:
headers and bodies that do not come, and bodies that nobody reads.
"""

import asyncio
import socket
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, cast

from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from tuneserve.errors import (
    BodyTimeoutError,
    ClientGoneError,
    HeadersTooLargeError,
    InvalidRequestError,
    LeavingError,
    OverloadedError,
    TuneserveError,
)
from tuneserve.serving.admission import Admission
from tuneserve.serving.glance import Headers, see_whole_request
from tuneserve.serving.inference import Inference
from tuneserve.serving.middleware import ENGINE_PATHS, NO_ROUTE, Journal, request_id_of
from tuneserve.serving.offers import Parser, head_without_offer
from tuneserve.serving.pauses import Pauses
from tuneserve.serving.problems import problem

ENGINE_URLS = {path.encode(): path for path in ENGINE_PATHS}
"""As they stand in a request; one that is written otherwise is the middleware's to refuse."""

UNREAD_BYTES = 16 << 20
"""Of a body whose request has its answer, as many are read for the sake of the connection; then it is closed."""

BODY_S = 2.0
"""Seconds that a body may take once the server is to leave."""

HEAD_BYTES = 64 << 10
"""Most that is read of a request without finding any of its body: headers, or what follows a body in chunks."""


class Exchange(RequestResponseCycle):
    """A request that the door answers: what uvicorn's protocol wants of a cycle, without what serves an application."""

    message_event = asyncio.Event()
    """uvicorn sets it when the client is gone. Nobody waits for it."""

    def __init__(self, route: str, headers: list[tuple[bytes, bytes]], *, keep_alive: bool) -> None:
        self.route, self.headers, self.keep_alive = route, headers, keep_alive
        self.began = time.perf_counter()
        self.body = bytearray()
        self.more_body = True
        self.response_complete = self.disconnected = False


class Door(HttpToolsProtocol):
    """One connection.

    Args:
        admission: the rule for what is refused.
        inference: answers what is not; None lets the application answer.
        journal: told of what the door answered.
        pauses: of the server, asked for after refusals.
        wait_s: seconds that a request's headers may take, and then its body.
        max_body_bytes: above which a body is the application's to refuse.
        options: uvicorn's.
    """

    def __init__(
        self,
        admission: Admission,
        inference: Inference | None,
        journal: Journal,
        pauses: Pauses,
        *,
        wait_s: float,
        max_body_bytes: int,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.parser: Parser = Parser(self)
        self._admission, self._inference, self._journal, self._pauses = admission, inference, journal, pauses
        self._wait_s, self._max_body_bytes = wait_s, max_body_bytes
        self._refused = self._in_head = self._upgrading = False
        self._in_message = self._has_body = self._has_begun = False
        self._unread_bytes = self._bodiless_bytes = 0
        self._refused_at = 0.0
        self._asked: Exchange | None = None
        self._work: asyncio.Task[None] | None = None
        self._in_turn: RequestResponseCycle | None = None
        self._hung_up = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first headers."""
        super().connection_made(transport)
        self._await(self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more; work whose client has hung up is dropped."""
        self._has_come()
        self._hung_up = True
        if isinstance(self.cycle, Exchange) and self._body_is_missing():
            self._note(self.cycle, ClientGoneError.status, request_id_of(self.cycle.headers))
        elif self._work is not None:
            self._work.cancel()
        if self._in_turn is not None:
            self._in_turn.disconnected = True
            self._in_turn.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read it; what has only begun must go on. An offer of another protocol is passed over."""
        if self._pauses.is_due and self._refuse_at_a_glance(data):
            return
        super().data_received(data)
        while (untaken := self.parser.untaken) is not None:
            head = b""  # that of a tunnel has been answered
            if self._upgrading:
                version = self.parser.get_http_version()
                head = head_without_offer(self.parser.get_method(), self.url, version, self.headers)
            self.parser = Parser(self)
            super().data_received(head + untaken)
        self._bound(len(data))

    def _bound(self, num_bytes: int) -> None:
        """See that a message which is not whole yet goes on, and is a body in the end."""
        in_one = self._in_message and not self._has_body and not self._has_begun
        self._bodiless_bytes = self._bodiless_bytes + num_bytes if in_one else 0
        self._has_body = self._has_begun = False
        if self._bodiless_bytes > HEAD_BYTES:
            self._end_early(HeadersTooLargeError())
        elif self._in_message and (self._in_head or self._is_answered()):
            self._await(self.transport.close)
        elif self._in_message and isinstance(self.cycle, Exchange):
            self._await(self._end_late)

    def on_message_begin(self) -> None:
        """A request begins. The scope that uvicorn would make here is the application's, which gets few of them."""
        self.url, self.headers, self.expect_100_continue = b"", [], False
        self._in_head = self._in_message = self._has_begun = True
        self._unread_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep it. What follows a body in chunks says nothing of the request: those before us have not looked at it."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Refuse the request, take it, or let uvicorn do with it what it does."""
        self._in_head = False
        self._has_come()
        method = self.parser.get_method().decode("ascii")
        self._upgrading = self.parser.should_upgrade() and method != "CONNECT"
        if self._upgrading:
            return
        path = ENGINE_URLS.get(self.url)
        if path is not None and self._can_answer():
            error = self._admission.refusal(method, path, self.headers)
            if error is not None:
                self._refused = True
                # Who asked whether to send the body is told no: what comes next on this connection could be either.
                keep = self._keeps_alive() and not self.expect_100_continue
                self._refuse(error, ENGINE_PATHS[path], self.headers, keep=keep)
                return
            if method == "POST" and self._inference is not None and self._is_ordinary():
                self.cycle = Exchange(ENGINE_PATHS[path], self.headers, keep_alive=self._keeps_alive())
                return
        self._call_application()

    def _call_application(self) -> None:
        head = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.headers, self.expect_100_continue = head
        self.scope["headers"] = self.headers
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Remember which is answered: of pipelined requests uvicorn tells but the last that the client is gone."""
        self._in_turn = cycle
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        """Keep it. What belongs to a request that has its answer is read and forgotten, up to a limit."""
        self._has_body = True
        if self._is_answered():
            self._unread_bytes += len(body)
            if self._unread_bytes > UNREAD_BYTES:
                self.transport.close()
            return
        if isinstance(self.cycle, Exchange):
            self.cycle.body += body
            if len(self.cycle.body) <= self._max_body_bytes:
                return
            body = self._hand_over()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole. After a refused one the connection waits for the next, as after any other."""
        self._in_message = False
        self._has_come()
        if self._refused:
            self._refused = False
            self.on_response_complete()
        elif isinstance(self.cycle, Exchange) and self._body_is_missing():
            self.cycle.more_body = False
            self._admission.count(len(self.cycle.body), self.loop)
            self._asked = self.cycle
            self._work = self.loop.create_task(self._answer(self.cycle))
            self.tasks.add(self._work)  # which uvicorn cancels if it must leave
            self._work.add_done_callback(self.tasks.discard)
        elif not self._upgrading:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP. A whole request before it is answered first."""
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            self._end_early(InvalidRequestError(msg))
        else:
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        """The server is to leave: answer what is under way, but wait for no body that does not come."""
        super().shutdown()
        if self._body_is_missing():
            self.loop.call_later(BODY_S, self._give_up)

    async def _answer(self, exchange: Exchange) -> None:
        assert self._inference is not None
        request_id = request_id_of(exchange.headers)
        try:
            response = await self._inference.answer(
                exchange.route, exchange.headers, exchange.body, request_id.decode()
            )
        except asyncio.CancelledError:
            if self._hung_up:
                self._note(exchange, ClientGoneError.status, request_id)
                return
            response = problem(LeavingError())
        self._end(exchange, response, request_id)
        self.on_response_complete()

    def _end(self, exchange: Exchange, response: Response, request_id: bytes) -> None:
        exchange.response_complete = True
        exchange.body = bytearray()  # the connection may rest for long
        self._write(response, request_id, keep=exchange.keep_alive)
        self._note(exchange, response.status_code, request_id)

    def _note(self, exchange: Exchange, status: int, request_id: bytes) -> None:
        self._journal.note(exchange.route, status, time.perf_counter() - exchange.began, request_id.decode())

    def _hand_over(self) -> bytes:
        """Let the application answer this request after all; returns what there is of its body."""
        self._has_come()
        body = bytes(self.cycle.body)
        self.cycle = cast("RequestResponseCycle", None)  # as uvicorn has it before the first request
        self._call_application()
        return body

    def _end_late(self) -> None:
        self._end_early(BodyTimeoutError(self._wait_s))

    def _give_up(self) -> None:
        if self._body_is_missing() and not self.transport.is_closing():
            self._end_early(LeavingError())

    def _end_early(self, error: TuneserveError) -> None:
        """Answer a request that is not whole and will not be, and close the connection."""
        if any(cycle is self.cycle for cycle, _ in self.pipeline):  # one before it must be answered first
            for cycle in (self._asked, self._in_turn):
                if cycle is not None:
                    cycle.keep_alive = False
            return
        if self._in_message and not self._in_head and self._is_answered():
            self.transport.close()
            return
        if isinstance(self.cycle, Exchange) and self._body_is_missing():
            self.cycle.keep_alive = False
            self._end(self.cycle, problem(error), request_id_of(self.cycle.headers))
        elif self._body_is_missing():  # the application's, which notes it
            self._write(problem(error), request_id_of(self.headers), keep=False)
        elif self._can_answer():
            request_id = request_id_of(self.headers if self._in_message else ())
            self._write(problem(error), request_id, keep=False)
            self._journal.note(NO_ROUTE, error.status, 0.0, request_id.decode())
        else:
            self.transport.close()

    def _is_answered(self) -> bool:
        """Whether the request that is being read has its answer already."""
        return self._refused or (self.cycle is not None and self.cycle.response_complete)

    def _body_is_missing(self) -> bool:
        return self.cycle is not None and self.cycle.more_body and not self.cycle.response_complete

    def _await(self, otherwise: Callable[[], None]) -> None:
        """Wait for more of the request, if that is not done already."""
        if self._timer is None:
            self._timer = self.loop.call_later(self._wait_s, otherwise)

    def _has_come(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _can_answer(self) -> bool:
        """Whether an answer may be written now: those before it have theirs, and the client reads them."""
        answered = self.cycle is None or self.cycle.response_complete
        return answered and not self.flow.write_paused and not self.transport.is_closing()

    def _is_ordinary(self) -> bool:
        """Whether there is nothing about the request that the application would answer otherwise than the door."""
        declared = next((value for name, value in self.headers if name == b"content-length"), b"0")
        return int(declared) <= self._max_body_bytes and not self.expect_100_continue

    def _keeps_alive(self) -> bool:
        keeps: bool = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        return keeps

    def _refuse_at_a_glance(self, data: bytes) -> bool:
        """Refuse a request that no parser has seen, where others were refused just now; whether it could be done."""
        if self._in_message or not self._can_answer():
            return False
        seen = see_whole_request(data)
        error = self._admission.refusal("POST", *seen) if seen else None
        if seen is None or error is None:
            return False
        path, headers = seen
        self._refuse(error, ENGINE_PATHS[path], headers, keep=True)
        self._refused_at = self.loop.time()
        if self.timeout_keep_alive_task is None:  # the one that runs will see that this was later
            self._has_come()
            self.on_response_complete()
        return True

    def timeout_keep_alive_handler(self) -> None:
        """Nothing has come since the last answer that was not a refusal at a glance: close, or wait for the rest."""
        left_s = self._refused_at + self.timeout_keep_alive - self.loop.time()
        if left_s > 0:
            self.timeout_keep_alive_task = self.loop.call_later(left_s, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()

    def _refuse(self, error: OverloadedError, route: str, headers: Headers, *, keep: bool) -> None:
        self._pauses.ask(self.loop)
        request_id = request_id_of(headers)
        self._write(_refusal(str(error), error.retry_after_s), request_id, keep=keep)
        self._journal.note(route, error.status, 0.0, request_id.decode())

    def _write(self, response: Response, request_id: bytes, *, keep: bool) -> None:
        head = [STATUS_LINE[response.status_code]]
        head += [b"%b: %b\r\n" % header for header in (*self.server_state.default_headers, *response.raw_headers)]
        head.append(b"x-request-id: %b\r\n%b\r\n" % (request_id, b"" if keep else b"connection: close\r\n"))
        self.transport.write(b"".join([*head, response.body]))
        if not keep:
            self.transport.close()


@lru_cache(maxsize=16)
def _refusal(words: str, retry_after_s: int) -> Response:
    """Many in a row find the same number of tokens waiting."""
    return problem(OverloadedError(words, retry_after_s=retry_after_s))


def open_door(
    listener: socket.socket,
    admission: Admission,
    inference: Inference | None,
    journal: Journal,
    *,
    wait_s: float,
    max_body_bytes: int,
) -> type[asyncio.Protocol]:
    """The class of protocol that uvicorn makes a connection of, for the server of this socket; see `Door`."""
    pauses = Pauses(admission, listener)
    door = partial(Door, admission, inference, journal, pauses, wait_s=wait_s, max_body_bytes=max_body_bytes)
    return cast("type[asyncio.Protocol]", door)
