"""The closed loop on real processes: serve, drift, retrain, refuse, swap, roll back, restart, all of it under load.

    python benchmarks/loop.py                                 the embedded sample; its domain changes to long texts
    python benchmarks/loop.py --other amazon_sentences.csv    the domain changes to these texts (columns text and label)

One server is started as `run.py` with DATASET a folder that grows, RETRAIN_SCHEDULE every minute, and clients that ask
it without pause. What happens is printed as a table: the step, what was seen, how long it took.
"""

import argparse
import csv
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

RUN = Path(__file__).resolve().parents[1] / "production" / "docker-res" / "run.py"
SAMPLE = RUN.parent / "data"
KEY = {"X-API-Key": "loop"}
Row = tuple[str, str]


def read_rows(path: Path) -> list[Row]:
    """Texts and labels of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


def write_rows(path: Path, rows: list[Row]) -> None:
    """Put them there at once, as somebody who adds to a data set should."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    temporary.replace(path)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Service:
    """`run.py` as a process, and what its log says."""

    def __init__(self, environment: dict[str, str], log: Path, *, verb: str = "train-serve") -> None:
        self.environment, self.log, self.verb = environment, log, verb
        self.url = f"http://127.0.0.1:{environment['PORT']}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start it; seconds until `/livez` answered."""
        began = time.monotonic()
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(RUN), self.verb], env=os.environ | self.environment, stdout=file, stderr=file
            )
        self.wait("/livez", lambda body: True)
        return time.monotonic() - began

    def get(self, path: str) -> Any:
        """The JSON of a page, whatever its status."""
        return httpx.get(self.url + path, headers=KEY, timeout=10).json()

    def wait(self, path: str, holds: Any, *, timeout_s: float = 600) -> tuple[Any, float]:
        """Ask until the answer is as wanted; that answer, and the seconds it took."""
        began = time.monotonic()
        while time.monotonic() - began < timeout_s:
            if self.process is not None and self.process.poll() is not None:
                raise RuntimeError(f"the server ended with exit code {self.process.returncode}: {self.tail()}")
            try:
                body = self.get(path)
                if holds(body):
                    return body, time.monotonic() - began
            except (httpx.TransportError, ValueError):
                pass
            time.sleep(0.05)
        raise RuntimeError(f"{path} was not as wanted within {timeout_s:.0f} s; the log ends: {self.tail()}")

    def version(self) -> str:
        """The id of the version that answers."""
        return str(self.get("/readyz").get("model_version"))

    def new_job(self, known: set[str]) -> tuple[dict[str, Any], float]:
        """Wait until a training that is not among the known ones has ended."""
        jobs, seconds = self.wait(
            "/jobs", lambda jobs: any(job["id"] not in known and job["state"] != "running" for job in jobs)
        )
        return next(job for job in reversed(jobs) if job["id"] not in known and job["state"] != "running"), seconds

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send it a signal; its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(60)

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-1500:]

    def command(self, *arguments: str) -> tuple[str, float]:
        """Another verb on the same store; what it says, and the seconds it took."""
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, str(RUN), *arguments], env=os.environ | self.environment, capture_output=True, text=True
        )
        return (done.stdout + done.stderr).strip(), time.monotonic() - began


