"""Requests that can be refused without a parser: there as a whole, and as plain as nearly all are."""

import re

HEAD = re.compile(rb"POST (/inference|/inference/batch) HTTP/1\.1\r\n((?:[\w-]+: [^\x00-\x08\x0a-\x1f\x7f]*\r\n)+)\r\n")

TELLING = re.compile(
    rb"^(content-length|x-request-id|x-api-key|authorization|connection|expect|transfer-encoding|upgrade): ([^\r]*)",
    re.IGNORECASE | re.MULTILINE,
)
"""The headers that the door looks at."""

FOR_A_PARSER = {b"connection", b"expect", b"transfer-encoding", b"upgrade"}
"""Those that say where the request ends, and what may follow it."""

Headers = list[tuple[bytes, bytes]]


def see_whole_request(data: bytes) -> tuple[str, Headers] | None:
    """The path of a request to the engine, and those of its headers that matter to a refusal, names in lower case.

    Args:
        data: all that has come since the request before.

    Returns:
        None if this is not exactly one whole request, or if it takes more than a glance to know.
    """
    head = HEAD.match(data)
    if head is None:
        return None
    headers = [(name.lower(), value) for name, value in TELLING.findall(head[2])]
    told = dict(headers)
    plain = len(told) == len(headers) and told.keys().isdisjoint(FOR_A_PARSER)
    whole = told.get(b"content-length") == b"%d" % (len(data) - head.end())
    return (head[1].decode(), headers) if plain and whole else None
