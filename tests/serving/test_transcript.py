"""What the server answers over real sockets, held against the golden transcript in `transcript.json`.

The requests are in `tests/exchanges.py`; the transcript has status, headers that matter and body of each answer, and
whether the connection could be used again. Dates, ids and measured figures are replaced by words in angle brackets.

A difference that is meant is recorded anew, and CHANGELOG says why it is meant:

    .venv/bin/pytest tests/serving/test_transcript.py --record            # all of them
    .venv/bin/pytest tests/serving/test_transcript.py --record -k h2c     # some
"""

import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from exchanges import EXCHANGES, KEY, LIVEZ, LOCATION, WITH_KEY, Exchange
from wire import Full, served

from tuneserve.artifact import Version
from tuneserve.errors import StoreError
from tuneserve.lifecycle.feedback import Feedback
from tuneserve.lifecycle.feedback_database import FILE
from tuneserve.lifecycle.store import Store
from tuneserve.lifecycle.trainer import Trainer
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings
from tuneserve.tasks.classifier import Classifier

TRANSCRIPT = Path(__file__).with_name("transcript.json")

ENVIRONMENTS = {
    "plain": {},
    "fresh": {},
    "keyed": {"API_KEY": KEY},
    "keyed fresh": {"API_KEY": KEY},
    "guarded": {"API_KEY": KEY, "API_KEY_GUARDS": "everything"},
    "long texts refused": {"LONG_TEXT": "error"},
    "long texts in windows": {"LONG_TEXT": "window"},
    "hurried": {"REQUEST_TIMEOUT_S": "0.4"},
    "stuck": {"REQUEST_TIMEOUT_S": "0.4"},  # its engine never answers
    "full": {"API_KEY": KEY, "REQUEST_TIMEOUT_S": "600"},  # neither does this one's, and its queue is full
    "empty": {},
    "failed": {},
    "broken": {},  # its engine gives figures that are not numbers
}
"""The environment variables of each kind of server."""

HEADERS = ("allow", "connection", "content-type", "location", "retry-after", "transfer-encoding", "upgrade")
HEADERS += ("www-authenticate", "x-request-id")

VOLATILE = {
    r"\b[0-9a-f]{32}\b": "<new id>",
    r"\b\d{8}T\d{6}Z-[0-9a-f]{6}\b": "<job>",
    r"\b20\d\d-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?([+-]\d\d:\d\d|Z)?": "<time>",
    r"\b\d+ tokens are waiting; try again in [1-9]\d* s": "<n> tokens are waiting; try again in <n> s",
}


class Servers:
    """Servers by kind: one of each, started when it is first asked for; of the fresh kinds, one for each exchange."""

    def __init__(self, version: Version, make_engine: Callable[..., Any], folder: Path) -> None:
        self._version, self._make_engine, self._folder = version, make_engine, folder
        self._ports: dict[str, int] = {}
        self._open = ExitStack()
        self._started = 0

    def replay(self, exchange: Exchange) -> dict[str, Any]:
        """The transcript of an exchange, made now."""
        with ExitStack() as stack:
            if exchange.server.endswith("fresh"):
                port = stack.enter_context(self._start(exchange.server))
            else:
                if exchange.server not in self._ports:
                    self._ports[exchange.server] = self._open.enter_context(self._start(exchange.server))
                port = self._ports[exchange.server]
            return converse(port, exchange)

    def close(self) -> None:
        self._open.close()

    @contextmanager
    def _start(self, kind: str) -> Iterator[int]:
        self._started += 1
        folder = self._folder / str(self._started)
        settings = Settings.from_environ({"MODEL_PATH": str(folder), "MAX_BODY_KB": "4", **ENVIRONMENTS[kind]})
        go = threading.Event()

        def compute(engine: Any) -> Any:
            if kind in ("stuck", "full"):
                assert go.wait(600)
            return np.full((len(engine.running), 2), np.nan, dtype=np.float32) if kind == "broken" else None

        slot = Slot()
        if kind == "failed":
            slot.fail(StoreError("The version is torn."))
        elif kind != "empty":
            room = 6 if kind == "full" else 10_000
            engine = self._make_engine(compute)
            slot.take(Classifier(self._version, engine, long_text=settings.long_text, max_queue_tokens=room))
        store = Store(settings.model_path)
        store.prepare()
        trainer = Trainer([sys.executable, "-c", "import time; time.sleep(600)"], store, serves=lambda: False)
        feedback = Feedback(folder / FILE, max_rows=100, keep_texts=False)
        with ExitStack() as stack:
            stack.callback(slot.close)
            stack.callback(trainer.close)
            stack.callback(go.set)
            port = stack.enter_context(served(settings, slot, feedback=feedback, trainer=trainer))
            stack.callback(go.set)
            if kind == "full":
                stack.callback(Full(slot, go, port, WITH_KEY).close)
            yield port


