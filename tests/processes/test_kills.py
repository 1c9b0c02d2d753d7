"""The whole loop is killed at seeded moments, again and again: the store stays whole, and the next start goes on.

TUNESERVE_KILLS=200 make test-processes ARGS="-s -n0 tests/processes/test_kills.py"     a line for a kill
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import loop
import pytest
import tiny
from forked import fork, run_loop
from reference import TEXTS, reference
from servers import family

from tuneserve.artifact import METADATA, require_whole
from tuneserve.files import TEMPORARY
from tuneserve.lifecycle.feedback_database import FILE, labelled_texts
from tuneserve.lifecycle.store import Store
from tuneserve.lifecycle.trainer import KEEP_JOBS
from tuneserve.training.checkpoint import OTHER_RUNS

KILLS, SEED = int(os.environ.get("TUNESERVE_KILLS", "6")), int(os.environ.get("TUNESERVE_SEED", "15"))
PATIENCE_S = 240
"""Seconds for what takes seconds: other tests may run on the same cores."""
KEEP = 3
SIGNALS = [signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT]
POINTS = [
    *(r"checkpoints/[^/]*/[^.][^/]*", r"checkpoints/[^/]*"),
    *(r"versions/\.[^/]*/golden\.json", r"versions/\.[^/]*/metadata\.json", r"versions/[^./]*"),
    *(r"evidence/[^/]*", r"versions/[^./]*/decision\.json", "previous", "champion", r"versions/\.unfinished-[^/]*"),
]
"""What is renamed or removed in the store, in its order."""


class Life:
    """One start of the loop, up to its end."""

    def __init__(self, environment: dict[str, str], log: Path, point: Any = None) -> None:
        environment = environment | {"PORT": str(loop.free_port())}
        self.service, self.began = loop.Service(environment, log), time.monotonic()
        self.client = httpx.Client(base_url=self.service.url, headers=loop.KEY, timeout=60)
        self.store = Store(Path(environment["MODEL_PATH"]))
        self.process = fork(run_loop, environment, log, point)

    def wait(self, holds: Callable[[], Any]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < end, f"waited in vain: {self.service.tail()}"
            time.sleep(0.1)

    def get(self, path: str) -> Any:
        try:
            return self.client.get(path).json()
        except (httpx.TransportError, ValueError):
            return {}

    def ready(self) -> float:
        """Wait for answers, which must be right; seconds since the start, 0 if it was killed before."""
        self.wait(lambda: self.get("/readyz").get("phase") == "ready" or not self.process.is_alive())
        seconds = time.monotonic() - self.began
        try:
            self.ask()
        except httpx.TransportError:
            assert not self.process.is_alive()
            return 0.0
        return seconds

    def ask(self) -> None:
        """Every answer is that of the version it names, in what transformers computes with its files."""
        for text in TEXTS:
            answer = self.client.post("/inference", json={"text": text})
            assert answer.status_code == 200, answer.text
            version = self.store.version(answer.json()["model_version"])
            assert answer.json()["scores"] == pytest.approx(reference(version)[text], abs=1e-3)

    def trained(self) -> bool:
        """Whether nothing trains, after the training of the start."""
        jobs = self.get("/jobs")
        return bool(jobs) and all(job["state"] != "running" for job in jobs)

    def was_hit(self) -> bool:
        """Whether a signal has ended the server, or its newest training."""
        return not self.process.is_alive() or "signal" in str((self.get("/jobs") or [{}])[0].get("said"))

    def hit(self, victim: str, number: int) -> str:
        """Send a signal; to whom, since a training may have ended."""
        server, *children = family(self.process.pid or 0)
        victim = "server" if victim == "child" and not children else victim
        os.killpg(server, number) if victim == "group" else os.kill(
            children[0] if victim == "child" else server, number
        )
        return victim

    def end(self, number: int = signal.SIGTERM) -> None:
        """Wait for the end of a server that was sent a signal, and of whomever it leaves."""
        members = family(self.process.pid or 0)
        self.client.close()
        self.process.join(PATIENCE_S)
        assert self.process.exitcode in ({-9} if number == signal.SIGKILL else {0, 128 + number}), self.service.tail()
        self.wait(lambda: not any(Path(f"/proc/{one}").exists() for one in members))


def inspect(store: Store) -> None:
    """Every committed version is whole and can be loaded, and the pointers name such."""
    committed = {path.name for path in store.versions_folder.glob("[!.]*")}
    assert committed == {version.id for version in store.versions()}
    for version in store.versions():
        assert (version.folder / METADATA).is_file()
        require_whole(version)
        reference(version)
    assert {path.read_text().strip() for path in (store.pointer, store.previous_pointer) if path.exists()} <= committed


def leftovers(store: Store, *folders: Path, temporary: Path) -> list[Path]:
    """What a loop should not keep after its end."""
    found = [path for folder in folders for path in folder.rglob("*") if TEMPORARY.fullmatch(path.name)]
    found += [path for path in store.evidence_folder.iterdir() if not (store.versions_folder / path.name).exists()]
    for folder, most in {
        temporary: 0,
        store.checkpoints_folder: OTHER_RUNS + 1,
        store.versions_folder: KEEP + 1,
        store.root / "jobs": KEEP_JOBS,
    }.items():
        found += sorted(folder.iterdir())[most:]
    return found


@pytest.mark.timeout(600 + 120 * KILLS)
def test_whoever_is_killed_whenever_the_store_is_whole_and_the_next_start_goes_on(
    tmp_path: Path, tiny_bert: Path
) -> None:
    chance, data, temporary, log = random.Random(SEED), tmp_path / "texts", tmp_path / "tmp", tmp_path / "out.log"
    data.mkdir()
    temporary.mkdir()
    loop.write_rows(data / "test.csv", tiny.sentences(120, first=1000))
    loop.write_rows(data / "train.csv", tiny.sentences(160))
    environment = {
        **tiny.RECIPE,
        **tiny.paths(tmp_path),
        "TMPDIR": str(temporary),
        "DATASET": str(data),
        "BASE_MODEL": str(tiny_bert),
        "N_EPOCHS": "4",
        "PRECISION": "fp32",
        "CHECKPOINT_MINUTES": "0.003",
        "MAX_ACCURACY_DROP": "0.5",  # the gate is about rows whose labels are turned round
        "MAX_LATENCY_INCREASE": "100",
        "KEEP_VERSIONS": str(KEEP),
        "RETRAIN_SCHEDULE": "*/3 * * * *",
        "RETRAIN_NICE": "0",
        "HOST": "127.0.0.1",
        "API_KEY": loop.KEY["X-API-Key"],
    }
    store = Store(Path(environment["MODEL_PATH"]))

    life = Life(environment, log)
    life.wait(lambda: life.get("/livez"))
    life.began = time.monotonic()  # now the libraries are loaded, once for all
    round_s = life.ready()
    life.wait(life.trained)
    life.hit("server", signal.SIGTERM)
    life.end()
    print(f"\na round takes {round_s:.1f} s")

    damaged, counts, labels, rows, starts = list[str](), Counter[str](), 0, 160, [round_s]
    for kill in range(1, KILLS + 1):
        named = bool(starts[-1]) and chance.random() < 0.5
        if changed := named or chance.random() < 0.5:
            rows += 8
            opposite = {"good": "bad", "bad": "good"} if chance.random() < 0.2 else {}
            loop.write_rows(data / "train.csv", [(text, opposite.get(of, of)) for text, of in tiny.sentences(rows)])
        name, often = chance.choice(POINTS), chance.choice([1, 1, 1, 2])
        victim, number = chance.choice(["server", "child", "group"]), chance.choice(SIGNALS)
        delay_s, late = chance.uniform(0, round_s), not starts[-1] or kill % 4 != 0  # late: after it was asked
        life = Life(environment, log, (name, often, victim, number) if named else None)
        try:
            starts.append(life.ready() if late else 0.0)
            if late and not named and chance.random() < 0.3:
                for text, label in tiny.sentences(3, first=2000 + 3 * kill):
                    answer = life.client.post("/feedback", json={"text": text, "label": label})
                    assert answer.json() == {"stored": True}
                    labels += 1
            time.sleep(0 if named else delay_s)
            life.wait(lambda life=life, named=named: not named or not life.process.is_alive() or life.trained())
            if not named or not life.was_hit():
                named, victim = False, life.hit(victim if not named else "server", number)
            counts.update(["point" if named else "moment", victim, signal.Signals(number).name])
            where = name if named else f"{delay_s:.1f} s"
            print(kill, signal.Signals(number).name, victim, where, f"{changed=} {late=}", flush=True)
            if victim == "child":
                life.wait(life.trained)
                starts[-1] = starts[-1] or life.ready()
                life.ask()
                number = signal.SIGTERM
                life.hit("server", number)
            life.end(number)
            inspect(store)
        except Exception as error:
            damaged.append(f"{kill}: {type(error).__name__} {error}"[:2000])
            print("damaged", damaged[-1], log.read_text())
            for member in family(life.process.pid or 0) if life.process.is_alive() else []:
                os.kill(member, signal.SIGKILL)
            life.client.close()
            life.process.join()

    for path in store.root.rglob(".*"):  # an hour later
        os.utime(path, (0, 0))
    life = Life(environment, log)
    starts.append(life.ready())
    life.wait(life.trained)
    life.ask()
    life.hit("server", signal.SIGTERM)
    life.end()
    inspect(store)
    asked = [seconds for seconds in starts if seconds]
    kept = len(labelled_texts(store.root / FILE, print))
    print(dict(counts), f"{len(damaged)} damaged, {kept} of {labels} labels, {len(asked)} starts asked and right,")
    print(f"the slowest after {max(asked):.1f} s")
    assert not damaged
    assert kept == labels
    assert not leftovers(
        store, *(Path(environment[f"{of}_PATH"]) for of in ("MODEL", "DATA", "LOG")), temporary=temporary
    )
