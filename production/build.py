"""Build the image, tag it and, if asked, push it.

    python production/build.py --help

Ends with 0 when all is done, with 2 when there was nothing to start with (a bad argument, no engine), else with 1.
"""

import argparse
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

try:
    import docker
    import docker.credentials.errors
    import requests
    import urllib3
except ModuleNotFoundError:
    sys.exit("build.py needs the docker SDK: run `make setup`, then `.venv/bin/python production/build.py`")

CONTEXT = Path(__file__).resolve().parent
PACKAGE = CONTEXT / "docker-res" / "tuneserve" / "__init__.py"

ENGINE_ANSWERS_WITHIN_S = 10
PUSH_IS_SILENT_AT_MOST_S = 600

# A version as https://semver.org (2.0.0) defines it, names as Docker's image references allow them.
NUMBER, WORD = r"(?:0|[1-9][0-9]*)", r"(?:0|[1-9][0-9]*|[0-9]*[a-zA-Z-][0-9a-zA-Z-]*)"
VERSION = rf"{NUMBER}\.{NUMBER}\.{NUMBER}(?:-{WORD}(?:\.{WORD})*)?(?:\+[0-9a-zA-Z-]+(?:\.[0-9a-zA-Z-]+)*)?"
NAME = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
HOST = r"[a-zA-Z0-9-]+(?:\.[a-zA-Z0-9-]+)+(?::[0-9]+)?|[a-zA-Z0-9-]+:[0-9]+"
PREFIX = rf"(?:(?:{HOST}|{NAME})(?:/{NAME})*/?)?"

EXAMPLES = """\
examples:
  build.py
      build tuneserve:VERSION and tuneserve:latest
  build.py --version 1.2.0-SNAPSHOT
      a pre-release is tagged with its version alone, never as latest
  build.py --image-prefix registry.example.com/team --push
      build, push both tags and print their digests; `docker login` comes first
  build.py --base-image debian:bookworm-slim --build-arg PIP_EXTRA_INDEX_URL=https://wheels.example.com/cpu
      for machines without a GPU: no CUDA, and torch's CPU wheels from an index that holds them
  build.py --proxy http://proxy.example.com:3128
      reach the network through a proxy while building

The engine is the one that DOCKER_HOST names, else this machine's.
"""


class BuildError(Exception):
    """The engine or the registry refused; the message has its words."""


FAILURES = (
    *(docker.errors.DockerException, docker.credentials.errors.StoreError),
    *(requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError),
)
"""What the SDK raises: its own errors, those of credential helpers, of HTTP, of sockets, and of what is no JSON."""


