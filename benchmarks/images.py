"""What each image costs where it runs: its size, seconds from `docker run` to the first answer, and peak memory.

    .venv/bin/python benchmarks/images.py --base-image debian:trixie-slim
    .venv/bin/python benchmarks/images.py --rie aws-lambda-rie-x86_64       the function on AWS Lambda, too

Builds the images of the job, of `serve` and of `lambda` (from layers that are there), trains on the embedded sample in
a container, and asks each way of serving for the same twenty texts, then for 512 at once. Sizes are without the base's.
Memory is what `docker stats` shows, at its highest of some forty looks a second. Images and volume are removed at the
end.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import docker
from docker.errors import DockerException
from tables import join

BUILD = Path(__file__).resolve().parents[1] / "production" / "build.py"
NAME, VERSION = "tuneserve-bench", "0.0.0"
TEXTS = [f"This was a{' very' * (place % 5)} good film." for place in range(20)]
MANY = [f"{text} {place}" for place in range(32) for text in TEXTS[:16]]
EMULATOR = "/usr/local/bin/aws-lambda-rie"
LOOK_S, PATIENCE_S = 0.025, 300.0
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Way:
    """One way of running an image: what is asked of it, and the options of its container."""

    name: str
    image: str
    verb: str | None
    options: Mapping[str, Any]
    path: str = "/inference"
    body: Callable[[str], Mapping[str, Any]] = lambda text: {"text": text}
    batch: tuple[str, Mapping[str, Any]] = ("/inference/batch", {"texts": MANY})
    before: tuple[str, Mapping[str, Any]] | None = None
    port: int = 8000


def build(name: str, *options: str) -> Any:
    """An image of build.py, whose output is shown where it fails."""
    command = [sys.executable, str(BUILD), "--name", name, "--version", VERSION, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-3000:] + done.stderr)
    return docker.from_env().images.get(f"{name}:{VERSION}")


def post(port: int, path: str, body: Mapping[str, Any]) -> bool:
    """Whether it is answered with 200."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with DIRECT.open(request, timeout=PATIENCE_S) as reply:
            content = json.load(reply)
            inner = content.get("statusCode", 200) if isinstance(content, dict) else 200  # a function's own status
            return reply.status == inner == 200
    except (OSError, ValueError):  # nobody listens yet, or no model is ready
        return False


@contextmanager
def watched(container: Any) -> Iterator[list[int]]:
    """The container's memory in bytes, look by look, as `docker stats` counts it, without what can be dropped."""
    seen: list[int] = [0]
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_S):
            try:
                memory = container.stats(stream=False, one_shot=True)["memory_stats"]
            except DockerException:
                return
            if "usage" in memory:
                kept = memory["stats"]
                seen.append(memory["usage"] - kept.get("total_inactive_file", kept.get("inactive_file", 0)))

    watch = threading.Thread(target=look)
    watch.start()
    try:
        yield seen
    finally:
        ended.set()
        watch.join()


@contextmanager
def running(client: Any, image: Any, verb: str | None, **options: Any) -> Iterator[tuple[Any, float]]:
    """A container, and when it was asked for; its log is shown if something goes wrong."""
    start = time.perf_counter()
    container = client.containers.run(image.id, verb, detach=True, **options)
    try:
        yield container, start
    except BaseException:
        print(container.logs(tail=20).decode(), file=sys.stderr)
        raise
    finally:
        container.remove(force=True, v=True)


def serve(client: Any, image: Any, way: Way) -> tuple[float, int, int]:
    """Seconds to the first answer, and peak memory in bytes after the texts one by one, and after many at once."""
    ports = {f"{way.port}/tcp": ("127.0.0.1", None)}
    with running(client, image, way.verb, ports=ports, **way.options) as (container, start):
        container.reload()
        port = int(container.ports[f"{way.port}/tcp"][0]["HostPort"])
        with watched(container) as seen:
            wanted = [asked for asked in (way.before, (way.path, way.body(TEXTS[0]))) if asked]
            while wanted:
                if post(port, *wanted[0]):
                    wanted.pop(0)
                    continue
                container.reload()
                if container.status != "running" or time.perf_counter() - start > PATIENCE_S:
                    raise RuntimeError(f"{way.name} does not answer")
                time.sleep(LOOK_S)
            ready_s = time.perf_counter() - start
            answered = [post(port, way.path, way.body(text)) for text in TEXTS]
            few = max(seen)
            if not (all(answered) and post(port, *way.batch)):
                raise RuntimeError(f"{way.name} did not answer all")
        return ready_s, few, max(seen)


