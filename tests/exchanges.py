"""The requests of the server's golden transcript; `tests/serving/test_transcript.py` sends them.

An exchange is what one connection sends to one kind of server. Each step is sent only when the answers to the step
before have arrived. The module is long because it is a list.
"""

import json
from dataclasses import dataclass
from typing import Any

LOCATION = b"@location@"
"""In a step: the `Location` of the latest answer that had one."""

KEY = "open sesame"
BODY = b'{"text": "film"}'
BATCH = b'{"texts": ["film", "good film"]}'
FAULTS = b'{"texts": ["film", "", " \\n", "\\ud800", "good film"]}'
LONG = b'{"text": "' + b"film " * 40 + b'good"}'
LONG_BATCH = b'{"texts": ["' + b"film " * 40 + b'good", "film"]}'
JSON = "Content-Type: application/json"
H2C = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__")
CHUNKED = "Transfer-Encoding: chunked"


@dataclass(frozen=True)
class Exchange:
    """The kind of server, and the steps: bytes, or bytes and how many answers to read before the next step."""

    server: str
    steps: tuple[bytes | tuple[bytes, int], ...]


def head(method: str, path: str, *headers: str, http: str = "1.1") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{http}", "Host: a", *headers, "", ""]).encode()


def get(path: str, *headers: str, http: str = "1.1") -> bytes:
    return head("GET", path, *headers, http=http)


def post(body: bytes = BODY, *headers: str, path: str = "/inference", http: str = "1.1") -> bytes:
    return head("POST", path, *headers, f"Content-Length: {len(body)}", http=http) + body


def post_batch(body: bytes = BATCH, *headers: str) -> bytes:
    return post(body, *headers, path="/inference/batch")


def post_json(path: str, content: Any, *headers: str) -> bytes:
    return post(json.dumps(content).encode(), JSON, *headers, path=path)


def post_chunks(*chunks: bytes, path: str = "/inference", headers: tuple[str, ...] = ()) -> bytes:
    framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))
    return head("POST", path, *headers, CHUNKED) + framed


def ask(server: str, *steps: bytes | tuple[bytes, int]) -> Exchange:
    return Exchange(server, steps)


LIVEZ = get("/livez")
WITH_KEY = f"X-API-Key: {KEY}"
BEARER = f"Authorization: Bearer {KEY}"

