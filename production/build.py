"""Build the image, tag it and, if asked, push it.

    python production/build.py --help

Ends with 0 when all is done, with 2 when there was nothing to start with (a bad argument, no engine), else with 1.
Past 300 lines, because it is one file that needs nothing but the docker SDK (and ecr.py for Amazon's registries).
"""

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
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
RELEASE = r"[0-9]+(?:\.[0-9]+)*(?:(?:a|b|rc)[0-9]+)?(?:\.(?:post|dev)[0-9]+)?"
HUB_NAME, REVISION = r"[a-zA-Z0-9][\w.-]*(?:/[a-zA-Z0-9][\w.-]*)?", r"[\w./-]*"

TASKS = ("text-classification", "feature-extraction", "summarization", "text-generation")
PAIRED = ("ForConditionalGeneration", "EncoderDecoder", "MTModel", "T5WithLMHead")
FITTING = {
    "text-classification": ("ForSequenceClassification",),
    "summarization": PAIRED,
    "text-generation": ("ForCausalLM", "LMHead", *PAIRED),
}
"""What the names of architectures that fit a task contain. The import has the last word; this one is said at once."""
MODEL_FILES = (".json", ".txt", ".model", ".spm", ".jinja")
"""What is sent of a model's folder beside *.safetensors."""
TARGETS = ["job", "serve", "sagemaker", "lambda"]
TORCH_FREE = {"serve": "-serve", "lambda": "-lambda"}
"""Images of Dockerfile.serve, and what their names end with."""
METADATA = "metadata.json"
"""What a version of a store has, besides what Hugging Face's folders have."""
STORE = "/opt/baked"
"""Where Dockerfile.bake puts the store."""
FACTS = "/opt/venv/facts.json"
"""Where the Dockerfile leaves the versions of what was installed."""
SBOM = "/opt/venv/sbom.cdx.json"
"""Where the Dockerfiles leave the list of Python libraries that was made with cyclonedx-bom."""
ECR = r"([0-9]{12})\.dkr\.ecr(?:-fips)?\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?"
"""The registries of Amazon: account and region."""
CHUNK = 1 << 20

