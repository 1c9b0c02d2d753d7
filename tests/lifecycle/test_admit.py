"""Admission by the gate: who may ask it, what becomes of versions, and a trial that crashes."""

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lifecycle.test_store import accept, add

from tuneserve.artifact import Version
from tuneserve.errors import RefusedError, StoreError
from tuneserve.lifecycle import gate
from tuneserve.lifecycle.decision import Decision, read_decision, write_decision
from tuneserve.lifecycle.evidence import Evidence, write_evidence
from tuneserve.lifecycle.store import Store
from tuneserve.settings import Settings

EVIDENCE = Evidence([f"text {number}" for number in range(40)], ["bad", "good"] * 20)
Trials = list[dict[str, Any] | None] | None


def trial(wrong: int = 0) -> dict[str, Any]:
    predicted = [{"bad": "good", "good": "bad"}[one] for one in EVIDENCE.labels[:wrong]] + EVIDENCE.labels[wrong:]
    return {"error": None, "predicted": predicted, "latency_ms": 1.0, "bytes": 1}


def candidate(store: Store, name: str, wrong: int = 0) -> Version:
    about = {"metrics": {"test": {"accuracy": 1 - wrong / 40}}, "data": {"counts": {"test": {"bad": 20, "good": 20}}}}
    version = add(store, name, **about)
    write_evidence(store.evidence_folder / name, EVIDENCE, [])
    return version


def admit(store: Store, monkeypatch: pytest.MonkeyPatch, name: str, wrong: int = 0, **changed: str) -> None:
    version = candidate(store, name, wrong)
    champion = gate._champion(store)
    settings = Settings.from_environ({"MODEL_PATH": str(store.root), **changed})

    def run_trial(*about: object) -> dict[str, Any]:
        assert about == (version, champion, EVIDENCE, settings)
        return {"candidate": trial(wrong), "champion": trial() if champion else None}

    monkeypatch.setattr(gate, "run_trial", run_trial)
    gate.admit(store, version, settings)


def ids(store: Store) -> list[str]:
    return [version.id for version in store.versions()]


