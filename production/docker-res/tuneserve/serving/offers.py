"""Requests that offer another protocol, as Java's client and `curl --http2` always do, read as if they did not."""

from collections.abc import Iterable
from typing import Any

import httptools


class Parser(httptools.HttpRequestParser):
    """httptools' parser, which takes no body of a request that offers another protocol: it keeps what follows the head.

    Args:
        protocol: whose methods are called.
    """

    def __init__(self, protocol: Any) -> None:
        super().__init__(protocol)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self.untaken: bytes | None = None

    def feed_data(self, data: bytes) -> None:  # type: ignore[override]
        """See httptools."""
        try:
            super().feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self.untaken = data[upgrade.args[0] :]


def head_without_offer(method: bytes, url: bytes, version: str, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The head of a request as bytes, its header names in lower case."""
    lines = [b"%b %b HTTP/%b" % (method, url, version.encode())]
    for name, value in headers:
        if name == b"connection":
            value = b",".join(one for one in value.split(b",") if one.strip().lower() != b"upgrade")
        if name != b"upgrade" and value:
            lines.append(b"%b: %b" % (name, value))
    return b"\r\n".join([*lines, b"", b""])