class NoEngineError(Exception):
    """No Docker engine answers."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad argument ends the program with 2."""
    parser = argparse.ArgumentParser(
        prog="build.py",
        description="Build the image, tag it and, if asked, push it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    named = like(NAME, "use lower-case letters and digits, joined by '.', '_' or '-'")
    versioned = like(VERSION, "use a semantic version, such as 1.2.0, 1.2.0-rc.1 or 1.2.0-SNAPSHOT")
    prefixed = like(PREFIX, "use HOST[:PORT][/PATH] or PATH, without https://, with the path in lower case")
    add = parser.add_argument
    add("--name", type=named, default="tuneserve", help="name of the image (default: %(default)s)")
    about = "semantic version (default: the package's, %(default)s); a tag cannot hold `+`, which becomes `_`"
    add("--version", type=versioned, default=read_version(PACKAGE), help=about)
    about = "registry and path before the name"
    add("--image-prefix", "--image_prefix", type=prefixed, default="", metavar="PREFIX", help=about)
    add("--push", "--deploy", action="store_true", help="push what was built; needs --image-prefix")
    add("--base-image", metavar="IMAGE", help="Debian or Ubuntu image to build on (default: the Dockerfile's)")
    about = "an ARG of the Dockerfile, such as PIP_INDEX_URL; may be repeated"
    add("--build-arg", type=split_pair, action="append", default=[], metavar="KEY=VALUE", help=about)
    about = "proxy while building, with the no_proxy of your shell; the image does not keep it"
    add("--proxy", metavar="URL", help=about)
    add("--no-cache", action="store_true", help="do every step anew")
    options = parser.parse_args(arguments)
    if options.push and not options.image_prefix:
        parser.error("--push needs --image-prefix: a bare name would go to Docker Hub's own library")
    return options


def like(pattern: str, advice: str) -> Callable[[str], str]:
    """Make a check for argparse: a value that the whole pattern matches passes, any other gets the advice."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise argparse.ArgumentTypeError(f"{value!r}: {advice}")
        return value

    return check


def split_pair(value: str) -> tuple[str, str]:
    """Split KEY=VALUE at the first `=`, else raise ArgumentTypeError."""
    key, equals, content = value.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{value!r}: use KEY=VALUE")
    return key, content


def read_version(module: Path) -> str:
    """Read `__version__` without importing its module, which would need the job's libraries."""
    found = re.search(r'^__version__.*?= *["\'](.*?)["\']', module.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else "no __version__"


def read_revision() -> str:
    """Ask git for the commit, with `-dirty` when files differ from it; empty without git or outside a clone."""
    command = ["git", "-C", str(CONTEXT), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def name_tags(name: str, version: str, prefix: str) -> list[str]:
    """List what an image is called: by its version and, unless that is a pre-release, `latest`."""
    repository = f"{prefix.rstrip('/')}/{name}" if prefix else name
    released = "-" not in version.partition("+")[0]
    return [f"{repository}:{version.replace('+', '_')}", *([f"{repository}:latest"] if released else [])]


def name_proxy(url: str, exceptions: str) -> dict[str, str]:
    """Spell a proxy as programs look for it. The builder knows these arguments and leaves them out of the image."""
    variables = {"HTTP_PROXY": url, "HTTPS_PROXY": url, "NO_PROXY": exceptions}
    return variables | {name.lower(): value for name, value in variables.items()}


def connect() -> Any:
    """Return a client of the engine, or raise NoEngineError."""
    try:
        client = docker.from_env(timeout=ENGINE_ANSWERS_WITHIN_S)
        client.ping()
    except FAILURES as error:
        place = os.environ.get("DOCKER_HOST", "this machine's socket")
        said = f"no Docker engine answers at {place}: start one or set DOCKER_HOST. {in_one_line(error)}"
        raise NoEngineError(said) from error
    client.api.timeout = PUSH_IS_SILENT_AT_MOST_S
    return client


def put_into_words(error: Exception) -> str:
    """Say what went wrong in one line, and what helps if it is the helper that keeps the registries' passwords."""
    said = in_one_line(error)
    if not isinstance(error, docker.credentials.errors.StoreError) and "Credentials store error" not in said:
        return said
    config = f"{os.environ.get('DOCKER_CONFIG', '~/.docker')}/config.json"
    return (
        f"the credential helper that {config} names cannot be asked: install it, or remove its credsStore or "
        f"credHelpers line. {said}"
    )


def in_one_line(error: Exception) -> str:
    """The words of a library, without line breaks and not too many."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 400 else f"{said[:200]} … {said[-200:]}"


def build_image(client: Any, tags: list[str], arguments: dict[str, str], *, no_cache: bool) -> Any:
    """Build, tell the progress, tag; return the image or raise BuildError."""
    options = {"buildargs": arguments, "nocache": no_cache, "rm": True, "forcerm": True, "decode": True}
    image = client.images.get(relay(client.api.build(path=str(CONTEXT), **options), "ID"))
    for tag in tags:
        image.tag(tag)
    return image


def push_tag(client: Any, tag: str) -> str:
    """Push, tell the progress; return the digest or raise BuildError."""
    repository, _, version = tag.rpartition(":")
    return relay(client.api.push(repository, tag=version, stream=True, decode=True), "Digest")


def relay(messages: Iterable[Mapping[str, Any]], wanted: str) -> str:
    """Print the engine's messages as they come; return the `wanted` part of the result.

    Raises:
        BuildError: with the words of the engine or the registry, which the SDK passes on as if they were progress.
    """
    result = ""
    states: dict[str, str] = {}
    for message in messages:
        if "error" in message:
            raise BuildError(message["error"])
        result = (message.get("aux") or {}).get(wanted, result)
        print(describe(message, states), end="", flush=True)
    if not result:
        raise BuildError("the engine fell silent before the end")
    return result


def describe(message: Mapping[str, Any], states: dict[str, str]) -> str:
    """Put a message into words; a layer's progress only when its state, kept in `states`, changes."""
    layer, status = message.get("id", ""), message.get("status", "")
    if not status:
        return re.sub(r"\x1b\[[0-9;]*m", "", message.get("stream", ""))
    if layer and states.get(layer) == status:
        return ""
    states[layer] = status
    return f"{layer}: {status}\n" if layer else f"{status}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, tag and push as the command line says; return the exit status."""
    options = parse_arguments(arguments)
    tags = name_tags(options.name, options.version, options.image_prefix)
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    build_args = {"TITLE": options.name, "VERSION": options.version, "REVISION": read_revision(), "CREATED": created}
    if options.base_image:
        build_args["BASE_IMAGE"] = options.base_image
    if options.proxy:
        exceptions = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "localhost,127.0.0.1"
        build_args |= name_proxy(options.proxy, exceptions)
    started = time.monotonic()
    warnings.filterwarnings("ignore", module="docker")  # an error says the same
    try:
        client = connect()
        image = build_image(client, tags, build_args | dict(options.build_arg), no_cache=options.no_cache)
        print(f"Built {' and '.join(tags)}: {image.attrs['Size'] / 1e9:.2f} GB in {time.monotonic() - started:.0f} s.")
        for tag in tags if options.push else []:
            print(f"Pushed {tag}, digest {push_tag(client, tag)}.")
    except NoEngineError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 2
    except (BuildError, *FAILURES) as error:
        print(f"build.py: {put_into_words(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
