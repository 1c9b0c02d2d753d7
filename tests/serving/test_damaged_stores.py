"""Stores damaged in many ways: whoever reads one gets a value or our error, and never a traceback or a hang."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from serving.conftest import EchoEngine

from tuneserve import files
from tuneserve.artifact import METADATA, Golden, Version, describe_files, read_golden, read_version, write_golden
from tuneserve.errors import StoreError, TuneserveError
from tuneserve.files import write_json
from tuneserve.lifecycle import gate
from tuneserve.lifecycle.decision import Decision, read_decision, write_decision
from tuneserve.lifecycle.drift import read_reference
from tuneserve.lifecycle.evidence import Evidence, read_evidence, unseen, write_evidence
from tuneserve.lifecycle.retraining import Schedule
from tuneserve.lifecycle.secret import SECRET, read_secret
from tuneserve.lifecycle.status import hold, read_status
from tuneserve.lifecycle.store import Store
from tuneserve.lifecycle.trainer import Trainer
from tuneserve.serving import follower
from tuneserve.serving.engines.choice import Choice
from tuneserve.serving.follower import Follower
from tuneserve.serving.http.schemas import Readiness
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings
from tuneserve.tasks import encoder as module
from tuneserve.tasks.classifier import Classifier, load_classifier

NAMES = ["20260101T000000Z-a", "20260102T000000Z-b", "20260103T000000Z-c"]
ODD: list[Any] = [
    None,
    0,
    -1,
    1.5,
    10**30,
    True,
    "",
    "x",
    "\ud800",
    "../../etc",
    [],
    [None],
    {},
    {"a": 1},
    float("nan"),
]
HANG_S = 60


@pytest.fixture(scope="module")
def whole(version: Version, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with three versions whose engine echoes, and everything else that a store may hold."""
    store = Store(tmp_path_factory.mktemp("whole") / "models")
    store.prepare()
    labels = ["bad", "good"] * 10
    texts = [f"text {number}" for number in range(len(labels))]
    for name in NAMES:
        folder = Path(shutil.copytree(version.folder, store.versions_folder / name))
        model = Classifier(read_version(folder), EchoEngine())
        answers = model.predict(["film", "a great film"])
        model.close()
        write_golden(folder, Golden(["film", "a great film"], [one.scores for one in answers]))  # type: ignore[union-attr]
        columns = {"label_ids": 1, "confidences": 0.5, "tokens": 4, "unknown": 0, "truncated": 0}
        write_json(folder / "drift.json", {column: [value] * 60 for column, value in columns.items()})
        counts = {"test": {"bad": 10, "good": 10}}
        about = {"metrics": {"test": {"accuracy": 1.0}}, "data": {"counts": counts}, "fingerprint": "same"}
        about |= {"engine": {"int8": {"accepted": False, "reason": "so"}}, "created_at": "2026-01-01T00:00:00+00:00"}
        described = json.loads((folder / METADATA).read_text()) | about
        (folder / METADATA).unlink()
        write_json(folder / METADATA, described | describe_files(folder))
        write_decision(read_version(folder), Decision(name, "accepted", "gate", "passed", None))
        write_evidence(store.evidence_folder / name, Evidence(texts, labels), ["learned"])
        store.set_champion(store.version(name))
    (store.versions_folder / NAMES[2] / "decision.json").unlink()
    store.set_champion(store.version(NAMES[1]))
    store.challenger_pointer.write_text(NAMES[2])
    write_json(store.status_file, {"phase": "training", "pid": 1, "epoch": 1, "epochs": 2, "progress": 0.5})
    write_json(store.lock, {"host": "a", "pid": 1, "since": "2026"})
    write_json(store.root / "schedule.json", {"handled": "2026-01-01T00:00:00+00:00", "expression": "0 3 * * 1"})
    (store.root / "jobs").mkdir()
    job = {"id": "1", "why": "so", "state": "finished", "started_at": "2026", "exit_code": 0, "version": NAMES[0]}
    write_json(store.root / "jobs" / "1.json", job)
    read_secret(store.root)
    return store.root


