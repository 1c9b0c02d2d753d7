"""A job's variables as a file that `docker run --env-file` reads: written by a notebook that has chosen them.

Docker takes a line as NAME=value to its end, quotes and spaces included; only a line that begins with `#` is a comment.
"""

from collections.abc import Mapping
from pathlib import Path

from tuneserve.errors import SettingsError
from tuneserve.files import replace_file
from tuneserve.redaction import redact_url
from tuneserve.settings import Settings, is_secret

USE = "# Use: docker run --env-file FILE ... train   A value goes to the end of its line: no quotes, no comment."

MAX_LINE_BYTES = (64 << 10) - 1
"""What Docker reads of a line; a longer one is an error there."""


def write_env_file(path: Path, chosen: Mapping[str, str]) -> None:
    """Write these variables, in their order, and nothing else: what is not chosen keeps the job's default.

    Raises:
        SettingsError: a name is no variable of the job, a value is a secret or is not a line, or the job would refuse
            these variables; nothing is written then.
        OSError: the disk refuses.
    """
    problems = [f"  {name}: {problem}" for name, value in chosen.items() if (problem := _problem(name, value))]
    if problems:
        raise SettingsError("\n".join(["These variables cannot be put into an environment file:", *problems]))
    Settings.from_environ(chosen)
    lines = [USE, *(f"{name}={value}" for name, value in chosen.items())]
    replace_file(path, "".join(f"{line}\n" for line in lines).encode())


def _problem(name: str, value: str) -> str | None:
    """Why a variable cannot be in the file; None if it can."""
    if name.lower() not in Settings.model_fields or name != name.upper():
        return "the job has no such variable."
    if is_secret(name.lower()) or redact_url(value) != value:
        return "a secret, or a URL that may hold one, does not belong in a file; set it where the job runs."
    if any(character in value for character in "\r\n\0"):
        return "its value holds a line break or a NUL character."
    if len(f"{name}={value}".encode(errors="replace")) > MAX_LINE_BYTES:
        return f"its line is longer than the {MAX_LINE_BYTES} bytes that Docker reads."
    return None


def read_env_file(path: Path) -> dict[str, str]:
    """The variables of an environment file as Docker would pass them on, exactly; of a repeated one the last.

    Raises:
        SettingsError: naming the line that Docker refuses, or whose value it would take from the shell.
        OSError: the file cannot be read.
    """
    found = {}
    for number, raw in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            line = raw.removesuffix(b"\r").decode().lstrip()
        except UnicodeDecodeError:
            raise SettingsError(f"{path}, line {number} is not UTF-8 text.") from None
        if len(raw) > MAX_LINE_BYTES:
            raise SettingsError(f"{path}, line {number} is longer than the {MAX_LINE_BYTES} bytes that Docker reads.")
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not name or any(character.isspace() for character in name):
            raise SettingsError(f"{path}, line {number} should be NAME=value, without spaces in the name.")
        found[name] = value
    return found
