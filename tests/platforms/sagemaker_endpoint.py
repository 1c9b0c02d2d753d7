"""The platform's side of a SageMaker multi-model endpoint, as boto3 asks it and as it asks a container.

Source: "Multi-model endpoints" and "Build Your Own Container for SageMaker AI Multi-Model Endpoints". A target model is
an archive below a prefix; it is unpacked into BASE/models/HASH/model, loaded by `POST /models`, and asked by
`POST /models/HASH/invoke`. On 507 the model that was not asked for longest is unloaded, and the load is tried again.
"""

import hashlib
import json
import tarfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

PASSED_ON = ("Content-Type", "Accept", "X-Amzn-SageMaker-Custom-Attributes", "X-Amzn-SageMaker-Target-Model")
LOAD_S, INVOKE_S = 360.0, 60.0
LOOK_S = 0.1


class PlatformError(Exception):
    """What a caller is told: the name of an exception of the runtime's API, and its status and members."""

    def __init__(self, kind: str, status: int, message: str, **members: Any) -> None:
        super().__init__(message)
        self.kind, self.status, self.members = kind, status, {"Message": message, **members}


class Endpoint:
    """One endpoint with one container.

    Args:
        container: the address of its server.
        archives: the prefix below which target models are.
        base: the container's /opt/ml.
        patience_s: that a request waits for a load before it is told that the model is not ready.
    """

    def __init__(self, container: str, archives: Path, base: Path, *, patience_s: float = 1.0) -> None:
        self._container = httpx.Client(base_url=container, limits=httpx.Limits(max_connections=32))
        self._archives, self._base, self._patience_s = archives, base, patience_s
        self._lock = threading.Lock()
        self._models: OrderedDict[str, Future[None]] = OrderedDict()  # the one that was not asked for longest first
        self._loads = ThreadPoolExecutor(4)
        self.events: list[tuple[str, str]] = []
        """What the container was told, with the target and the status."""

    def invoke(self, target: str, body: bytes, headers: Mapping[str, str]) -> httpx.Response:
        """The container's answer.

        Raises:
            PlatformError: there is none.
        """
        if not target or not (self._archives / target).is_file():
            raise PlatformError("ValidationError", 400, f"There is no model {target!r} at this endpoint.")
        while True:
            self._await_load(target)
            answer = self._tell("POST", f"/models/{quote(name_of(target))}/invoke", target, INVOKE_S, body, headers)
            if answer.status_code == 404:  # it was unloaded since
                with self._lock:
                    self._models.pop(target, None)
            elif answer.status_code == 507 and self._unload_one(but=target):
                pass
            elif answer.is_success:
                return answer
            else:
                raise self._error_of(answer)

    def close(self) -> None:
        """Load nothing more."""
        self._loads.shutdown()
        self._container.close()

    def _await_load(self, target: str) -> None:
        with self._lock:
            load = self._models.get(target)
            if load is None or (load.done() and load.exception() is not None):
                load = self._models[target] = self._loads.submit(self._load, target)
            self._models.move_to_end(target)
        try:
            load.result(self._patience_s)
        except TimeoutError:
            raise PlatformError("ModelNotReadyException", 429, f"The model {target} is still being loaded.") from None

    def _load(self, target: str) -> None:
        folder = self._base / "models" / name_of(target) / "model"
        if not folder.is_dir():
            folder.mkdir(parents=True)
            with tarfile.open(self._archives / target) as archive:
                archive.extractall(folder, filter="data")
        content = json.dumps({"model_name": name_of(target), "url": str(folder)}).encode()
        while True:
            answer = self._tell("POST", "/models", target, LOAD_S, content, {"Content-Type": "application/json"})
            if answer.status_code in (200, 409):
                return
            if answer.status_code != 507:
                raise self._error_of(answer)
            if not self._unload_one(but=target):
                if not self._others_load(target):
                    raise self._error_of(answer)
                time.sleep(LOOK_S)  # until one of them can be unloaded

    def _others_load(self, target: str) -> bool:
        with self._lock:
            return any(one != target and not load.done() for one, load in self._models.items())

    def _unload_one(self, *, but: str) -> bool:
        with self._lock:
            loaded = [one for one, load in self._models.items() if one != but and load.done() and not load.exception()]
            if not loaded:
                return False
            del self._models[loaded[0]]
        answer = self._tell("DELETE", f"/models/{quote(name_of(loaded[0]))}", loaded[0], LOAD_S)
        assert answer.status_code in (200, 404), answer.text
        return True

    def _tell(
        self, method: str, path: str, target: str, timeout_s: float, body: bytes = b"", headers: Any = None
    ) -> httpx.Response:
        answer = self._container.request(method, path, content=body, headers=headers, timeout=timeout_s)
        what = {"DELETE": "unload", "POST": "load"}[method] if not path.endswith("/invoke") else "invoke"
        self.events.append((what, f"{target} {answer.status_code}"))
        return answer

    def _error_of(self, answer: httpx.Response) -> PlatformError:
        assert set(answer.json()) == {"code", "type", "message"}, answer.text
        words = f"Received client error ({answer.status_code}) from primary with message {answer.text!r}."
        seen = {"OriginalStatusCode": answer.status_code, "OriginalMessage": answer.text, "LogStreamArn": "none"}
        return PlatformError("ModelError", 424, words, **seen)


def name_of(target: str) -> str:
    """The name by which the container knows a model: a hash, which says nothing."""
    return hashlib.sha256(target.encode()).hexdigest()[:32]


@contextmanager
def served(endpoint: Endpoint, name: str = "endpoint") -> Iterator[str]:
    """The address of the runtime's API, of which there is `POST /endpoints/{name}/invocations`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            given = {one: self.headers[one] for one in PASSED_ON if self.headers.get(one)}
            try:
                if self.path != f"/endpoints/{name}/invocations":
                    raise PlatformError("ValidationError", 400, f"There is nothing at {self.path}.")
                answer = endpoint.invoke(self.headers.get("X-Amzn-SageMaker-Target-Model") or "", body, given)
                headers = {"Content-Type": answer.headers["Content-Type"]}
                self._send(200, {**headers, "x-Amzn-Invoked-Production-Variant": "primary"}, answer.content)
            except PlatformError as error:
                headers = {"Content-Type": "application/json", "x-amzn-ErrorType": error.kind}
                self._send(error.status, headers, json.dumps(error.members).encode())

        def _send(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
            self.send_response(status)
            for one, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(one, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *words: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        endpoint.close()
