"""What may be shown, logged and stored: URLs without passwords, queries and fragments, texts without known secrets.

A password is not always quoted as it should be: it may hold `/`, `@`, `?` or spaces, and where it ends is then a guess.
Where two guesses are possible, the one that shows less is taken. All of it takes time linear in the text.
"""

import os
import re
from collections.abc import Mapping
from urllib.parse import quote, quote_plus, unquote

HIDDEN = "…"
SCHEME = re.compile(r"(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]{1,30}:/+")
TOKEN = re.compile(r"[^\s'\"<>`]+")
PORT = re.compile(r"[^:]*:\d{0,5}")
NAMES = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|HEADERS|CONNECTION_STRING)$", re.IGNORECASE)
"""How the names of variables end whose values are secrets."""
SHORTEST = 8
"""Characters below which a known secret is not searched for, since it may be a word."""

_known: re.Pattern[str] | None = None


def remember(environ: Mapping[str, str]) -> None:
    """Let `redact` know this process's secrets: values of variables that are named so, and what URLs hide."""
    global _known
    found: set[str] = set()
    for name, value in environ.items():
        value = value.strip().strip("'\"")
        found.update(_secrets_of(value))
        if NAMES.search(name) and "/" not in value[:1]:  # a path is the name of a secret
            found.update(value.split(","))
    quoted = {one: os.fsencode(one) for one in found}  # a variable may hold any bytes, as halves of surrogate pairs
    spelt = {form for one, raw in quoted.items() for form in (one, unquote(one), quote(raw), quote(raw, ""))}
    spelt |= {quote_plus(raw) for raw in quoted.values()}
    words = sorted((re.escape(one) for one in spelt if len(one) >= SHORTEST), key=len, reverse=True)
    _known = re.compile("|".join(words)) if words else None


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables without secrets: those that are named so, and URLs that hide one."""
    return {name: it for name, it in environ.items() if not NAMES.search(name) and not any(_secrets_of(it.strip()))}


def redact_url(url: str) -> str:
    """A path or URL as it may be shown: `https://me:secret@host/data.csv?sig=1` as `https://host/data.csv`."""
    before, rest = _split(url)
    if before:
        return before + _shown(rest)
    return rest.rpartition("@")[2] if _begins_with_user(rest) else url


def redact(text: str) -> str:
    """A text, an error message say, with its URLs as `redact_url` shows them, and without known secrets."""
    if _known is not None:
        text = _known.sub(HIDDEN, text)
    if ":/" in text:
        schemes = [found.span() for found in SCHEME.finditer(text)]
        ends = [begin for begin, _ in schemes[1:]] + [len(text)]
        begin = schemes[0][0] if schemes else len(text)
        parts = [text[:begin]]
        for (begin, behind), end in zip(schemes, ends, strict=False):
            parts += [text[begin:behind], _without_credentials(text[behind:end])]
        text = "".join(parts)
    return TOKEN.sub(_without_query, text) if "?" in text else text


def _split(url: str) -> tuple[str, str]:
    """What stands up to a URL's `//`, and what follows it; the first is empty if this is none."""
    scheme = SCHEME.search(url)
    end = scheme.end() if scheme else 2 * (url.startswith("//") and _begins_with_user(url[2:]))
    return url[:end], url[end:]


def _begins_with_user(rest: str) -> bool:
    """Whether `user:password@` stands before a host; where no scheme is, a path may hold these characters too."""
    user, colon, behind = rest.partition(":")
    return bool(colon) and "@" in behind and "/" not in user


def _shown(rest: str) -> str:
    """What follows a URL's `://`, without its secrets."""
    head = re.split("[/?#]", rest, maxsplit=1)[0]
    before, at, after = rest.rpartition("@")
    if at and ("@" in head or ":" in head):
        if "?" in before or "#" in before:
            return HIDDEN  # a query that holds an `@`, or a password that holds a `?`
        rest = after
    return re.split("[?#]", rest, maxsplit=1)[0]


def _without_credentials(chunk: str) -> str:
    """What follows a URL's `://` in a text, up to the next URL, without what stands before its host."""
    token = TOKEN.match(chunk)
    if token is None:
        return chunk
    end = token.end()
    head = re.split("[/?#]", token[0], maxsplit=1)[0]
    if ":" in head and "@" not in token[0] and not PORT.fullmatch(head.rstrip(".,;:)")):
        later = chunk.find("@", end)  # a password with spaces or quotes in it
        if later >= 0 and "\n" not in chunk[end:later]:
            rest = TOKEN.match(chunk, later + 1)
            end = rest.end() if rest else later + 1
    return _shown(chunk[:end]) + chunk[end:]


def _without_query(token: re.Match[str]) -> str:
    """A word without the query that it ends with; libraries name a URL by its path alone, too."""
    path, mark, query = token[0].partition("?")
    return path if path and mark and "=" in query else token[0]


def _secrets_of(url: str) -> list[str]:
    scheme, rest = _split(url)
    if not scheme and not _begins_with_user(rest):
        return []
    before, at, after = rest.rpartition("@")
    found = [before, before.partition(":")[2]] if at else []
    for mark in "?#":
        hidden = (after if at else rest).partition(mark)[2]
        found += [hidden, *(pair.partition("=")[2] for pair in re.split("[&;#]", hidden))]
    return found
