"""Whether servers answer that a training would ask: in a bounded time, and without reading what they have."""

from base64 import b64encode
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.parse import quote, unquote_to_bytes, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tuneserve.errors import TuneserveError
from tuneserve.logs import in_one_line
from tuneserve.redaction import redact_url


class UnreachableError(TuneserveError):
    """A server does not answer, or does not give what is wanted of it."""


class _Redirects(HTTPRedirectHandler):
    """Follows none: a server that redirects has answered."""

    def redirect_request(self, *_: object) -> None:
        """Nowhere."""


def ask(url: str, *, timeout_s: float, token: str | None = None) -> int:
    """The status that a server answers a GET with; a user and password in the URL are sent as they should be.

    Raises:
        UnreachableError: there is no answer within so many seconds, or this is no URL.
    """
    try:
        parts = urlsplit(url)
        user, _, host = parts.netloc.rpartition("@")
        request = Request(parts._replace(netloc=host, fragment="").geturl())
        if token:
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        elif user:
            basic = b64encode(unquote_to_bytes(user)).decode()
            request.add_unredirected_header("Authorization", f"Basic {basic}")
        with build_opener(_Redirects).open(request, timeout=timeout_s) as answer:
            return int(answer.status)
    except HTTPError as error:
        error.close()
        return error.code
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)  # a URLError has the real one
        said = in_one_line(reason if isinstance(reason, BaseException) else error).rstrip(".")
        raise UnreachableError(
            f"{redact_url(url)} does not answer: {said}. Check the address and the network."
        ) from error


def ask_hub(kind: str, name: str, *, timeout_s: float) -> None:
    """Make sure that the Hugging Face hub has one of its `models` or `datasets`.

    Raises:
        UnreachableError: it does not have it, wants a token for it, does not answer, or is not to be asked.
    """
    import huggingface_hub.constants as hub
    from huggingface_hub import get_token

    if hub.HF_HUB_OFFLINE:
        raise UnreachableError(f"{name} is not here, and HF_HUB_OFFLINE is set: unset it, or name a local folder.")
    try:
        status = ask(f"{hub.ENDPOINT}/api/{kind}/{quote(name)}", timeout_s=timeout_s, token=get_token())
    except UnreachableError as error:
        raise UnreachableError(f"{name} is not here, and {error} Or name a local folder.") from error
    if status in (401, 403, 404):
        raise UnreachableError(
            f"{name} is not here, and the hub has none or wants a token ({status}). Correct the name, or set HF_TOKEN."
        )
    if status >= 400:
        raise UnreachableError(f"{name} is not here, and the hub answers with status {status}. Ask again later.")


def look_up(url: str, *, timeout_s: float) -> None:
    """Make sure that there is something at a URL, of HTTP or of another of fsspec's file systems.

    Raises:
        UnreachableError: there is not, it is not given, or nobody answers; a file system's own time may be longer.
    """
    if url.startswith(("http://", "https://")):
        if (status := ask(url, timeout_s=timeout_s)) >= 400:
            raise UnreachableError(
                f"{redact_url(url)} answers with status {status}. Check the address and its credentials."
            )
        return
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(url)
        files.info(path)
    except Exception as error:  # each file system raises exceptions of its own library
        raise UnreachableError(
            f"{redact_url(url)} cannot be found: {in_one_line(error)}. Check the address and its credentials."
        ) from error