@pytest.fixture(autouse=True)
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ENGINES", [Choice(lambda *about, **options: EchoEngine())])
    monkeypatch.setattr(gate, "run_trial", try_all)
    monkeypatch.setattr(follower, "set_aside", lambda: None)  # half a second each time, in a large process
    monkeypatch.setattr(files, "sync", lambda path: None)  # what the disk takes is not looked at here


def try_all(candidate: Version, champion: Version | None, evidence: Evidence, settings: Settings) -> dict[str, Any]:
    answer = {"error": None, "predicted": evidence.labels, "latency_ms": 1.0, "bytes": 1}
    return {"candidate": answer, "champion": answer if champion is not None else None}


@contextmanager
def no_hang(words: str) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"hangs: {words}")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def spoil_value(rng: random.Random, content: Any) -> Any:
    """One value somewhere in it becomes another, or goes."""
    if not isinstance(content, dict | list) or not content or rng.random() < 0.2:
        return rng.choice(ODD)
    key = rng.choice(list(content) if isinstance(content, dict) else range(len(content)))
    if rng.random() < 0.15:
        del content[key]
    else:
        content[key] = spoil_value(rng, content[key])
    return content


def spoil(rng: random.Random, path: Path) -> str:
    """Damage a file in one of many ways; which one."""
    content = path.read_bytes() if path.is_file() else b""
    ways = ["cut", "empty", "zeroes", "noise", "deep", "gone", "folder", "dangling", "loop", "pipe", "digits", "device"]
    if path.suffix in (".json", ".lock"):
        ways += ["value"] * 12
    if os.geteuid():
        ways.append("unreadable")
    way = rng.choice(ways)
    if way == "value":
        path.write_text(json.dumps(spoil_value(rng, json.loads(content))))
        return f"{way} {path.read_text()[:300]}"
    made = {
        "cut": lambda: path.write_bytes(content[: rng.randrange(len(content) + 1)]),
        "empty": lambda: path.write_bytes(b""),
        "zeroes": lambda: path.write_bytes(bytes(len(content))),
        "noise": lambda: path.write_bytes(rng.randbytes(rng.randrange(1, 2000))),
        "deep": lambda: path.write_bytes(rng.choice([b"[", b'{"a":']) * 100_000),
        "digits": lambda: path.write_bytes(b"1" * 10_000 + rng.choice([b"", b"e9999"])),
        "unreadable": lambda: path.chmod(0),
        "gone": path.unlink,
    }
    if way in made:
        made[way]()
        return way
    path.unlink()
    {
        "folder": path.mkdir,
        "dangling": lambda: path.symlink_to("nowhere/at/all"),
        "loop": lambda: path.symlink_to(path.name),
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
    }[way]()
    return way