EXCHANGES = {
    # Every route of a server with a model.
    "one text": ask("plain", post()),
    "one text, trailing slash": ask("plain", post(path="/inference/")),
    "one text, JSON content type": ask("plain", post(BODY, JSON)),
    "one text, another content type": ask("plain", post(BODY, "Content-Type: text/plain")),
    "one text, form content type": ask("plain", post(b"text=film", "Content-Type: application/x-www-form-urlencoded")),
    "batch": ask("plain", post_batch()),
    "batch, trailing slash": ask("plain", post(BATCH, path="/inference/batch/")),
    "index": ask("plain", get("/")),
    "model": ask("plain", get("/model")),
    "model, trailing slash": ask("plain", get("/model/")),
    "livez": ask("plain", LIVEZ),
    "livez, trailing slash": ask("plain", get("/livez/")),
    "readyz": ask("plain", get("/readyz")),
    "metrics": ask("plain", get("/metrics")),
    "description of the API": ask("plain", get("/openapi.json")),
    "documentation": ask("plain", get("/docs")),
    "documentation, other viewer": ask("plain", get("/redoc")),
    "drift": ask("fresh", post(), get("/drift")),
    "drift, window": ask("fresh", post(), post_batch(), get("/drift/window")),
    "drift, reference": ask("fresh", get("/drift/reference")),
    # Queries, other spellings of a path, paths and methods that do not exist.
    "query behind the path": ask("plain", post(path="/inference?why=not")),
    "query behind the path of a batch": ask("plain", post(BATCH, path="/inference/batch/?why=not")),
    "query behind livez": ask("plain", get("/livez?verbose=1")),
    "empty query": ask("plain", post(path="/inference?")),
    "percent-encoded path": ask("plain", post(path="/%69nference")),
    "absolute target": ask("plain", get("http://a/livez")),
    "absolute target of one text": ask("plain", post(path="http://a/inference")),
    "unknown path": ask("plain", get("/nothing")),
    "unknown path, posted": ask("plain", post(path="/inference/nothing")),
    "double slash": ask("plain", post(path="//inference")),
    "capital letter in the path": ask("plain", post(path="/Inference")),
    "GET of one text": ask("plain", get("/inference")),
    "GET of a batch": ask("plain", get("/inference/batch")),
    "PUT of one text": ask("plain", head("PUT", "/inference", f"Content-Length: {len(BODY)}") + BODY),
    "DELETE of the model": ask("plain", head("DELETE", "/model")),
    "POST of livez": ask("plain", post(b"", path="/livez")),
    "method that does not exist": ask("plain", head("BREW", "/inference")),
    "method in small letters": ask("plain", head("post", "/inference")),
    "OPTIONS of one text": ask("plain", head("OPTIONS", "/inference")),
    "OPTIONS of livez": ask("plain", head("OPTIONS", "/livez")),
    "OPTIONS of everything": ask("plain", head("OPTIONS", "*")),
    "HEAD of livez": ask("plain", head("HEAD", "/livez")),
    "HEAD of readyz": ask("plain", head("HEAD", "/readyz")),
    "HEAD of the model": ask("plain", head("HEAD", "/model")),
    "HEAD of one text": ask("plain", head("HEAD", "/inference")),
    "HEAD of an unknown path": ask("plain", head("HEAD", "/nothing")),
    # Bodies that are not as they should be.
    "no body": ask("plain", post(b"")),
    "no body, no length": ask("plain", head("POST", "/inference")),
    "broken JSON": ask("plain", post(b'{"text": "film"')),
    "trailing comma": ask("plain", post(b'{"text": "film",}')),
    "deep JSON": ask("plain", post(b'{"text": ' + b"[" * 1500)),
    "JSON behind a byte order mark": ask("plain", post(b"\xef\xbb\xbf" + BODY)),
    "not UTF-8": ask("plain", post(b'{"text": "\xff"}')),
    "UTF-16": ask("plain", post(BODY.decode().encode("utf-16"))),
    "null": ask("plain", post(b"null")),
    "list instead of an object": ask("plain", post(b'["film"]')),
    "text missing": ask("plain", post(b"{}")),
    "text under another name": ask("plain", post(b'{"texts": ["film"]}')),
    "further field": ask("plain", post(b'{"text": "film", "language": "en"}')),
    "text twice": ask("plain", post(b'{"text": "film", "text": "good film"}')),
    "text is a number": ask("plain", post(b'{"text": 5}')),
    "text is a list": ask("plain", post(b'{"text": ["film"]}')),
    "text is null": ask("plain", post(b'{"text": null}')),
    "text is NaN": ask("plain", post(b'{"text": NaN}')),
    "empty text": ask("plain", post(b'{"text": ""}')),
    "blank text": ask("plain", post(b'{"text": " \\n\\t"}')),
    "half a surrogate pair": ask("plain", post(b'{"text": "film \\ud83d"}')),
    "whole surrogate pair": ask("plain", post(b'{"text": "film \\ud83d\\ude00"}')),
    "other scripts": ask("plain", post('{"text": "電影 film é"}'.encode())),
    "NUL character": ask("plain", post(b'{"text": "film \\u0000"}')),
    "batch with faulty texts": ask("plain", post_batch(FAULTS)),
    "batch of one faulty text": ask("plain", post_batch(b'{"texts": [""]}')),
    "batch with what is no string": ask("plain", post_batch(b'{"texts": ["film", null, 5, {}, ["film"], true]}')),
    "batch with more than 20 faults": ask("plain", post_batch(b'{"texts": [' + b"1, " * 24 + b"1]}")),
    "batch with what is no string and half a pair": ask("plain", post_batch(b'{"texts": ["\\ud800", 5]}')),
    "empty batch": ask("plain", post_batch(b'{"texts": []}')),
    "batch is a string": ask("plain", post_batch(b'{"texts": "film"}')),
    "batch missing": ask("plain", post_batch(b"{}")),
    "broken JSON in a batch": ask("plain", post_batch(b"[")),
    # Long texts.
    "long text, truncated": ask("plain", post(LONG)),
    "long text, refused": ask("long texts refused", post(LONG)),
    "long text, in windows": ask("long texts in windows", post(LONG)),
    "long text in a batch, truncated": ask("plain", post_batch(LONG_BATCH)),
    "long text in a batch, refused": ask("long texts refused", post_batch(LONG_BATCH)),
    "long text in a batch, in windows": ask("long texts in windows", post_batch(LONG_BATCH)),
    # API keys.
    "key missing": ask("keyed", post()),
    "key right": ask("keyed", post(BODY, WITH_KEY)),
    "key right, as bearer": ask("keyed", post(BODY, BEARER)),
    "key right, bearer in small letters": ask("keyed", post(BODY, f"authorization: bearer {KEY}")),
    "key wrong": ask("keyed", post(BODY, "X-API-Key: open")),
    "key wrong, as bearer": ask("keyed", post(BODY, "Authorization: Bearer open")),
    "key in basic authentication": ask("keyed", post(BODY, f"Authorization: Basic {KEY}")),
    "key beside the token of a gateway": ask("keyed", post(BODY, WITH_KEY, "Authorization: Bearer gateway")),
    "key missing, batch": ask("keyed", post_batch()),
    "key right, batch": ask("keyed", post_batch(BATCH, WITH_KEY)),
    "key missing, broken JSON": ask("keyed", post(b"{")),
    "key missing, body too large": ask("keyed", post(b" " * 5000)),
    "key missing, body announced by Expect": ask(
        "keyed", head("POST", "/inference", "Expect: 100-continue", f"Content-Length: {len(BODY)}"), BODY
    ),
    "key missing, model": ask("keyed", get("/model")),
    "key right, model": ask("keyed", get("/model", BEARER)),
    "key missing, feedback": ask("keyed", post_json("/feedback", {"text": "film", "label": "bad"})),
    "key missing, drift": ask("keyed", get("/drift")),
    "key missing, retrain": ask("keyed", post(b"", path="/retrain")),
    "key missing, jobs": ask("keyed", get("/jobs")),
    "key missing, livez": ask("keyed", LIVEZ),
    "key missing, readyz": ask("keyed", get("/readyz")),
    "key missing, metrics": ask("keyed", get("/metrics")),
    "key missing, documentation": ask("keyed", get("/docs")),
    "key missing, unknown path": ask("keyed", get("/nothing")),
    "key missing, wrong method": ask("keyed", get("/inference")),
    "key guards everything, one text": ask("guarded", post()),
    "key guards everything, livez": ask("guarded", LIVEZ),
    "key guards everything, livez with the key": ask("guarded", get("/livez", WITH_KEY)),
    "key guards everything, metrics": ask("guarded", get("/metrics")),
    "key guards everything, documentation": ask("guarded", get("/docs")),
    "key guards everything, unknown path": ask("guarded", get("/nothing")),
    "key guards everything, body too large": ask("guarded", post(b" " * 5000)),
    "key guards everything, one text with the key": ask("guarded", post(BODY, BEARER)),
    # Deadlines.
    "deadline": ask("plain", post(BODY, "X-Request-Timeout-S: 5.5")),
    "deadline of zero": ask("plain", post(BODY, "X-Request-Timeout-S: 0")),
    "deadline below zero": ask("plain", post(BODY, "X-Request-Timeout-S: -1")),
    "deadline is nan": ask("plain", post(BODY, "X-Request-Timeout-S: nan")),
    "deadline is infinite": ask("plain", post(BODY, "X-Request-Timeout-S: inf")),
    "deadline with an underscore": ask("plain", post(BODY, "X-Request-Timeout-S: 1_0")),
    "deadline in words": ask("plain", post(BODY, "X-Request-Timeout-S: soon")),
    "deadline empty": ask("plain", post(BODY, "X-Request-Timeout-S:")),
    "deadline wrong, batch": ask("plain", post_batch(BATCH, "X-Request-Timeout-S: soon")),
    "deadline passes": ask("stuck", post(BODY, "X-Request-Timeout-S: 0.1")),
    "deadline passes, batch": ask("stuck", post_batch(BATCH, "X-Request-Timeout-S: 0.1")),
    "deadline of the server passes": ask("stuck", post(BODY, "X-Request-Timeout-S: 60")),
    # Request ids.
    "request id": ask("plain", post(BODY, "X-Request-Id: mine")),
    "request id of an application's route": ask("plain", get("/livez", "X-Request-Id: mine")),
    "request id of a fault": ask("plain", post(b"{", "X-Request-Id: mine")),
    "request id of an unknown path": ask("plain", get("/nothing", "X-Request-Id: mine")),
    "request id as long as allowed": ask("plain", post(BODY, "X-Request-Id: " + "i" * 128)),
    "request id too long": ask("plain", post(BODY, "X-Request-Id: " + "i" * 129)),
    "request id not ASCII": ask("plain", post(BODY, "X-Request-Id: größe")),
    "request id empty": ask("plain", post(BODY, "X-Request-Id:")),
    # Bodies in chunks and in pieces.
    "chunks": ask("plain", post_chunks(BODY[:7], BODY[7:])),
    "chunks, batch": ask("plain", post_chunks(BATCH, path="/inference/batch")),
    "chunks, extension and trailer": ask(
        "plain", head("POST", "/inference", CHUNKED) + b"10;a=b\r\n" + BODY + b"\r\n0\r\nX-Request-Id: mine\r\n\r\n"
    ),
    "chunks, broken": ask("plain", head("POST", "/inference", CHUNKED) + b"no number\r\n"),
    "body in two pieces": ask("plain", (post()[:-9], 0), post()[-9:]),
    # Expect: 100-continue.
    "body announced by Expect": ask(
        "plain", head("POST", "/inference", "Expect: 100-continue", f"Content-Length: {len(BODY)}"), BODY
    ),
    "body announced by Expect, too large": ask(
        "hurried", head("POST", "/inference", "Expect: 100-continue", "Content-Length: 5000")
    ),
    # Offers of another protocol.
    "h2c offer": ask("plain", post(BODY, *H2C)),
    "h2c offer, batch": ask("plain", post_batch(BATCH, *H2C)),
    "h2c offer, chunks": ask("plain", post_chunks(BODY[:7], BODY[7:], headers=H2C)),
    "h2c offer, no body": ask("plain", get("/livez", *H2C)),
    "h2c offer, followed by another request": ask("plain", (post(BODY, *H2C) + LIVEZ, 2)),
    "h2c offer, body too large": ask("plain", post(b" " * 5000, *H2C)),
    "h2c offer, feedback": ask("plain", post_json("/feedback", {"text": "film", "label": "none"}, *H2C)),
    "web socket offer": ask("plain", get("/livez", "Connection: Upgrade", "Upgrade: websocket")),
    "HTTP/2 with prior knowledge": ask("plain", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    # HTTP/1.0 and connections.
    "HTTP/1.0": ask("plain", post(http="1.0")),
    "HTTP/1.0, keep-alive": ask("plain", post(BODY, "Connection: keep-alive", http="1.0")),
    "HTTP/1.0, livez": ask("plain", get("/livez", http="1.0")),
    "HTTP/1.0, livez, keep-alive": ask("plain", get("/livez", "Connection: keep-alive", http="1.0")),
    "connection to be closed": ask("plain", post(BODY, "Connection: close")),
    "connection to be closed, livez": ask("plain", get("/livez", "Connection: close")),
    "one after another": ask("plain", post(), post_batch(), get("/nothing"), post(b"{"), post()),
    "pipelined": ask("plain", (post() + LIVEZ + post_batch() + get("/inference") + post(), 5)),
    "pipelined behind the last": ask("plain", post(BODY, "Connection: close") + LIVEZ),
    "pipelined garbage": ask("plain", post() + b"\x00\x01\x02"),
    # Bodies that are too large.
    "too large": ask("plain", post(b" " * 5000)),
    "too large, batch": ask("plain", post_batch(b" " * 5000)),
    "too large in chunks": ask("plain", post_chunks(b" " * 2500, b" " * 2500)),
    "too large, feedback": ask("plain", post(b" " * 5000, JSON, path="/feedback")),
    "too large, feedback in chunks": ask("plain", post_chunks(b" " * 5000, path="/feedback", headers=(JSON,))),
    "too large, unknown path": ask("plain", post(b" " * 5000, path="/nothing")),
    "too large and never sent": ask("hurried", head("POST", "/inference", "Content-Length: 1000000")),
    "as large as allowed": ask("plain", post(BODY + b" " * (4096 - len(BODY)))),
    # What does not come, or has no end.
    "body that stops": ask("hurried", head("POST", "/inference", "Content-Length: 30") + b"film"),
    "body that never comes, batch": ask("hurried", head("POST", "/inference/batch", "Content-Length: 30")),
    "body that never comes, feedback": ask("hurried", head("POST", "/feedback", JSON, "Content-Length: 30")),
    "chunks that stop": ask("hurried", head("POST", "/inference", CHUNKED) + b"10\r\n{"),
    "headers that stop": ask("hurried", (b"POST /inference HTTP/1.1\r\nHost: a\r\n", 1)),
    "headers that never come": ask("hurried", (b"", 1)),
    "headers without end": ask("plain", LIVEZ + b"GET /livez HTTP/1.1\r\nHost: a\r\nX-A: ", b"a" * 65600),
    "headers of 30 KiB": ask("plain", post(BODY, *["X-A: " + "a" * 1000] * 30)),
    # What is not HTTP, or could be read in two ways.
    "garbage": ask("plain", b"no HTTP at all\r\n\r\n"),
    "greeting of TLS": ask("plain", b"\x16\x03\x01\x02\x00\x01\x00"),
    "length that is no number": ask("plain", head("POST", "/inference", "Content-Length: some") + BODY),
    "content encoding that is not read": ask("plain", post(BODY, "Content-Encoding: br")),
    "transfer coding that is not read": ask(
        "plain", head("POST", "/inference", "Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n"
    ),
    "two lengths": ask("plain", post(BODY, "Content-Length: 3")),
    "length and chunks": ask("plain", post(BODY, CHUNKED)),
    "header without a colon": ask("plain", get("/livez", "no header")),
    "no host": ask("plain", b"GET /livez HTTP/1.1\r\n\r\n"),
    # No model: not yet, or it failed.
    "no model, one text": ask("empty", post()),
    "no model, batch": ask("empty", post_batch()),
    "no model, empty text": ask("empty", post(b'{"text": ""}')),
    "no model, broken JSON": ask("empty", post(b"{")),
    "no model, model": ask("empty", get("/model")),
    "no model, livez": ask("empty", LIVEZ),
    "no model, readyz": ask("empty", get("/readyz")),
    "no model, metrics": ask("empty", get("/metrics")),
    "no model, drift": ask("empty", get("/drift")),
    "no model, feedback": ask("empty", post_json("/feedback", {"text": "film", "label": "bad"}), get("/feedback")),
    "failed, livez": ask("failed", LIVEZ),
    "failed, readyz": ask("failed", get("/readyz")),
    "failed, one text": ask("failed", post()),
    "figures that are no numbers": ask("broken", post(), post_batch(), LIVEZ),
    # Overload.
    "overload": ask("full", post(BODY, WITH_KEY)),
    "overload, trailing slash": ask("full", post(BODY, WITH_KEY, path="/inference/")),
    "overload, batch": ask("full", post_batch(BATCH, WITH_KEY)),
    "overload, query": ask("full", post(BODY, WITH_KEY, path="/inference?why=not")),
    "overload, request id": ask("full", post(BODY, WITH_KEY, "X-Request-Id: mine")),
    "overload, broken JSON": ask("full", post(b"{", WITH_KEY)),
    "overload, body too large": ask("full", post(b" " * 5000, WITH_KEY)),
    "overload, chunks": ask("full", post_chunks(BODY, headers=(WITH_KEY,))),
    "overload, body that comes late": ask(
        "full", head("POST", "/inference", WITH_KEY, f"Content-Length: {len(BODY)}"), BODY + LIVEZ
    ),
    "overload, key missing": ask("full", post()),
    "overload, key wrong": ask("full", post(BODY, "X-API-Key: open")),
    "overload, wrong method": ask("full", get("/inference", WITH_KEY)),
    "overload, livez": ask("full", LIVEZ),
    "overload, readyz": ask("full", get("/readyz")),
    "overload, model": ask("full", get("/model", WITH_KEY)),
    "overload, HTTP/1.0": ask("full", post(BODY, WITH_KEY, http="1.0")),
    "overload, connection to be closed": ask("full", post(BODY, WITH_KEY, "Connection: close")),
    "overload, body announced by Expect": ask(
        "full", head("POST", "/inference", WITH_KEY, "Expect: 100-continue", f"Content-Length: {len(BODY)}")
    ),
    "overload, h2c offer": ask("full", post(BODY, WITH_KEY, *H2C)),
    "overload, pipelined": ask("full", (post(BODY, WITH_KEY) + LIVEZ + post_batch(BATCH, WITH_KEY), 3)),
    "overload, again and again": ask("full", *[post(BODY, WITH_KEY)] * 4),
    # Feedback.
    "feedback on an answer": ask(
        "fresh",
        post(BODY, "X-Request-Id: mine"),
        post_json("/feedback", {"request_id": "mine", "label": "bad"}),
        post_json("/feedback", {"request_id": "mine", "label": "bad"}),
        get("/feedback"),
    ),
    "feedback on a text of a batch": ask(
        "fresh",
        post_batch(b'{"texts": ["film", "", "good film"]}', "X-Request-Id: mine"),
        post_json("/feedback", {"request_id": "mine", "index": 2, "label": "good"}),
        get("/feedback"),
    ),
    "feedback on a text": ask("fresh", post_json("/feedback", {"text": "film", "label": "bad"}), get("/feedback")),
    "feedback, none yet": ask("fresh", get("/feedback")),
    "feedback, unknown request": ask("plain", post_json("/feedback", {"request_id": "nobody's", "label": "bad"})),
    "feedback, unknown label": ask("plain", post_json("/feedback", {"text": "film", "label": "awful"})),
    "feedback, label missing": ask("plain", post_json("/feedback", {"text": "film"})),
    "feedback, empty text": ask("plain", post_json("/feedback", {"text": " ", "label": "bad"})),
    "feedback, half a surrogate pair": ask(
        "plain", post(b'{"text": "\\ud800", "label": "bad"}', JSON, path="/feedback")
    ),
    "feedback, text and request": ask(
        "plain", post_json("/feedback", {"text": "film", "request_id": "mine", "label": "bad"})
    ),
    "feedback, index below zero": ask(
        "plain", post_json("/feedback", {"request_id": "mine", "index": -1, "label": "bad"})
    ),
    "feedback, broken JSON": ask("plain", post(b"{", JSON, path="/feedback")),
    "feedback, no content type": ask("plain", post(b'{"text": "film", "label": "none"}', path="/feedback")),
    "feedback, trailing slash": ask("plain", post(b"{}", JSON, path="/feedback/")),
    "feedback, wrong method": ask("plain", head("DELETE", "/feedback")),
    # Trainings.
    "retrain without a key": ask("plain", post(b"", path="/retrain")),
    "retrain, and again": ask(
        "keyed fresh",
        post(b"", WITH_KEY, path="/retrain"),
        post(b"", WITH_KEY, path="/retrain"),
        get("/jobs", WITH_KEY),
        get(LOCATION.decode(), WITH_KEY),
    ),
    "jobs, none yet": ask("plain", get("/jobs")),
    "job that does not exist": ask("plain", get("/jobs/nothing")),
    "retrain, wrong method": ask("plain", get("/retrain")),
}
