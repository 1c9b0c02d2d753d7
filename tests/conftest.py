"""What several test modules share: processes of their own, a hub, a web server and a small disk, all of them real."""

import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tuneserve.settings import PROJECT, Settings

PACKAGE = PROJECT / "production" / "docker-res"

FOREIGN = ("HF_", "MLFLOW_", "OTEL_", "PET_", "TRANSFORMERS_")
"""How variables begin that libraries read."""
REQUIRE_ALL = os.environ.get("TUNESERVE_REQUIRE_ALL") == "1"


OFFLINE = [
    ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_HUB_OFFLINE"),
    ("datasets.config", "HF_DATASETS_OFFLINE"),
]
"""Where the hub's libraries keep that they ask nobody, as a job's process tells them when nobody answers."""


def is_foreign(name: str) -> bool:
    """Whether an environment variable of whoever runs the tests would change what is tested."""
    name = name.upper()
    return name.lower() in Settings.model_fields or name.startswith(FOREIGN) or name.endswith("_PROXY")


for _name in filter(is_foreign, list(os.environ)):  # here, before anything reads them, and for all child processes
    del os.environ[_name]


@pytest.fixture(scope="module", autouse=True)
def unchanged() -> Iterator[None]:
    """What a module changes in this process ends with it: variables, the log's level, and whether the hub is asked."""
    environment, level = dict(os.environ), logging.getLogger().level
    hub = {(name, key): getattr(sys.modules.get(name), key, False) for name, key in OFFLINE}
    yield
    os.environ.clear()
    os.environ.update(environment)
    logging.getLogger().setLevel(level)
    for (name, key), value in hub.items():
        if name in sys.modules:
            setattr(sys.modules[name], key, value)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write the server's transcript anew instead of checking it")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where torch can use none."""
    if item.get_closest_marker("gpu"):
        torch: Any = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("no GPU is here")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    """With TUNESERVE_REQUIRE_ALL=1 a skipped test has failed, unless it needs a GPU."""
    report: pytest.TestReport = yield
    if REQUIRE_ALL and report.skipped and not hasattr(report, "wasxfail"):
        *_, reason = report.longrepr if isinstance(report.longrepr, tuple) else [report.longrepr]
        if "GPU" not in str(reason):
            report.outcome = "failed"
            report.longrepr = f"TUNESERVE_REQUIRE_ALL=1: {reason}"
    return report


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Run a Python of its own that finds the package and nothing of this process's environment."""

    def run(*arguments: str | Path, timeout_s: float = 240, **variables: str) -> "subprocess.CompletedProcess[str]":
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=environment | {"PYTHONPATH": str(PACKAGE)} | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    return run


@contextmanager
def serving(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class Files(SimpleHTTPRequestHandler):
    """The files of a folder, without a word on standard error."""

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server: its address, and the folder it serves."""
    folder = tmp_path / "web"
    folder.mkdir()
    with serving(partial(Files, directory=str(folder))) as address:
        yield address, folder


class Hub(Files):
    """As much of the Hugging Face hub as a download asks for; `models/` and `datasets/` hold its repositories."""

    commit = hashlib.sha1(b"the only commit").hexdigest()

    def do_GET(self) -> None:
        """Answer `/api/<kind>/<owner>/<name>/...` and `/<owner>/<name>/resolve/<revision>/<file>`."""
        if self.path == "/":
            self.answer(200)
            return
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[0] == "api":
            kind, name, (verb, *rest) = parts[1], "/".join(parts[2:4]), parts[4:] or ["revision", self.commit]
        else:
            kind = parts.pop(0) if parts[0] == "datasets" else "models"
            name, (verb, *rest) = "/".join(parts[:2]), parts[2:] or [""]
        folder = Path(self.directory, kind, name)
        if not folder.is_dir():
            self.answer(404, X_Error_Code="RepoNotFound")
        elif rest[0] not in ("main", self.commit):
            self.answer(404, X_Error_Code="RevisionNotFound")
        elif verb == "resolve":
            file = folder.joinpath(*rest[1:])
            if file.is_file():
                content = file.read_bytes()
                self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=self.commit)
            else:
                self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.commit)
        else:
            files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
            tree = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in files.items()]
            about = {"id": name, "sha": self.commit, "siblings": [{"rfilename": name} for name in files]}
            self.answer(200, json.dumps(tree if verb == "tree" else about).encode(), Content_Type="application/json")

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes = b"{}", **headers: str) -> None:
        """Send headers, whose names are given with underscores, and the body unless it is not wanted."""
        self.send_response(status)
        for name, value in {**headers, "Content_Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A hub: its address, and the folder with its `models/` and `datasets/`."""
    folder = tmp_path / "hub"
    folder.mkdir()
    with serving(partial(Hub, directory=str(folder))) as address:
        yield address, folder


@pytest.fixture
def ask_hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let this process ask another hub, as HF_ENDPOINT does before its libraries are imported."""

    def ask(address: str, *, patience_s: float = 60) -> None:
        import datasets.config
        import huggingface_hub.constants as hub

        from tuneserve.training import base_model

        monkeypatch.setattr(hub, "ENDPOINT", address)
        monkeypatch.setattr(
            hub, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
        for module, name in ((hub, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")):
            monkeypatch.setattr(module, name, False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
        monkeypatch.setattr(base_model, "PATIENCE_S", patience_s)

    return ask


@pytest.fixture(params=["closed", "silent"])
def unreachable(request: pytest.FixtureRequest) -> Iterator[str]:
    """An address where nobody answers: the port is closed, or whoever listens never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "silent":
            listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


class Disk:
    """A small file system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def make_read_only(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", self.path], check=True)

    def fill(self) -> None:
        with pytest.raises(OSError, match="No space left"):
            (self.path / "ballast").write_bytes(bytes(4 << 20))

    def empty(self) -> None:
        (self.path / "ballast").unlink()

    def take_away(self) -> None:
        subprocess.run(["umount", "--lazy", self.path], capture_output=True)


@contextmanager
def mounted(path: Path, *, size: str) -> Iterator[Disk]:
    """A real disk at a path; only root may mount one."""
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"a disk cannot be mounted here: {done.stderr.strip()}")
    yield Disk(path)
    Disk(path).take_away()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk of 256 KiB."""
    with mounted(tmp_path / "disk", size="256k") as disk:
        yield disk


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one small trained model."""
    folder = tmp_path_factory.mktemp("trained")
    import tiny  # here, since it brings torch, which most tests need as little as those who wait for them

    tiny.train(tiny.write_csv(folder / "reviews.csv", tiny.sentences(160)), folder)
    return folder / "MODEL"
