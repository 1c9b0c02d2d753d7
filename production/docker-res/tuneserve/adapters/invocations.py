"""Requests and replies as Hugging Face's toolkit on SageMaker has them: JSON, JSON lines and CSV, and its errors.

Source: sagemaker-huggingface-inference-toolkit's decoders and encoders; `production/deploy/sagemaker/README.md` has the
table of intended differences. JSON lines, and lines without a header, are for batch transform: a line out for each in.
"""

import csv
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from tuneserve.errors import InvalidInputError, NotAcceptableError, TimeoutExceededError, TooLargeError, TuneserveError
from tuneserve.serving.http.problems import headers_of
from tuneserve.serving.http.routes import Worded, streamed, to_json, wanted_s
from tuneserve.serving.model import Answers, Model
from tuneserve.serving.service import DEFAULT, Service
from tuneserve.tasks.catalog import TASKS
from tuneserve.tasks.handler import Invocation
from tuneserve.tasks.handler import Response as Reply
from tuneserve.tasks.task import Asked, Task, only

JSON, CSV, LINES, TEXT = "application/json", "text/csv", "application/jsonlines", "text/plain"
OF_LINES = (LINES, "application/x-jsonlines", "application/jsonl", "application/x-ndjson")
"""Names by which JSON lines come; the first is SageMaker's."""
FORM = "application/x-www-form-urlencoded"
"""What curl says of anything."""
CHUNK = 256
"""Lines that are asked together; a batch's payload may have a hundred thousand."""
ATTRIBUTES = "X-Amzn-SageMaker-Custom-Attributes"


def failed(error: TuneserveError | RequestValidationError, *, close: bool = False) -> Response:
    """An error as the platform and SageMaker's toolkit word it: `{"code", "type", "message"}`; see `Wording`."""
    status = 400 if isinstance(error, RequestValidationError | InvalidInputError) else error.status
    content = {"code": status, "type": getattr(error, "kind", type(error).__name__), "message": words_of(error)}
    return Response(to_json(content), status, headers=headers_of(error, close=close), media_type=JSON)


def words_of(error: Exception) -> str:
    """An error in one sentence, which names at most five faults of an input."""
    if isinstance(error, RequestValidationError):
        return "; ".join(f"{one['loc'][-1]}: {one['msg']}" for one in error.errors()[:5])
    if isinstance(error, InvalidInputError):
        return "; ".join(f"{'.'.join(map(str, one['loc'][1:])) or 'body'}: {one['msg']}" for one in error.faults[:5])
    return str(error)


class PlatformRoute(Worded):
    """A route whose errors are the platform's."""

    wording = staticmethod(failed)


class WholeError(Exception):
    """The answer of the model does not come bit by bit, or is not to."""


async def answered(
    service: Service, request: Request, *, name: str = DEFAULT, batch: bool = False, accept: str = ""
) -> Response:
    """The response to a request.

    Args:
        service: that answers.
        request: of a client.
        name: of the model that is asked.
        batch: whether tables have no header, and each line wants one of its own for an answer.
        accept: what a client wants that does not say.

    Raises:
        TuneserveError: there is none.
    """
    call = Call(await request.body(), request.headers, service.max_inputs, batch=batch, accept=accept)
    timeout_s = wanted_s(request.scope["headers"], service.timeout_s)
    if call.may_stream:
        with suppress(WholeError):
            return await streamed(
                service.stream(call.streamed_input, timeout_s=timeout_s, name=name), call.event, call.event_headers
            )
    until = time.monotonic() + timeout_s
    pieces = []
    while not call.finished:
        if (left_s := until - time.monotonic()) <= 0:
            raise TimeoutExceededError("There was no answer in time.")
        answers = await service.answer(
            call.inputs, timeout_s=left_s, request_id=request.scope["state"]["request_id"], name=name
        )
        pieces.append(call.write(answers))
    return Response(b"".join(pieces), media_type=call.media_type)