EXAMPLES = """\
examples:
  build.py
      build tuneserve:VERSION and tuneserve:latest
  build.py --version 1.2.0-SNAPSHOT
      a pre-release is tagged with its version alone, never as latest
  build.py --image-prefix registry.example.com/team --push
      build, push both tags and print their digests; `docker login` comes first, but for Amazon's registry
  build.py --base-image debian:bookworm-slim --build-arg PIP_EXTRA_INDEX_URL=https://wheels.example.com/cpu
      for machines without a GPU: no CUDA, and torch's CPU wheels from an index that holds them
  build.py --proxy http://proxy.example.com:3128
      reach the network through a proxy while building
  build.py --bake sshleifer/distilbart-cnn-12-6 --task summarization
      build tuneserve-distilbart-cnn-12-6, which holds the model and answers with no network and no volume
  build.py --base-image pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime --transformers 5.24.0
      on a base that brings Python and torch, with another transformers than the pinned one; the tag has the versions
  build.py --image-prefix 123456789012.dkr.ecr.eu-west-1.amazonaws.com --push
      log in by AWS's credential chain (boto3), make the repository if there is none, push
  build.py --target serve --base-image debian:trixie-slim
      build tuneserve-serve, a server without torch for a store that is mounted at /models
  build.py --target lambda --bake models/versions/ID --name reviews --build-arg ARCH=arm64
      build a function for AWS Lambda on Graviton, with a classifier that was trained here

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


@dataclass(frozen=True)
class Model:
    """A model to bake: its name, and either its folder or, on the hub, the revision; empty for the newest.

    A folder that is a version of a store has said its task.
    """

    name: str
    folder: Path | None = None
    revision: str = ""
    task: str = ""


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
    add("--name", type=named, help="name of the image (default: tuneserve; with --bake, tuneserve-MODEL)")
    about = "semantic version (default: the package's, %(default)s); a tag cannot hold `+`, which becomes `_`"
    add("--version", type=versioned, default=read_version(PACKAGE), help=about)
    about = "registry and path before the name"
    add("--image-prefix", "--image_prefix", type=prefixed, default="", metavar="PREFIX", help=about)
    add("--push", "--deploy", action="store_true", help="push what was built; needs --image-prefix")
    add("--base-image", metavar="IMAGE", help="Debian or Ubuntu image to build on (default: the Dockerfile's)")
    released = like(RELEASE, "use a version as PyPI has it, such as 5.24.0")
    about = "another transformers than the pinned one; the tag then has the versions, and is never latest"
    add("--transformers", type=released, metavar="VERSION", help=about)
    about = "another torch than the pinned one, or the base's own, which is then kept; the tag as above"
    add("--torch", type=released, metavar="VERSION", help=about)
    about = "an ARG of the Dockerfile, such as PIP_INDEX_URL; may be repeated"
    add("--build-arg", type=split_pair, action="append", default=[], metavar="KEY=VALUE", help=about)
    about = "proxy while building, with the no_proxy of your shell; the image does not keep it"
    add("--proxy", metavar="URL", help=about)
    about = "write the list of the image's Python libraries (SBOM, CycloneDX JSON) to a file"
    add("--sbom", type=Path, metavar="FILE", help=about)
    add("--no-cache", action="store_true", help="do every step anew")
    about = (
        "which image: one that serves and has no torch, for SageMaker, for AWS Lambda (with --bake), or for all else"
    )
    add("--target", choices=TARGETS, default="job", help=about)
    about = "put a model into the image: a Hugging Face folder, or NAME[@REVISION] on the hub (or MODEL_REVISION)"
    add("--bake", metavar="MODEL", help=about)
    add("--task", choices=TASKS, help=f"what the baked model does (default: {TASKS[0]})")
    options = parser.parse_args(arguments)
    if options.task and options.bake is None:
        parser.error(
            "--task says what a baked model does: name the model with --bake, or set TASK where the image runs"
        )
    if options.bake is not None and options.target == "sagemaker":
        parser.error("--bake makes an image of its own; the stage sagemaker has its models from the platform")
    if options.bake is None and options.target == "lambda":
        parser.error("--target lambda is an image with a model in it: name the model with --bake")
    if options.transformers and int(options.transformers.partition(".")[0]) < 5:
        parser.error("--transformers: the job's libraries need 5 or later (huggingface_hub 1, for one)")
    if options.target in TORCH_FREE and (options.transformers or options.torch):
        parser.error(f"--target {options.target} has neither transformers nor torch")
    try:
        options.model = None if options.bake is None else find_model(options.bake, options.task)
    except ValueError as error:
        parser.error(f"--bake {options.bake}: {error}")
    options.task = options.task or (options.model.task if options.model else "") or TASKS[0]
    options.name = options.name or name_image(options.model) + TORCH_FREE.get(options.target, "")
    if options.sbom and not options.sbom.absolute().parent.is_dir():
        parser.error(f"--sbom {options.sbom}: there is no folder {options.sbom.absolute().parent}")
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


def find_model(said: str, task: str | None) -> Model:
    """The model that the command line names, as far as it can be told without the job's libraries.

    Args:
        said: by `--bake`.
        task: that is asked for; None for the usual one, or that of a version.

    Raises:
        ValueError: it is neither a model's folder nor could be a name on the hub, or it does not fit the task.
    """
    path = os.path.expanduser(said)  # noqa: PTH111  (Path's raises where there is no such user)
    if not os.path.isdir(path):  # noqa: PTH112  (Path's raises when the name is too long)
        name, at, revision = said.partition("@")
        revision = revision if at else os.environ.get("MODEL_REVISION", "").strip()
        if not (re.fullmatch(HUB_NAME, name) and re.fullmatch(REVISION, revision)) or (at and not revision):
            raise ValueError("there is no such folder, and no name on the hub looks like that")
        return Model(name, revision=revision)
    folder = Path(os.path.abspath(path))  # noqa: PTH100  (with the name that was given, links or not)
    try:
        architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError, AttributeError):
        raise ValueError("the folder has no config.json that can be read: it is no Hugging Face model") from None
    if not any(folder.glob("*.safetensors")):
        raise ValueError("the folder has no *.safetensors; weights in pickles are not loaded")
    own = read_task(folder)
    if own and task and own != task:
        raise ValueError(f"it is a version for --task {own}, not for {task}")
    words = FITTING.get(own or task or TASKS[0], ("",))
    if architectures and not any(word in str(name) for name in architectures for word in words):
        raise ValueError(
            f"its config.json says {', '.join(map(str, architectures))}, which is not for --task {task or TASKS[0]}"
        )
    return Model(folder.name, folder, task=own)


def read_task(folder: Path) -> str:
    """The task of a version of a store; empty for any other folder.

    Raises:
        ValueError: its metadata cannot be read.
    """
    try:
        return str(json.loads((folder / METADATA).read_text(encoding="utf-8")).get("task") or TASKS[0])
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, AttributeError):
        raise ValueError(f"it is no version: its {METADATA} cannot be read") from None


def name_image(model: Model | None) -> str:
    """What an image is called unless --name says it: with a model in it, by that too."""
    words = re.findall(r"[a-z0-9]+", model.name.rpartition("/")[2].lower()) if model else []
    return "-".join(["tuneserve", *words])


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


def name_tags(name: str, version: str, prefix: str, facts: Mapping[str, str] | None = None) -> list[str]:
    """List what an image is called: by its version and, unless that is a pre-release, `latest`.

    Args:
        name: of the image.
        version: of the image.
        prefix: registry and path.
        facts: the versions in it, if the tag is to have them; no such image is `latest`.
    """
    repository = f"{prefix.rstrip('/')}/{name}" if prefix else name
    if facts:
        python, cuda = (facts[name].replace(".", "") for name in ("python", "cuda"))
        libraries = "-".join(name + facts[name].partition("+")[0] for name in ("transformers", "torch"))
        return [f"{repository}:{version.replace('+', '_')}-{libraries}-py{python}-{'cu' + cuda if cuda else 'cpu'}"]
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


def build_image(client: Any, arguments: dict[str, str], *, no_cache: bool, **what: Any) -> Any:
    """Build, tell the progress; return the image or raise BuildError.

    Args:
        client: of the engine.
        arguments: the ARGs of the Dockerfile.
        no_cache: do every step anew.
        what: the context and the stage, as the SDK calls them; by default the job's image.
    """
    options = {"buildargs": arguments, "nocache": no_cache, "rm": True, "forcerm": True, "decode": True}
    what = what if "fileobj" in what else {"path": str(CONTEXT)} | what
    return client.images.get(relay(client.api.build(**options, **what), "ID"))


def bake_image(
    client: Any, job: Any, on: Any, options: argparse.Namespace, given: Mapping[str, str], facts: Mapping[str, str]
) -> Any:
    """Put the model, which the job imports, on top of an image, with labels; return the image or raise BuildError.

    The labels come last, in a step of their own, since only what was imported says its hash and the hub's revision.
    """
    model, task = options.model, options.task
    asked = {"JOB": job.id} if on is job else {"JOB": job.id, "ON": on.id}
    asked |= {"TASK": task, "BAKED": f"/resources/{model.name}" if model.folder else model.name}
    if not model.folder:
        asked["MODEL_REVISION"] = model.revision
        if not re.fullmatch(r"[0-9a-f]{40}", model.revision):
            asked["ASKED"] = facts["CREATED"]  # what a name or a branch means may have changed since the last build
    context = stream_context(CONTEXT / "Dockerfile.bake", model.folder)
    built = build_image(client, {**given, **asked}, no_cache=options.no_cache, fileobj=context, custom_context=True)
    version, metadata = read_baked(client, built)
    base = metadata["base_model"]
    if model.task:  # what was imported is not the base
        base = {"revision": "", "sha256": metadata.get("sha256", {}).get("model.safetensors", "")}
    about = {name.lower(): value for name, value in facts.items()} | {
        "description": f"Serves {model.name} over HTTP ({task})."
    }
    labels = {f"org.opencontainers.image.{name}": value for name, value in about.items()} | {
        "tuneserve.task": task,
        "tuneserve.model": model.name,
        "tuneserve.model.revision": base["revision"],
        "tuneserve.model.sha256": base["sha256"],
        "tuneserve.model.version": version,
    }
    pairs = " ".join(f"{key}={quote(value)}" for key, value in labels.items())
    labelled = io.BytesIO(f"FROM {built.id}\nLABEL {pairs}\n".encode())  # the API's `labels` would be a step for each
    return build_image(client, {}, no_cache=options.no_cache, fileobj=labelled)


def quote(value: str) -> str:
    """A value as a Dockerfile takes it literally."""
    return json.dumps(value, ensure_ascii=False).replace("$", "\\$")


def stream_context(dockerfile: Path, model: Path | None) -> Iterator[bytes]:
    """A context with a Dockerfile and, as model/NAME/, what is read of a model: a tar that is made while it is sent."""
    files = {"Dockerfile": dockerfile}
    folders = ["model"]
    if model:
        whole = (model / METADATA).is_file()  # a version of a store, of which nothing is left out
        found = [
            path for pattern in ("*", "*/*") for path in model.glob(pattern) if whole or path.suffix in MODEL_FILES
        ]
        for path in sorted({*found, *model.glob("*.safetensors")}):
            relative = path.relative_to(model)
            if path.is_file() and not any(part.startswith(".") for part in relative.parts):
                files[f"model/{model.name}/{relative.as_posix()}"] = path
        folders += sorted({name.rpartition("/")[0] for name in files if "/" in name})
    for name in folders:
        entry = tarfile.TarInfo(name)
        entry.type, entry.mode = tarfile.DIRTYPE, 0o755
        yield entry.tobuf(tarfile.PAX_FORMAT)
    for name, path in files.items():
        with path.open("rb") as file:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = os.fstat(file.fileno()).st_size, 0o644
            yield entry.tobuf(tarfile.PAX_FORMAT)
            left = entry.size
            while left:
                chunk = file.read(min(left, CHUNK))
                if not chunk:
                    raise OSError(f"{path} became shorter while it was read")
                left -= len(chunk)
                yield chunk
        yield bytes(-entry.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


@contextmanager
def reading(client: Any, image: Any) -> Iterator[Callable[[str], str]]:
    """Open an image for its files: what reads one by its path."""
    container = client.containers.create(image.id)

    def read(path: str) -> str:
        chunks, _ = container.get_archive(path)
        with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
            file = archive.extractfile(archive.getmembers()[0])
            return file.read().decode() if file else ""

    try:
        yield read
    finally:
        container.remove()


def read_baked(client: Any, image: Any) -> tuple[str, dict[str, Any]]:
    """The id of the version in an image, and its metadata."""
    with reading(client, image) as read:
        version = read(f"{STORE}/champion").strip()
        return version, json.loads(read(f"{STORE}/versions/{version}/{METADATA}"))


def read_facts(client: Any, image: Any) -> dict[str, str]:
    """The versions of what is in an image, and the driver that a GPU needs."""
    with reading(client, image) as read:
        facts: dict[str, str] = json.loads(read(FACTS))
    needs = f"CUDA {facts['cuda']}, driver {facts['driver']} or later" if facts["cuda"] else "no CUDA"
    print(f"Python {facts['python']}, torch {facts['torch']}, transformers {facts['transformers']}, {needs}.")
    return facts


def find_login(image: str, *, create: bool = False) -> dict[str, str] | None:
    """User and password for an image in a registry of Amazon, None for others, which `docker login` is for.

    `create` makes the image's repository if there is none.

    Raises:
        BuildError: boto3 is missing, there are no credentials, or they do not suffice.
    """
    host, _, path = image.partition("/")
    found = re.fullmatch(ECR, host)
    if not found:
        return None
    import ecr

    try:
        registry = ecr.Registry(account=found[1], region=found[2])
        if create and registry.create(path):
            print(f"Made the repository {host}/{path}.")
        user, password = registry.credentials()
    except ecr.RegistryError as error:
        raise BuildError(f"{host}: {in_one_line(error)}") from error
    return {"username": user, "password": password}


def push_tag(client: Any, tag: str, login: Mapping[str, str] | None = None) -> str:
    """Push, by a login or else by those of `docker login`; tell the progress, return the digest or raise BuildError."""
    repository, _, version = tag.rpartition(":")
    return relay(client.api.push(repository, tag=version, stream=True, decode=True, auth_config=login), "Digest")


def relay(messages: Iterable[Mapping[str, Any]], wanted: str) -> str:
    """Print the engine's messages as they come; return the `wanted` part of the result.

    Raises:
        BuildError: with the words of the engine or the registry, which the SDK passes on as if they were progress; or
            with those of the check that refused the base image.
    """
    result = refusal = ""
    states: dict[str, str] = {}
    for message in messages:
        if "error" in message:
            raise BuildError(refusal or message["error"])
        result = (message.get("aux") or {}).get(wanted, result)
        said = describe(message, states)
        refusal = said.partition("REFUSED: ")[2].strip() if said.startswith("REFUSED: ") else refusal
        print(said, end="", flush=True)
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
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    facts = {"TITLE": options.name, "VERSION": options.version, "REVISION": read_revision(), "CREATED": created}
    base = {"BASE_IMAGE": options.base_image} if options.base_image else {}
    given = dict(options.build_arg)
    if options.proxy:
        exceptions = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "localhost,127.0.0.1"
        given = name_proxy(options.proxy, exceptions) | given
    for name in ("transformers", "torch"):
        if version := getattr(options, name):
            given[name.upper()] = version
    started = time.monotonic()
    warnings.filterwarnings("ignore", module="docker")  # an error says the same
    try:
        client = connect()
        if login := find_login(options.base_image or ""):
            client.login(**login, registry=options.base_image.partition("/")[0], reauth=True)
        fresh = partial(build_image, client, no_cache=options.no_cache)
        free = {"dockerfile": "Dockerfile.serve", "target": options.target} if options.target in TORCH_FREE else {}
        if options.model:  # on top of the stage without labels, which change from build to build and spoil the cache
            job = fresh(base | given, target="job")
            on = fresh(base | given, **free) if options.target == "serve" else job
            image = bake_image(client, job, on, options, given, facts)
            if options.target == "lambda":
                words = f"Serves {options.model.name} on AWS Lambda ({options.task})."
                labels = image.attrs["Config"]["Labels"] | {"org.opencontainers.image.description": words}
                asked = {"REQUIREMENTS": "requirements-lambda.txt", "BAKED": image.id}
                image = fresh(base | given | asked, **free, labels=labels)
        elif options.target == "job":  # whose labels are in the Dockerfile's last stage
            image = fresh(facts | base | given)
        else:
            about = {name.lower(): value for name, value in facts.items()} | {"licenses": "Apache-2.0"}
            labels = {f"org.opencontainers.image.{name}": value for name, value in about.items()}
            image = fresh(facts | base | given, **({"target": options.target} | free), labels=labels)
        versions = read_facts(client, image) if options.transformers or options.torch else None
        tags = name_tags(options.name, options.version, options.image_prefix, versions)
        for tag in tags:
            image.tag(tag)
        print(f"Built {' and '.join(tags)}: {image.attrs['Size'] / 1e9:.2f} GB in {time.monotonic() - started:.0f} s.")
        if options.sbom:
            with reading(client, image) as read:
                options.sbom.write_text(read(SBOM), encoding="utf-8")
        login = find_login(tags[0].rpartition(":")[0], create=True) if options.push else None
        for tag in tags if options.push else []:
            print(f"Pushed {tag}, digest {push_tag(client, tag, login)}.")
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