class Load:
    """Clients that ask without pause over connections that stay open, and count."""

    def __init__(self, port: int, texts: list[str], *, clients: int, pause_s: float = 0.01) -> None:
        self.texts, self.port, self.pause_s = texts, port, pause_s
        self.statuses: Counter[str] = Counter()
        self.versions: Counter[str] = Counter()
        self.milliseconds: list[float] = []
        self.ids: list[tuple[str, str]] = []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=[seed], daemon=True) for seed in range(clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def mark(self) -> int:
        """A place in the list of times, to look at what comes after it."""
        return len(self.milliseconds)

    def p99(self, since: int = 0) -> float:
        """99th percentile of the milliseconds since a mark."""
        some = sorted(self.milliseconds[since:])
        return some[int(0.99 * (len(some) - 1))] if some else 0.0

    def _ask(self, seed: int) -> None:
        rng = random.Random(seed)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        while not self._ended.is_set():
            text = rng.choice(self.texts)
            began = time.perf_counter()
            try:
                connection.request("POST", "/inference", json.dumps({"text": text}), {**KEY, "Content-Type": "json"})
                answer = connection.getresponse()
                body = json.loads(answer.read())
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.statuses[type(error).__name__] += 1
                connection.close()
                continue
            self.milliseconds.append(1000 * (time.perf_counter() - began))
            self.statuses[str(answer.status)] += 1
            if answer.status == 200:
                self.versions[body["model_version"]] += 1
                self.ids.append((answer.headers["X-Request-Id"], text))
            time.sleep(self.pause_s)
        connection.close()


class Report:
    """The table."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []

    def add(self, step: str, seen: str, seconds: float | None = None) -> None:
        """Say a step, now and in the table."""
        seen = "; ".join(seen.splitlines())
        self.rows.append((step, seen, "" if seconds is None else f"{seconds:.1f}"))
        print(f"{step}: {seen}{'' if seconds is None else f' ({seconds:.1f} s)'}", flush=True)

    def table(self) -> str:
        """All of it in Markdown."""
        lines = ["| step | what was seen | s |", "|---|---|---|"]
        return "\n".join(lines + [f"| {step} | {seen} | {seconds} |" for step, seen, seconds in self.rows])


def longer(rows: list[Row], seed: int) -> list[Row]:
    """Another domain: six texts of one label in a row, which are like nothing the model was trained on."""
    rng = random.Random(seed)
    by_label = {label: [text for text, one in rows if one == label] for label in sorted({label for _, label in rows})}
    return [(" ".join(rng.sample(by_label[label], min(6, len(by_label[label])))), label) for _, label in rows]


def main(arguments: list[str] | None = None) -> Report:
    """Run the loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SAMPLE, help="folder with train.csv and perhaps test.csv")
    parser.add_argument("--other", type=Path, help="CSV of another domain with the same labels (default: longer texts)")
    parser.add_argument("--first", type=int, default=900, help="texts of the first training (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=4, help="of the load (default: %(default)s)")
    parser.add_argument("--window", type=int, default=500, help="texts of a drift window (default: %(default)s)")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="loop-"))
    try:
        report = run(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{report.table()}")
    return report


def run(options: argparse.Namespace, folder: Path) -> Report:
    """The steps, one after another; a step that does not come about raises."""
    report = Report()
    data = folder / "data"
    data.mkdir()
    rows = read_rows(options.data / "train.csv")
    random.Random(0).shuffle(rows)
    test = read_rows(options.data / "test.csv") if (options.data / "test.csv").exists() else rows[-len(rows) // 5 :]
    pool = [row for row in rows if row not in set(test)]
    other = read_rows(options.other) if options.other else longer(pool, 1)
    random.Random(1).shuffle(other)
    write_rows(data / "train.csv", pool[: options.first])
    write_rows(data / "test.csv", test)
    environment = {
        "DATASET": str(data),
        "PORT": str(free_port()),
        "HOST": "127.0.0.1",
        "API_KEY": KEY["X-API-Key"],
        "RETRAIN_SCHEDULE": "* * * * *",
        "DRIFT_WINDOW": str(options.window),
        "N_EPOCHS": os.environ.get("N_EPOCHS", "2"),
        **{f"{name}_PATH": str(folder / name.lower()) for name in ("MODEL", "DATA", "LOG")},
    }
    service = Service(environment, folder / "out.log")
    try:
        return go_round(service, report, data, rows=(pool, test, other), options=options)
    finally:
        if service.process is not None and service.process.poll() is None:
            service.process.kill()
            service.process.wait()


def go_round(
    service: Service,
    report: Report,
    data: Path,
    *,
    rows: tuple[list[Row], list[Row], list[Row]],
    options: argparse.Namespace,
) -> Report:
    """From the first training to the restarted container."""
    pool, test, other = rows
    environment = service.environment
    report.add("start", "the port is open, /livez is green", service.start())
    phase, _ = service.wait("/readyz", lambda body: body.get("progress") is not None)
    report.add("first training", f"/readyz says {json.dumps(phase)}")
    first, seconds = service.wait("/readyz", lambda body: body["phase"] == "ready")
    report.add("first model", f"{first['model_version']} answers", seconds)
    known = {job["id"] for job in service.get("/jobs")}

    with Load(int(environment["PORT"]), [text for text, _ in test], clients=options.clients) as load:
        time.sleep(5)
        idle = load.p99()
        report.add("load", f"{len(load.milliseconds)} requests, p99 {idle:.1f} ms", 5)

        mark = load.mark()
        job, seconds = service.new_job(known)
        known.add(job["id"])
        report.add("schedule, nothing new", f"{job['state']}: {job['said']}; p99 {load.p99(mark):.1f} ms", seconds)

        opposite = dict(zip(labels(pool), reversed(labels(pool)), strict=True))
        wrong = [(text, opposite[label]) for text, label in pool]
        write_rows(data / "train.csv", wrong[: options.first])
        began = time.monotonic()
        service.wait("/jobs", lambda jobs: any(one.get("progress", {}).get("epoch") for one in jobs))
        mark = load.mark()
        job, _ = wait_for_state(service, known, "refused")
        during, seconds = load.p99(mark), time.monotonic() - began
        report.add("mislabelled texts arrive", f"{job['state']}: {job['said']}", seconds)
        report.add("p99 beside a training", f"{during:.1f} ms, {during / idle:.1f} times the idle one")
        assert service.version() == first["model_version"]
        write_rows(data / "train.csv", pool[: options.first])

        load.texts = [text for text, _ in other]
        drift, seconds = service.wait("/drift", lambda body: body.get("drifted"))
        report.add("another domain is asked", f"drift: {drift['sentence']}", seconds)

        wait_for_quiet(service)  # the next training is to see all of the feedback
        answered = dict(other)
        labelled = [(request, answered[text]) for request, text in load.ids if text in answered][:400]
        began = time.monotonic()
        with httpx.Client(base_url=service.url, headers=KEY) as client:
            for request, label in labelled:
                client.post("/feedback", json={"request_id": request, "label": label}).raise_for_status()
            for text, label in other[: len(other) // 2]:
                client.post("/feedback", json={"text": text, "label": label}).raise_for_status()
        accuracy = service.get("/feedback")["accuracy"]
        report.add(
            "feedback",
            f"{len(labelled)} answers and {len(other) // 2} texts labelled; accuracy {accuracy['accuracy']:.3f} "
            f"({accuracy['low']:.3f} to {accuracy['high']:.3f})",
            time.monotonic() - began,
        )

        write_rows(data / "train.csv", pool)
        began = time.monotonic()
        second, _ = service.wait("/readyz", lambda body: body["model_version"] != first["model_version"])
        report.add("more texts and feedback", f"{second['model_version']} answers", time.monotonic() - began)
        new = second["model_version"]
        jobs, _ = service.wait("/jobs", lambda jobs: any(job["version"] == new for job in jobs))
        job = next(job for job in jobs if job["version"] == new)
        report.add("why", str(job["said"]))

        said, seconds = back(service, first["model_version"])
        report.add("roll back", f"{said}; the old one, still held, answers {seconds:.2f} s after the command began")
        said, seconds = service.command("promote", second["model_version"])
        service.wait("/readyz", lambda body: body["model_version"] == second["model_version"], timeout_s=10)
        report.add("promote", said, seconds)
        time.sleep(1)
    bad = {status: count for status, count in load.statuses.items() if status != "200"}
    report.add("all requests", f"{sum(load.statuses.values())}, failed: {bad or 0}; by version {dict(load.versions)}")
    assert not bad, bad

    code = service.end()
    report.add("stop", f"exit code {code}")
    service.start()
    again, seconds = service.wait("/readyz", lambda body: body["phase"] == "ready")
    report.add("restart", f"{again['model_version']} answers", seconds)
    assert again["model_version"] == second["model_version"]
    assert service.get("/feedback")["labels"] >= len(labelled)
    said, seconds = back(service, first["model_version"])
    report.add("roll back", f"{said}; the old one, not held, answers {seconds:.2f} s after the command began")
    service.end()
    table, _ = service.command("versions")
    print(table)
    decisions = Counter(re.findall(r"(accepted|refused|withdrawn)", table))
    report.add("the store at the end", ", ".join(f"{count} {name}" for name, count in decisions.items()))
    return report


def labels(rows: list[Row]) -> list[str]:
    """The labels, sorted."""
    return sorted({label for _, label in rows})


def back(service: Service, version: str) -> tuple[str, float]:
    """Roll back to this version; what the command said, and the seconds from its start to the first answer."""
    began = time.monotonic()
    said, _ = service.command("rollback")
    with httpx.Client(base_url=service.url, headers=KEY, timeout=10) as client:
        while client.post("/inference", json={"text": "x"}).raise_for_status().json()["model_version"] != version:
            if time.monotonic() - began > 10:
                raise RuntimeError(f"{version} does not answer: {said}")
            time.sleep(0.01)
    return said, time.monotonic() - began


def wait_for_quiet(service: Service) -> None:
    """Wait until nothing trains and the next minute is not near."""
    while time.time() % 60 > 40:
        time.sleep(0.1)
    service.wait("/jobs", lambda jobs: all(job["state"] != "running" for job in jobs) and time.time() % 60 < 45)


def wait_for_state(service: Service, known: set[str], state: str) -> tuple[dict[str, Any], float]:
    """Wait for a training that ends so."""
    began = time.monotonic()
    while True:
        job, _ = service.new_job(known)
        known.add(job["id"])
        if job["state"] == state:
            return job, time.monotonic() - began


if __name__ == "__main__":
    main()