class Call:
    """One request to a model of which only the name is known until it is held.

    `inputs` and `write` take turns until it is `finished`: once, or for each chunk of its lines.

    `may_stream` is whether its answer may be wanted bit by bit; only the model knows.
    """

    def __init__(
        self, body: bytes, headers: Mapping[str, str], max_inputs: int, *, batch: bool = False, accept: str = ""
    ) -> None:
        self._body, self._max_inputs, self._headers = body, max_inputs, headers
        self._type = headers.get("Content-Type") or JSON
        self._accept = headers.get("Accept") or accept or "*/*"
        if self._accept == "*/*" and accept:
            self._accept = accept
        kind = kind_of(self._type)
        self._by_lines = kind in OF_LINES or (batch and kind in (CSV, TEXT))
        self._lines: list[bytes] = split_lines(body) if self._by_lines else []
        self._kind, self._next, self._asked = kind, 0, list[Asked | TuneserveError]()
        self._own = False
        self.may_stream = not self._by_lines and b'"stream"' in body
        self.finished = self._by_lines and not self._lines
        self.media_type = LINES if self._by_lines else JSON

    def inputs(self, model: Model) -> list[Any]:
        """What this model is asked next.

        Raises:
            InvalidInputError: that is not to be read in the body.
            TooLargeError: it is too much.
            NotAcceptableError: the client wants what is not written here.
        """
        task = TASKS.get(model.task)
        self._own = task is None or task.ask is None
        if task is None or task.ask is None:
            attributes = self._headers.get(ATTRIBUTES) or ""
            return [Invocation(self._body, self._type, self._accept, attributes)]
        self.media_type = chosen(self._accept, lines=self._by_lines)
        if not self._by_lines:
            self._asked = [self._ask(task, lambda: read(self._body, self._type))]
        else:
            self._asked = []
            for line in self._lines[self._next : self._next + CHUNK]:
                try:
                    self._asked.append(self._ask(task, lambda line=line: read_line(line, self._kind)))  # type: ignore[misc]
                except TuneserveError as error:
                    self._asked.append(error)
        return [one for asked in self._asked if isinstance(asked, Asked) for one in asked.inputs]

    def streamed_input(self, model: Model) -> Any:
        """What this model is asked, if it is to answer bit by bit; see `inputs`.

        Raises:
            WholeError: it is not.
        """
        inputs = self.inputs(model)
        if self._own or self._one.event is None:
            raise WholeError
        return inputs[0]

    @property
    def _one(self) -> Asked:
        [asked] = self._asked
        assert isinstance(asked, Asked)
        return asked

    def event(self, answer: Any, before: Any) -> Any:
        """The JSON of an event; see `Route`."""
        assert self._one.event is not None
        return self._one.event(answer, before)

    def event_headers(self, answers: Answers) -> Mapping[str, str]:
        """Of a response that is streamed."""
        return self._one.headers(answers)

    def write(self, answers: Answers) -> bytes:
        """What is made of the answers to `inputs`.

        Raises:
            TuneserveError: there is none.
        """
        self._next += len(self._asked)
        self.finished = self._own or self._next >= max(1, len(self._lines))
        if self._own:
            reply = only(answers, "")
            assert isinstance(reply, Reply)
            self.media_type = reply.content_type
            return reply.body
        if not self._by_lines:
            return encode(self._one.content(answers), self.media_type)
        written, first = [], 0
        for one in self._asked:
            try:
                if isinstance(one, TuneserveError):
                    raise one
                mine, first = answers[first : first + len(one.inputs)], first + len(one.inputs)
                content = one.content(mine)
            except TuneserveError as error:
                content = {"error": words_of(error)}
            written.append(encode_line(content, self.media_type))
        return b"".join(written)

    def _ask(self, task: Task, wanted: Callable[[], Mapping[str, Any]]) -> Asked:
        assert task.ask is not None
        try:
            asked = task.ask(wanted())
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False, include_context=False)
            raise InvalidInputError(*((("body", *one["loc"]), one["msg"], one["type"]) for one in found)) from None
        if len(asked.inputs) > self._max_inputs:
            raise TooLargeError(f"The request has {len(asked.inputs)} inputs; {self._max_inputs} are the most.")
        return asked


def kind_of(content_type: str) -> str:
    """A content type without its parameters."""
    return content_type.partition(";")[0].strip().lower()


def split_lines(body: bytes) -> list[bytes]:
    """The lines of a body, whose last may end without a line break."""
    lines = [line.removesuffix(b"\r") for line in body.split(b"\n")]
    return lines[:-1] if not lines[-1] else lines