def gateway_event(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """What an HTTP API sends to a function."""
    http = {"method": "POST", "path": path, "sourceIp": "127.0.0.1", "protocol": "HTTP/1.1", "userAgent": "bench"}
    headers = {"content-type": "application/json"}
    about = {"http": http, "stage": "$default", "requestId": "bench", "domainName": "bench"}
    whole = {"version": "2.0", "rawPath": path, "rawQueryString": "", "headers": headers, "requestContext": about}
    return whole | {"body": json.dumps(body), "isBase64Encoded": False}


def copy_version(client: Any, image: Any, folder: Path, store: Mapping[str, Any]) -> Path:
    """The folder of the only version of a store, out of its volume."""
    with running(client, image, "versions", **store) as (container, _):
        container.wait()
        stream, _ = container.get_archive("/models/versions")
        archive = folder / "versions.tar"
        archive.write_bytes(b"".join(stream))
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    [version] = (folder / "versions").iterdir()
    return version


def ways_of_serving(store: Mapping[str, Any], version: Path, emulator: Path | None) -> Iterator[Way]:
    """What is compared; the function only where there is an emulator."""
    yield Way("`serve` of the job's image", "job", "serve", store)
    yield Way("`serve` of the image without torch", "serve", "serve", store)
    path = "/models/reviews/invoke"
    yield Way(
        "`multimodel` of the job's image, one model",
        "job",
        "multimodel",
        {"volumes": {str(version): {"bind": "/archives/reviews", "mode": "ro"}}},
        path,
        lambda text: {"inputs": text},
        (path, {"inputs": MANY}),
        before=("/models", {"model_name": "reviews", "url": "/archives/reviews"}),
    )
    if emulator:
        path = "/2015-03-31/functions/function/invocations"
        yield Way(
            "the function on AWS Lambda",
            "lambda",
            None,
            {"volumes": {str(emulator.resolve()): {"bind": EMULATOR, "mode": "ro"}}},
            path,
            lambda text: gateway_event("/inference", {"text": text}),
            (path, gateway_event("/inference/batch", {"texts": MANY})),
            port=8080,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    about = "what all are built on (default: %(default)s)"
    parser.add_argument("--base-image", default="debian:trixie-slim", help=about)
    about = "emulator of AWS Lambda's runtime interface; without it the function is left out"
    parser.add_argument("--rie", type=Path, help=about)
    parser.add_argument("--rounds", type=int, default=3, help="starts of each, by turns (default: %(default)s)")
    options = parser.parse_args()
    client: Any = docker.from_env(timeout=PATIENCE_S)
    on = ("--base-image", options.base_image)
    images = {"job": build(NAME, *on), "serve": build(f"{NAME}-serve", *on, "--target", "serve")}
    base = client.images.get(options.base_image).attrs["Size"]
    volume = client.volumes.create()
    store = {"volumes": {volume.name: {"bind": "/models"}}}
    try:
        with running(client, images["job"], "train", **store) as (container, start), watched(container) as seen:
            if container.wait()["StatusCode"]:
                raise RuntimeError("the training failed")
            train_s = time.perf_counter() - start
        print(f"The base has {base / 1e6:.0f} MB; `train` took {train_s:.1f} s and {max(seen) / 1e6:.0f} MB.\n")
        with tempfile.TemporaryDirectory() as folder:
            version = copy_version(client, images["job"], Path(folder), store)
            if options.rie:
                images["lambda"] = build(f"{NAME}-lambda", *on, "--target", "lambda", "--bake", str(version))
            ways = list(ways_of_serving(store, version, options.rie))
            found: dict[str, list[tuple[float, int, int]]] = {way.name: [] for way in ways}
            for _ in range(options.rounds):
                for way in ways:
                    found[way.name].append(serve(client, images[way.image], way))
        rows = [["way", "on top of the base, MB", "to the first answer, s", "memory, MB", "after 512 texts, MB"]]
        rows.append(["---"] * len(rows[0]))
        for way in ways:
            ready, few, many = zip(*found[way.name], strict=True)
            size = (images[way.image].attrs["Size"] - base) / 1e6
            start_s = f"{median(ready):.1f} ({min(ready):.1f} to {max(ready):.1f})"
            rows.append([way.name, f"{size:.0f}", start_s, f"{max(few) / 1e6:.0f}", f"{max(many) / 1e6:.0f}"])
        print(join(rows))
    finally:
        volume.remove(force=True)
        for image in images.values():
            client.images.remove(image.id, force=True)


if __name__ == "__main__":
    main()