def read_all(root: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Everything that reads a store, as it is called."""
    store = Store(root)
    settings = Settings.from_environ({"MODEL_PATH": str(root), "SHADOW_REQUESTS": "0"})

    def load(version: Version) -> Classifier:
        return load_classifier(version, settings, threads=1)

    def follow() -> None:
        slot = Slot()
        following = Follower(store, slot, load, required=lambda: False)
        try:
            following._fill()
            following.look()
        finally:
            slot.close()

    def progress() -> None:
        trainer = Trainer(["true"], store, serves=lambda: True)
        trainer.jobs()
        Readiness.model_validate({"phase": "empty", **read_status(store.status_file)})

    def lock() -> None:
        with hold(store.lock), hold(store.lock):
            pass

    yield "versions", store.versions
    yield "table", store.table
    yield "prepare", store.prepare
    yield "champion", store.champion
    yield "previous", store.previous
    yield "last good", store.last_good
    yield "find", lambda: store.find("same")
    yield "challenger", store.challenger_id
    yield "secret", lambda: read_secret(root)
    yield "lock", lock
    yield "progress", progress
    memory = root / "schedule.json"
    yield "schedule", lambda: Schedule("0 3 * * 1", "UTC", jitter_s=0, memory=memory).due(datetime.now(UTC))
    for name in NAMES:
        folder = store.evidence_folder / name
        yield "evidence", lambda folder=folder: read_evidence(folder)
        yield "unseen", lambda folder=folder: unseen(folder, ["a"])
        yield "golden", lambda name=name: read_golden(store.version(name))
        yield "reference", lambda name=name: read_reference(store.version(name))
        yield "decision", lambda name=name: read_decision(store.version(name))
    yield "load", lambda: load(store.champion()).close()
    yield "follow", follow
    yield "admit", lambda: gate.admit(store, store.version(NAMES[2]), settings)
    yield "promote", lambda: store.promote(NAMES[0])
    yield "rollback", store.rollback
    yield "shadow", lambda: store.set_challenger(store.version(NAMES[1]))
    yield "forget", lambda: store.forget_old(2)
    yield "follow again", follow


@pytest.mark.parametrize("seed", range(100))
def test_whoever_reads_a_damaged_store_gets_a_value_or_our_error(whole: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    root = Path(shutil.copytree(whole, tmp_path / "models", symlinks=True))
    small = [path for path in sorted(root.rglob("*")) if path.is_file() and path.stat().st_size < 1 << 20]
    done = [(path.relative_to(root), spoil(rng, path)) for path in rng.sample(small, rng.choice([1, 1, 2, 4]))]
    for what, act in read_all(root):
        try:
            with no_hang(f"{what} of {done}"), suppress(TuneserveError):
                act()
        except Exception as error:
            raise AssertionError(f"{what} of {done}") from error


def test_the_store_that_is_damaged_is_sound_before(whole: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(whole, tmp_path / "models"))
    for what, act in read_all(root):
        if what not in ("lock", "rollback"):  # held twice; to what people have just replaced
            act()


@pytest.mark.parametrize("name", ["tokenizer.json", "golden.json", "config.json"])
def test_a_file_with_other_content_of_the_same_size_never_answers(whole: Path, tmp_path: Path, name: str) -> None:
    root = Path(shutil.copytree(whole, tmp_path / "models"))
    store = Store(root)
    path = store.versions_folder / NAMES[0] / name
    path.write_bytes(bytes(path.stat().st_size))
    words = f"{NAMES[0]} is damaged: {name} is not what was saved: its SHA-256 differs.*choose another"
    with pytest.raises(StoreError, match=words):
        store.promote(NAMES[0])
    assert store.champion_id() == NAMES[1]
    settings = Settings.from_environ({"MODEL_PATH": str(root)})
    slot = Slot()
    following = Follower(store, slot, lambda version: load_classifier(version, settings, threads=1))
    following.look()
    assert slot.version_id == NAMES[1]
    store.set_champion(store.version(NAMES[0]))  # as another program might
    following.look()
    assert (slot.version_id, slot.phase) == (NAMES[1], "ready")
    assert store.find("same") == store.version(NAMES[2])
    slot.close()


def test_files_that_do_not_answer_may_go_and_older_versions_are_checked_by_size(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    store = Store(Path(shutil.copytree(whole, tmp_path / "models")))
    folder = store.versions_folder / NAMES[0]
    (folder / "drift.json").unlink()
    store.promote(NAMES[0])
    metadata = json.loads((folder / METADATA).read_text())
    del metadata["sha256"]
    write_json(folder / METADATA, metadata)
    store.promote(NAMES[0])
    assert "was saved without hashes" in caplog.text
    (folder / "golden.json").write_bytes(b"[]")
    with pytest.raises(StoreError, match=r"golden\.json is not as large"):
        store.promote(NAMES[0])
    for outside in ("../../champion", "/etc/hostname"):
        write_json(folder / METADATA, metadata | {"files": {outside: 1}})
        with pytest.raises(StoreError, match="outside of its folder"):
            store.promote(NAMES[0])


def test_a_secret_is_the_only_file_of_a_store_that_is_its_owners_alone(whole: Path) -> None:
    assert [path.name for path in whole.iterdir() if path.is_file() and not path.stat().st_mode & 0o044] == [SECRET]