def converse(port: int, exchange: Exchange) -> dict[str, Any]:
    """Send the steps of an exchange on one connection, and then see whether it answers anything more."""
    sent, answers, location = [], [], b""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection, connection.makefile("rb") as file:
        for step in exchange.steps:
            content, count = step if isinstance(step, tuple) else (step, 1)
            sent.append(shorten(content))
            connection.sendall(content.replace(LOCATION, location))
            for _ in range(count):
                answer = read_answer(file, to_head=content.startswith(b"HEAD"))
                if answer is None:
                    return {"server": exchange.server, "sent": sent, "answers": answers, "connection": "closed"}
                location = answer[1].get("location", "").encode() or location
                answers.append(show(*answer))
        try:
            connection.sendall(LIVEZ)
            last = read_answer(file, to_head=False)
        except ConnectionError:
            last = None
    state = "closed" if last is None else "kept" if last[0] in (200, 401) else f"kept, and answers {last[0]}"
    if exchange.server == "failed" and last is not None and last[0] == 503:
        state = "kept"
    return {"server": exchange.server, "sent": sent, "answers": answers, "connection": state}


def read_answer(file: BinaryIO, *, to_head: bool) -> tuple[int, dict[str, str], bytes] | None:
    """Status, headers (names in lower case) and body of the next answer; None if the connection has ended."""
    try:
        first = file.readline()
    except ConnectionError:
        return None
    if not first:
        return None
    status, headers = int(first.split()[1]), {}
    while line := file.readline().strip():
        name, _, value = line.decode("latin-1").partition(":")
        before = headers.get(name.lower())
        headers[name.lower()] = value.strip() if before is None else f"{before}, {value.strip()}"
    if to_head or status in (100, 204, 304):
        return status, headers, b""
    if headers.get("transfer-encoding") != "chunked":
        return status, headers, file.read(int(headers.get("content-length", -1)))
    body = b""
    while size := int(file.readline(), 16):
        body += file.read(size)
        file.readline()
    file.readline()
    return status, headers, body


def show(status: int, headers: dict[str, str], body: bytes) -> dict[str, Any]:
    """An answer as the transcript has it."""
    shown = {name: hide_volatile(headers[name]) for name in HEADERS if name in headers}
    if status == 429 and re.fullmatch("[1-9][0-9]*", shown.get("retry-after", "")):
        shown["retry-after"] = "<n>"
    if not body and status != 100 and "content-length" in headers:
        shown["content-length"] = headers["content-length"]
    return {"status": status, "headers": shown, "body": show_body(headers.get("content-type", ""), body.decode())}