def chosen(accept: str, *, lines: bool) -> str:
    """The content type of the answer, the first wanted one that is written here.

    Raises:
        NotAcceptableError: there is none.
    """
    for one in map(kind_of, accept.split(",")):
        if one == CSV:
            return CSV
        if one in ("", "*/*", "application/*", "text/event-stream", JSON, *OF_LINES):
            return LINES if lines else JSON
    raise NotAcceptableError(f"The answer is {JSON}, {LINES} or {CSV}, and none of them is in Accept: {accept[:100]}")


def read(body: bytes, content_type: str) -> Mapping[str, Any]:
    """`{"inputs", "parameters"}` of a body, as SageMaker's toolkit decodes it, and `"stream"`.

    Other keys are dropped, and what has no `inputs` is them itself.

    Raises:
        InvalidInputError: it is not to be read.
    """
    kind = kind_of(content_type)
    try:
        text = body.decode()
        if kind == CSV:
            rows = list(csv.DictReader(io.StringIO(text), strict=True))
            if not rows or "inputs" not in rows[0]:
                raise ValueError("a table has a row `inputs` for its head, and a text in each row below")
            return {"inputs": [row["inputs"] for row in rows]}
        if kind not in (JSON, FORM):
            raise ValueError(f"this model reads {JSON}, {LINES} and {CSV}, not {kind[:100]}")
        return _pipelines(json.loads(text))
    except (ValueError, RecursionError, csv.Error) as error:
        raise InvalidInputError((("body", "content"), str(error)[:200], "value_error")) from None


def read_line(line: bytes, kind: str) -> Mapping[str, Any]:
    """The same of a line: JSON, a row of a table without a header, or a text.

    Raises:
        InvalidInputError: it is not to be read.
    """
    try:
        text = line.decode()
        if kind == TEXT:
            return {"inputs": text}
        if kind != CSV:
            return _pipelines(json.loads(text))
        fields = next(csv.reader([text], strict=True), [])
        if len(fields) != 1:
            raise ValueError(
                f"the line has {len(fields)} fields, and it should have the text alone: a text that has commas stands "
                "in double quotes, and a column is chosen by the transform job's InputFilter"
            )
        return {"inputs": fields[0]}
    except (ValueError, RecursionError, csv.Error) as error:
        raise InvalidInputError((("body", "line"), str(error)[:300], "value_error")) from None


def _pipelines(found: Any) -> Mapping[str, Any]:
    if not isinstance(found, dict) or "inputs" not in found:
        return {"inputs": found}
    return {name: found[name] for name in ("inputs", "parameters", "stream") if name in found}


def encode(content: Any, media_type: str) -> bytes:
    """A whole answer: JSON, or of objects a table with their keys for its head, as the toolkit has it.

    Raises:
        NotAcceptableError: it is no list of objects.
    """
    if media_type != CSV:
        return content if isinstance(content, bytes) else to_json(content).encode()
    if not isinstance(content, list) or not all(
        isinstance(one, dict) and one.keys() == content[0].keys() for one in content
    ):
        raise NotAcceptableError(f"These answers are no rows of a table: Accept {JSON}.")
    stream = io.StringIO(newline="")
    table = csv.DictWriter(stream, content[0].keys())
    table.writeheader()
    table.writerows(content)
    return stream.getvalue().encode()


def encode_line(content: Any, media_type: str) -> bytes:
    r"""The answer to a line, in one line: JSON, or fields; line breaks in these are written as `\n`."""
    words = content if isinstance(content, bytes) else to_json(content).encode()
    if media_type == CSV:
        if isinstance(content, dict):
            fields: list[Any] = ["error", content["error"]]
        else:
            fields = [each for one in json.loads(words) for each in _fields(one)]
        stream = io.StringIO(newline="")
        csv.writer(stream, lineterminator="").writerow([str(one).replace("\n", "\\n") for one in fields])
        words = stream.getvalue().replace("\r", "\\r").encode()
    return words + b"\n"


def _fields(one: Any) -> Sequence[Any]:
    return list(one.values()) if isinstance(one, dict) else one if isinstance(one, list) else [one]