def test_as_many_versions_stay_as_the_setting_says_whether_accepted_or_refused(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept(store, "a", "b", "c", "d")
    admit(store, monkeypatch, "e", KEEP_VERSIONS="3")
    assert ids(store) == ["c", "d", "e"]
    with pytest.raises(RefusedError, match="The champion stays"):
        admit(store, monkeypatch, "f", wrong=30, KEEP_VERSIONS="3")
    assert ids(store) == ["d", "e", "f"]
    assert store.champion_id() == "e"


def test_a_version_that_passed_shadows_the_champion_first_and_is_not_removed_meanwhile(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept(store, "a", "b")
    admit(store, monkeypatch, "c", SHADOW_REQUESTS="5")
    assert (store.champion_id(), store.challenger_id()) == ("b", "c")
    decision = read_decision(store.version("c"))
    assert decision is not None
    assert decision.stands
    for name in ("d", "e"):
        with pytest.raises(RefusedError):
            admit(store, monkeypatch, name, wrong=30, KEEP_VERSIONS="2")
    assert ids(store) == ["a", "b", "c"]
    store.set_challenger(None)
    assert store.forget_old(2) == ["c"]
    admit(store, monkeypatch, "f", SHADOW_REQUESTS="0")
    assert store.champion_id() == "f"


def decide(store: Store, name: str, **changed: Any) -> Decision:
    decision = Decision(
        name, **{"verdict": "accepted", "by": "gate", "sentence": "it is good", "champion": None} | changed
    )
    write_decision(candidate(store, name), decision)
    return decision


@pytest.mark.parametrize(
    ("champion", "challenger", "known", "chosen", "said"),
    [
        ("a", None, {}, {}, "it is good"),
        ("a", None, {"verdict": "refused"}, {}, "it is good"),  # people promoted it
        (None, None, {"verdict": "refused"}, {}, "may not serve: it is good. Change"),
        (None, None, {"withdrawn_at": "2026-03-02T13:00:00+00:00"}, {}, "may not serve: people rolled it back. Change"),
        ("b", "a", {}, {}, "it is good"),
        ("b", "c", {}, {}, "judged"),
        ("b", None, {}, {"by": "person", "at": "2026-03-02T13:00:00+00:00"}, "it is good"),
        ("b", None, {}, {"by": "person", "at": "2026-03-02T11:00:00+00:00"}, "judged"),
        ("b", None, {}, {"at": "2026-03-02T13:00:00+00:00"}, "judged"),
        (None, None, {}, {}, "judged"),
    ],
)
def test_a_version_that_was_decided_on_is_judged_again_only_where_nothing_else_was_said_since(
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    champion: str | None,
    challenger: str | None,
    known: dict[str, Any],
    chosen: dict[str, Any],
    said: str,
) -> None:
    before = decide(store, "a", at="2026-03-02T12:00:00+00:00", **known)
    decide(store, "b", **chosen)
    if champion:
        store.set_champion(store.version(champion))
    if challenger:
        store.set_challenger(candidate(store, challenger) if challenger == "c" else store.version(challenger))
    judged = Decision("a", "accepted", "gate", "judged", champion)
    monkeypatch.setattr(gate, "run_trial", lambda *about: {"candidate": {}, "champion": None})
    monkeypatch.setattr(gate, "judge", lambda *about: judged)
    settings = Settings.from_environ({"MODEL_PATH": str(store.root)})
    if "may not serve" in said:
        with pytest.raises(RefusedError, match=said):
            gate.admit(store, store.version("a"), settings)
    else:
        assert gate.admit(store, store.version("a"), settings) == (judged if said == "judged" else before)
        assert store.champion_id() == ("a" if said == "judged" else champion)


def test_where_the_pointer_cannot_be_read_the_last_good_version_is_champion(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept(store, "a")
    store.pointer.write_bytes(b"\xff")
    settings = Settings.from_environ({"MODEL_PATH": str(store.root)})
    assert gate.admit(store, store.version("a"), settings) == read_decision(store.version("a"))
    assert store.champion_id() == "a"
    (store.version("a").folder / "decision.json").unlink()
    unknown = gate.admit(store, store.version("a"), settings)
    assert (unknown.version, unknown.sentence) == ("a", "was never judged")
    store.pointer.write_bytes(b"\xff")
    admit(store, monkeypatch, "b")  # with nobody to compare with
    assert store.champion_id() == "b"
    store.pointer.write_bytes(b"\xff")
    admit(store, monkeypatch, "c")
    decision = read_decision(store.version("c"))
    assert decision is not None
    assert decision.champion == "b"


@pytest.mark.parametrize(
    ("program", "timeout_s", "ended"),
    [("repeat", 60, ""), ("no_such_module", 60, "ended with exit code 1"), ("repeat", 0, "took more than 0 s")],
)
def test_a_trial_is_a_process_of_its_own_that_is_asked_and_answers_by_files(
    store: Store, monkeypatch: pytest.MonkeyPatch, program: str, timeout_s: float, ended: str
) -> None:
    (store.root / "repeat.py").write_text("import sys; sys.stdout.write(sys.stdin.read())")
    monkeypatch.setattr(gate, "PROGRAM", store.root)
    monkeypatch.setattr(gate, "TRIAL", program)
    monkeypatch.setattr(gate, "TRIAL_TIMEOUT_S", timeout_s)
    settings = Settings.from_environ({"MODEL_PATH": str(store.root), "LONG_TEXT": "error", "API_KEY": "open"})
    one, two = (candidate(store, name) for name in "ab")
    asked, found = gate._in_fresh_process([one, two], EVIDENCE, settings)
    assert found == ended
    expected: Any = {
        "versions": [str(one.folder), str(two.folder)],
        "texts": EVIDENCE.texts,
        "labels": EVIDENCE.labels,
        "settings": settings.public() | {"long_text": "truncate"},
    }
    assert asked == (None if ended else expected)


def test_without_a_champion_there_is_nobody_to_shadow(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    admit(store, monkeypatch, "a", SHADOW_REQUESTS="5")
    assert (store.champion_id(), store.challenger_id()) == ("a", None)


@pytest.mark.parametrize(
    ("answers", "asked", "error", "champions"),
    [
        ([[trial(), trial()]], [2], None, None),
        ([None, [trial()]], [2, 1], None, "the champion cannot be loaded"),
        ([None, None], [2, 1], "the process that tried it ended with exit code -11", None),
    ],
)
def test_a_trial_that_crashes_is_tried_again_without_the_champion_who_may_be_the_cause(
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    answers: list[Trials],
    asked: list[int],
    error: str | None,
    champions: str | None,
) -> None:
    [champion] = accept(store, "a")
    seen = []

    def run(versions: list[Version], *about: object) -> tuple[Trials, str]:
        assert about == (EVIDENCE, settings)
        seen.append(len(versions))
        return answers[len(seen) - 1], "ended with exit code -11"

    monkeypatch.setattr(gate, "_in_fresh_process", run)
    version = candidate(store, "b")
    settings = Settings.from_environ({"MODEL_PATH": str(store.root)})
    found = gate.run_trial(version, champion, EVIDENCE, settings)
    assert seen == asked
    assert found["candidate"] is not None
    assert found["candidate"]["error"] == error
    assert (found["champion"] or {}).get("error") == champions
    clean = np.ones(40, dtype=bool)
    decision = gate.judge(version, champion, EVIDENCE, found, clean, gate.Bounds.of(settings))
    assert decision.stands == (error is None)


def test_a_trial_puts_no_file_where_a_kill_would_leave_it(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (folder := tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    seen = []

    def run(command: list[str], **options: Any) -> None:
        seen.append(list(folder.iterdir()))
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(subprocess, "run", run)
    settings = Settings.from_environ({"MODEL_PATH": str(store.root)})
    found = gate.run_trial(candidate(store, "a"), None, EVIDENCE, settings)
    assert found["candidate"] is not None
    assert "took more than" in found["candidate"]["error"]
    assert seen == [[]]


def test_an_old_version_is_out_of_sight_before_it_is_removed_and_its_evidence_after_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept(store, "a", "b", "c")
    (store.evidence_folder / "a").mkdir(parents=True)
    seen: list[tuple[str, bool]] = []

    def remove(path: Path, *, ignore_errors: bool) -> None:
        assert ignore_errors  # what cannot be removed now is removed at the next start
        seen.append((path.name, (store.versions_folder / "a").exists()))

    monkeypatch.setattr("tuneserve.lifecycle.store.shutil.rmtree", remove)
    assert store.forget_old(2) == ["a"]
    assert seen == [(".unfinished-a", False), ("a", False)]


def test_a_rollback_that_is_killed_has_withdrawn_the_version_and_the_same_command_goes_on(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept(store, "a", "b")

    def die(version: Version) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "set_champion", die)
        with pytest.raises(KeyboardInterrupt):
            store.rollback()
    decision = read_decision(store.version("b"))
    assert decision is not None
    assert decision.withdrawn_at
    assert store.champion_id() == "b"
    assert store.rollback() == (store.version("a"), "b")
    assert store.champion_id() == "a"


def test_who_lost_the_lock_does_not_ask_the_gate(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from tuneserve.lifecycle.status import Status, hold
    from tuneserve.training import job

    monkeypatch.setattr(job, "keep_evidence", lambda *about, **options: None)
    monkeypatch.setattr(gate, "admit", lambda *about: pytest.fail("asked"))
    settings = Settings.from_environ({"MODEL_PATH": str(store.root)})
    with hold(store.lock) as lock:
        store.lock.unlink()
        with pytest.raises(StoreError, match="removed or replaced"):
            job.judge(settings, store, add(store, "a"), None, lock, Status(None))  # type: ignore[arg-type]


def test_evidence_goes_with_its_version_though_a_process_was_killed_between_the_two(store: Store) -> None:
    accept(store, "a", "b", "c")
    for name in ("a", "b", "gone", ".being-written-01234567"):
        (store.evidence_folder / name).mkdir(parents=True)
    assert store.forget_old(2) == ["a"]
    assert {path.name for path in store.evidence_folder.iterdir()} == {"b", ".being-written-01234567"}
