"""A real engine, real registries, the real image built once; whatever is started here is removed at the end.

`.ci/engine.sh` provides all of it on a bare Debian; without it these tests skip. TUNESERVE_BASE_IMAGE names the
image to build on, where the Dockerfile's own cannot be pulled.
"""

import gc
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.errors import DockerException

PROJECT = Path(__file__).resolve().parents[2]
BUILD = PROJECT / "production" / "build.py"
NAME, VERSION = "tuneserve-test", "1.2.3"
JSON = {"Content-Type": "application/json"}
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def eventually(ask: Callable[[], bool], *, within_s: float) -> bool:
    """Ask until the answer is yes; whether it came in time."""
    deadline = time.monotonic() + within_s
    while not ask():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def base_image_option() -> list[str]:
    """What build.py has to be told about the base image here."""
    base = os.environ.get("TUNESERVE_BASE_IMAGE")
    return ["--base-image", base] if base else []


def run_build(*options: str, script: Path = BUILD, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run build.py as a user does, from a folder that is not its own."""
    command = [sys.executable, str(script), *options]
    return subprocess.run(command, cwd="/", env=os.environ | environ, capture_output=True, text=True)


@pytest.fixture(scope="session")
def engine() -> Iterator[Any]:
    """A client of the engine."""
    client: Any = None
    reason = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the SDK leaves the socket of a failed attempt open
        try:
            client = docker.from_env()
            client.ping()
        except DockerException as error:
            reason = str(error)
        gc.collect()
    if reason:
        pytest.skip(f"no Docker engine answers (.ci/engine.sh starts one): {reason}")
    yield client
    client.close()


def _reach(variable: str, default: str) -> str:
    address = os.environ.get(variable, default)
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError as error:
        pytest.skip(f"no registry answers at {address}: {error}")
    return address


@pytest.fixture(scope="session")
def registry(engine: Any) -> str:
    """Address of a registry that takes every push."""
    return _reach("TUNESERVE_REGISTRY", "127.0.0.1:5000")


@pytest.fixture(scope="session")
def denying_registry(engine: Any) -> str:
    """Address of a registry that denies every push."""
    return _reach("TUNESERVE_DENYING_REGISTRY", "127.0.0.1:5001")


@pytest.fixture(scope="session")
def image(engine: Any) -> Any:
    """The image, built by build.py. It stays, so that the next run finds its layers; the one it replaces goes."""
    replaced = [one.id for one in engine.images.list(NAME)]
    done = run_build("--name", NAME, "--version", VERSION, *base_image_option())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    built = engine.images.get(f"{NAME}:{VERSION}")
    for one in replaced:
        engine.images.remove(one, force=True)
    return built


class Job:
    """A container of the image."""

    def __init__(self, container: Any) -> None:
        self.container = container

    @property
    def log(self) -> str:
        """Everything it has printed."""
        return str(self.container.logs().decode())

    def says(self, words: str, *, within_s: float = 300) -> None:
        """Wait until it prints these words."""
        eventually(lambda: words in self.log or self._ended(), within_s=within_s)
        assert words in self.log

    def is_ready(self, *, within_s: float = 300) -> None:
        """Wait until it serves."""
        eventually(lambda: self.get("/readyz")[0] == 200 or self._ended(), within_s=within_s)
        assert self.get("/readyz")[0] == 200, self.log

    def ends(self, *, within_s: float = 300) -> int:
        """Wait until it ends; return its exit code."""
        assert eventually(self._ended, within_s=within_s), self.log
        return int(self.container.attrs["State"]["ExitCode"])

    def get(self, path: str) -> tuple[int, Any]:
        """Request a path; status 0 when no one answers."""
        return self._call(path)

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Send JSON to a path; status 0 when no one answers."""
        return self._call(path, json.dumps(body).encode(), headers)

    def read(self, path: str) -> str:
        """A file in it, also after its end."""
        chunks, _ = self.container.get_archive(path)
        with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
            file = archive.extractfile(archive.getmembers()[0])
            assert file is not None, f"{path} is no file"
            return file.read().decode()

    def libraries(self) -> dict[str, str]:
        """The versions of the Python libraries that its image lists."""
        listed = json.loads(self.read("/opt/venv/sbom.cdx.json"))
        assert (listed["bomFormat"], listed["specVersion"]) == ("CycloneDX", "1.6")
        return {one["name"]: one["version"] for one in listed["components"]}

    def _call(self, path: str, data: bytes | None = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        self.container.reload()  # after a restart the port is another one
        published = next((bound for bound in (self.container.ports or {}).values() if bound), None)
        if not published:
            return 0, None
        url = f"http://127.0.0.1:{published[0]['HostPort']}{path}"
        try:
            with DIRECT.open(urllib.request.Request(url, data, JSON | (headers or {})), timeout=60) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)
        except OSError:
            return 0, None

    def _ended(self) -> bool:
        self.container.reload()
        return bool(self.container.status in ("exited", "dead"))


@pytest.fixture(scope="module")
def volume(engine: Any) -> Iterator[Callable[[], str]]:
    """Make an empty volume."""
    volumes: list[Any] = []

    def make() -> str:
        volumes.append(engine.volumes.create())
        return str(volumes[-1].name)

    yield make
    for one in volumes:
        one.remove(force=True)


@pytest.fixture(scope="module")
def jobs(volume: Any) -> Iterator[list[Job]]:
    """The containers of a module; it asks for `volume` so as to be cleared before the volumes are."""
    started: list[Job] = []
    yield started
    for job in started:
        job.container.remove(force=True, v=True)


@pytest.fixture(scope="module")
def start(engine: Any, image: Any, jobs: list[Job]) -> Callable[..., Job]:
    """Start a container, as `docker run -d IMAGE [VERB]` does, with port 8000 published; `of` is another image."""

    def run(verb: str | list[str] | None = None, *, models: str = "", of: Any = None, **options: Any) -> Job:
        if models:
            options["volumes"] = {models: {"bind": "/models"}}
        options.setdefault("ports", {"8000/tcp": ("127.0.0.1", None)})
        jobs.append(Job(engine.containers.create((of or image).id, verb, **options)))
        jobs[-1].container.start()
        return jobs[-1]

    return run


@pytest.fixture(scope="module")
def start_by_command(engine: Any, image: Any, jobs: list[Job]) -> Callable[..., Job]:
    """Start a container by the docker command itself, whose options (--env-file) the SDK does not all have."""

    def run(*options: str, verb: str) -> Job:
        try:
            created = subprocess.run(["docker", "create", *options, image.id, verb], capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no docker command")
        assert created.returncode == 0, created.stderr
        jobs.append(Job(engine.containers.get(created.stdout.strip())))
        jobs[-1].container.start()
        return jobs[-1]

    return run