def show_body(content_type: str, body: str) -> Any:
    """The body, of long ones what does not change from day to day: paths and methods, names of figures, a title."""
    if body and content_type.startswith("application/json"):
        content = json.loads(body, object_hook=hide_version)
        if "openapi" in content:
            return {path: sorted(methods) for path, methods in sorted(content["paths"].items())}
        return round_numbers(content)
    if "version=0.0.4" in content_type:
        families = re.findall(r"^# TYPE (\S+ \S+)", body, re.MULTILINE)
        return sorted(one for one in families if "_created " not in one)  # some come with the first request
    if content_type.startswith("text/html"):
        return re.findall("<title>.*</title>", body)
    if content_type.startswith("text/csv"):
        return [[round_numbers(field) for field in line.split(",")] for line in hide_volatile(body).splitlines()]
    return hide_volatile(body)


def hide_version(content: dict[str, Any]) -> dict[str, Any]:
    return content | {"version": "<version>"} if content.get("name") == "tuneserve" else content


def round_numbers(content: Any) -> Any:
    """JSON with figures rounded to four places, and without what changes from one time to another."""
    if isinstance(content, dict):
        return {name: round_numbers(value) for name, value in content.items()}
    if isinstance(content, list):
        return [round_numbers(one) for one in content]
    if isinstance(content, float):
        return round(content, 4)
    if isinstance(content, str) and re.fullmatch(r"-?\d+\.\d{5,}", content):
        return f"{float(content):.4f}"
    return hide_volatile(content) if isinstance(content, str) else content


def hide_volatile(text: str) -> str:
    for pattern, words in VOLATILE.items():
        text = re.sub(pattern, words, text)
    return text


def shorten(content: bytes) -> str:
    """What is sent, with repetitions counted."""

    def count(match: re.Match[str]) -> str:
        return f"<{match[1]!r} {len(match[0]) // len(match[1])} times>"

    return re.sub(r"(.{1,8}?)\1{29,}", count, content.decode("latin-1"), flags=re.DOTALL)


def write_transcript(transcript: dict[str, Any]) -> None:
    """Write it with each answer's status, headers and body on lines of their own."""
    kept = {name: transcript[name] for name in EXCHANGES if name in transcript}
    TRANSCRIPT.write_text(indent(kept, levels=4) + "\n", encoding="utf-8")


def indent(content: Any, *, levels: int, margin: str = "") -> str:
    """JSON that is laid out over lines down to some level, below which a value is a line."""
    if not levels or not content or not isinstance(content, dict | list):
        return json.dumps(content, ensure_ascii=False)
    inner = margin + "  "
    if isinstance(content, dict):
        rows = [f"{json.dumps(k)}: {indent(v, levels=levels - 1, margin=inner)}" for k, v in content.items()]
    else:
        rows = [indent(one, levels=levels - 1, margin=inner) for one in content]
    first, last = "{}" if isinstance(content, dict) else "[]"
    return f"{first}\n{inner}" + f",\n{inner}".join(rows) + f"\n{margin}{last}"


@pytest.fixture(scope="module")
def servers(
    version: Version, make_engine: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    servers = Servers(version, make_engine, tmp_path_factory.mktemp("stores"))
    yield servers
    servers.close()


@pytest.fixture(scope="module")
def transcript(pytestconfig: pytest.Config) -> Iterator[dict[str, Any]]:
    recorded = json.loads(TRANSCRIPT.read_text(encoding="utf-8")) if TRANSCRIPT.exists() else {}
    yield recorded
    if pytestconfig.getoption("record"):
        write_transcript(recorded)


@pytest.mark.parametrize("name", EXCHANGES)
def test_an_exchange_goes_as_recorded(
    name: str, servers: Servers, transcript: dict[str, Any], pytestconfig: pytest.Config
) -> None:
    found = servers.replay(EXCHANGES[name])
    if pytestconfig.getoption("record"):
        transcript[name] = found
    assert found == transcript[name]


def test_the_transcript_has_every_status_that_is_documented(transcript: dict[str, Any]) -> None:
    assert transcript.keys() == EXCHANGES.keys()
    statuses = {answer["status"] for one in transcript.values() for answer in one["answers"]}
    assert statuses >= {200, 202, 400, 401, 403, 404, 405, 408, 409, 413, 415, 422, 429, 431, 500, 501, 503, 504}
