"""Requests as other people's clients make them: encodings, browsers, hosts, slashes."""

import gzip
import json
from collections.abc import Iterator
from functools import partial

import pytest
from exchanges import JSON
from pydantic import SecretStr
from wire import BODY, Client, served, write

from tuneserve.errors import SettingsError
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings

GZIP = "Content-Encoding: gzip"
PAGE = "https://reviews.example"
packed = partial(gzip.compress, mtime=0)  # the same bytes, and so the same test, in every process


@pytest.fixture
def client(settings: Settings, slot: Slot) -> Iterator[Client]:
    with served(settings, slot) as port:
        client = Client(port)
        yield client
        client.close()


@pytest.mark.parametrize(
    ("content", "header", "status", "words"),
    [
        (packed(BODY), GZIP, 200, "good"),
        (packed(BODY), "content-encoding: x-GZIP", 200, "good"),
        (packed(BODY), f"{GZIP} ", 200, "good"),
        (packed(BODY), f"{GZIP}\t \t", 200, "good"),
        (BODY, "Content-Encoding: identity", 200, "good"),
        (BODY, "Content-Encoding: Identity ", 200, "good"),
        (packed(BODY + b" " * 5000), GZIP, 413, "larger than 4 KiB"),
        (packed(b" " * (64 << 20)), GZIP, 413, "larger than 4 KiB"),
        (packed(BODY)[:-3], GZIP, 422, "not gzip"),
        (packed(BODY) * 2, GZIP, 422, "not gzip"),
        (BODY, GZIP, 422, "not gzip"),
        (b"", GZIP, 422, "not gzip"),
        (BODY, "Content-Encoding: br", 415, "gzip"),
        (BODY, "Content-Encoding: gzip, gzip", 415, "gzip"),
    ],
)
def test_a_packed_body_is_read_within_the_bounds_of_an_unpacked_one(
    client: Client, content: bytes, header: str, status: int, words: str
) -> None:
    found, _, answer = client.ask(write(content[: 1 << 20], header))
    if len(content) > 4096:  # refused by its length alone
        assert found == 413
    else:
        assert (found, words in answer.decode()) == (status, True), answer
    assert client.ask(write())[0] == 200


@pytest.mark.parametrize("path", ["/inference", "/inference/batch", "/feedback"])
@pytest.mark.parametrize("body", ['{"text": "café"}'.encode("latin-1"), b'{"text": "\xff"}'])
def test_a_body_that_is_not_utf8_is_told_so(client: Client, path: str, body: bytes) -> None:
    status, _, answer = client.ask(write(body, JSON, path=path))
    assert status == 422
    assert json.loads(answer)["detail"] == [{"loc": ["body"], "msg": "the body is not UTF-8", "type": "json_invalid"}]


@pytest.mark.parametrize("text", ["<br/>", "<br><BR />\n", "\u200b", "\ufeff\u00ad", "\0"])
def test_a_text_without_anything_to_see_is_empty(client: Client, text: str) -> None:
    status, _, answer = client.ask(write(json.dumps({"text": text}).encode()))
    assert (status, "the text is empty" in answer.decode()) == (422, True)
    body = json.dumps({"text": text, "label": "good"}).encode()
    assert client.ask(write(body, JSON, path="/feedback"))[0] in (404, 422)


def preflight(path: str = "/inference", origin: str = PAGE) -> bytes:
    lines = [f"OPTIONS {path} HTTP/1.1", "Host: a", f"Origin: {origin}", "Access-Control-Request-Method: POST"]
    return "\r\n".join(
        [*lines, "Access-Control-Request-Headers: content-type, content-encoding, x-api-key", "", ""]
    ).encode()


@pytest.mark.parametrize(
    ("origins", "allowed"), [("", None), (PAGE, PAGE), (f"http://b:81, {PAGE}", PAGE), ("*", "*"), ("http://b", None)]
)
def test_a_browsers_page_may_ask_if_its_origin_may(
    settings: Settings, slot: Slot, origins: str, allowed: str | None
) -> None:
    origins = Settings.from_environ({"CORS_ORIGINS": origins}).cors_origins
    changed = settings.model_copy(update={"cors_origins": origins, "api_key": SecretStr("secret")})
    with served(changed, slot) as port:
        client = Client(port)
        status, headers, _ = client.ask(preflight())
        assert status == (401 if not origins else 200 if allowed else 400)
        assert headers.get("access-control-allow-origin") == allowed
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-request-id"]
        for request, status in ((write(BODY, "X-API-Key: secret", f"Origin: {PAGE}"), 200), (write(BODY), 401)):
            found, headers, _ = client.ask(request)
            assert found == status
        found, headers, _ = client.ask(write(BODY, f"Origin: {PAGE}"))
        assert (found, headers.get("access-control-allow-origin")) == (401, allowed)
        client.close()


@pytest.mark.parametrize("origins", ["reviews.example", "https://a/b", "https://*.a", "ftp://a", "null"])
def test_what_is_no_origin_is_refused(origins: str) -> None:
    with pytest.raises(SettingsError, match="CORS_ORIGINS"):
        Settings.from_environ({"CORS_ORIGINS": origins})


def head(method: str, path: str, *headers: str, http: str = "1.1") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{http}", *headers, "", ""]).encode()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (head("GET", "/livez"), 400),
        (head("GET", "/livez", "Host: a", "Host: b"), 400),
        (head("GET", "/livez", "Host: a", "host: a"), 400),
        (head("GET", "/livez", "Host: a", "Host: b", http="1.0"), 400),
        (head("GET", "/livez", http="1.0"), 200),
        (head("GET", "/livez", "Host:"), 200),
        (head("POST", "/inference", "Transfer-Encoding: chunked") + b"0\r\n\r\n", 400),
        (head("POST", "/inference", "Host: a", "Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n", 501),
        (head("POST", "/inference", "Host: a", "Transfer-Encoding: gzip", "Transfer-Encoding: chunked"), 501),
        (head("POST", "/nothing", "Host: a", "Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n", 501),
        (head("POST", "/inference", "Host: a", "Transfer-Encoding: Chunked") + b"0\r\n\r\n", 422),
    ],
)
def test_a_head_that_can_be_read_in_two_ways_ends_the_connection(client: Client, request_: bytes, status: int) -> None:
    found, headers, _ = client.ask(request_)
    assert found == status
    if status in (400, 501):
        assert headers["connection"] == "close"
        assert client.read()[0] == 0


@pytest.mark.parametrize("path", ["/livez/", "/model/", "/feedback/", "//evil.example/", "/nothing/", "/jobs/a/"])
def test_nobody_is_sent_to_another_address(client: Client, path: str) -> None:
    status, headers, _ = client.ask(head("GET", path, "Host: evil.example"))
    assert "location" not in headers
    assert not 300 <= status < 400
    assert status == client.ask(head("GET", path.rstrip("/"), "Host: a"))[0]
