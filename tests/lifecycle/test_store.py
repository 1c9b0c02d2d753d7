"""Versions and the pointer to the one that answers, on real disks that fail and in processes that die."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lifecycle.conftest import ENVIRONMENT

from tuneserve.artifact import METADATA, Version, new_version, read_version
from tuneserve.errors import NoModelError, StoreError
from tuneserve.files import write_json
from tuneserve.lifecycle.decision import Decision, read_decision, write_decision
from tuneserve.lifecycle.store import Store


def add(store: Store, name: str, **metadata: Any) -> Version:
    folder = store.versions_folder / name
    with new_version(folder) as temporary:
        (temporary / "report").mkdir()
        write_json(temporary / "report" / "test.json", {})
        write_json(temporary / METADATA, {"labels": ["bad", "good"], **metadata})
    return read_version(folder)


def content(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_version_appears_whole_under_its_name(store: Store) -> None:
    folder = store.versions_folder / "one"
    with new_version(folder) as temporary:
        write_json(temporary / METADATA, {"labels": ["bad", "good"]})
        assert store.versions() == []
        assert not folder.exists()
    (version,) = store.versions()
    assert (version.id, version.folder, version.labels) == ("one", folder, ["bad", "good"])
    assert content(store.versions_folder) == ["one", "one/metadata.json"]


def test_a_version_may_be_read_by_whoever_serves_it(store: Store) -> None:
    before = os.umask(0o077)  # as strict as they come
    try:
        version = add(store, "one")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in [version.folder, *version.folder.rglob("*")]}
    assert modes == {"one": 0o755, "report": 0o755, "test.json": 0o644, METADATA: 0o644}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
def test_a_block_that_raises_leaves_nothing_visible(error: type[BaseException], store: Store) -> None:
    def write() -> None:
        with new_version(store.versions_folder / "one") as temporary:
            write_json(temporary / METADATA, {"labels": []})
            raise error

    with pytest.raises(StoreError if error is OSError else error):
        write()
    assert store.versions() == []
    assert not (store.versions_folder / "one").exists()
    store.prepare()
    assert content(store.versions_folder) == []


def test_a_version_is_never_written_over(store: Store) -> None:
    add(store, "one", first=True)
    with pytest.raises(StoreError, match="cannot be written"):
        add(store, "one", first=False)
    assert [version.metadata["first"] for version in store.versions()] == [True]


WRITER = """
import sys, time
from pathlib import Path
from tuneserve.artifact import METADATA, new_version
from tuneserve.files import write_json
with new_version(Path(sys.argv[1])) as folder:
    (folder / "model.safetensors").write_bytes(bytes(1 << 20))
    if sys.argv[2] == "after the metadata":
        write_json(folder / METADATA, {"labels": []})
    print("now", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("moment", ["before the metadata", "after the metadata"])
def test_a_process_killed_while_it_writes_leaves_no_version(moment: str, store: Store) -> None:
    old = add(store, "old")
    store.set_champion(old)
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(store.versions_folder / "new"), moment],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert len(list(store.versions_folder.iterdir())) == 2  # what it left is there, under a name no one reads
    assert [version.id for version in store.versions()] == ["old"]
    assert store.champion().id == "old"
    for leftover in store.versions_folder.glob(".*"):
        os.utime(leftover, (0, 0))
    store.prepare()
    assert [path.name for path in store.versions_folder.iterdir()] == ["old"]


def test_a_folder_without_metadata_is_no_version(store: Store) -> None:
    add(store, "one")
    (store.versions_folder / "two").mkdir()
    (store.versions_folder / "a file").write_text("")
    assert [version.id for version in store.versions()] == ["one"]
    with pytest.raises(StoreError, match=f"two holds no finished model: there is no {METADATA}"):
        read_version(store.versions_folder / "two")
    with pytest.raises(StoreError, match=r"no version 'three' in .*; run\.py versions lists them"):
        store.promote("three")


@pytest.mark.parametrize("torn", [b"", b'{"labels": ["bad"', b"\xff\xfe", b"null", b"[]", b'"labels"'])
def test_metadata_that_are_no_record_are_a_clear_error(torn: bytes, store: Store) -> None:
    (add(store, "one").folder / METADATA).write_bytes(torn)
    with pytest.raises(StoreError, match=rf"one/{METADATA} (cannot be read|is no version's metadata)"):
        read_version(store.versions_folder / "one")


def test_a_version_that_cannot_be_read_does_not_hide_the_others(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    add(store, "one", fingerprint="same")
    (add(store, "two", fingerprint="same").folder / METADATA).write_text("{")
    assert [version.id for version in store.versions()] == ["one"]
    assert f"two/{METADATA} cannot be read" in caplog.text
    found = store.find("same")
    assert found is not None
    assert found.id == "one"


def test_versions_come_oldest_first(store: Store) -> None:
    names = ["20260102T030405Z-b", "20250102T030405Z-c", "20260102T030404Z-a"]
    for name in names:
        add(store, name)
    assert [version.id for version in store.versions()] == sorted(names)


def test_the_newest_version_with_a_fingerprint_is_found(store: Store) -> None:
    for name, fingerprint in (("1", "same"), ("3", "same"), ("2", "same"), ("4", "other")):
        add(store, name, fingerprint=fingerprint)
    add(store, "5")
    found = store.find("same")
    assert found is not None
    assert found.id == "3"
    assert store.find("none of them") is None


def test_an_empty_store_says_what_to_do(tmp_path: Path) -> None:
    for store in (Store(tmp_path), Store(tmp_path / "nowhere")):
        assert store.versions() == []
        with pytest.raises(NoModelError, match=f"no model in MODEL_PATH={store.root} yet.*run.py train"):
            store.champion()


def test_the_pointer_names_the_champion_in_one_line(store: Store) -> None:
    for name in ("one", "two"):
        store.set_champion(add(store, name))
        assert store.pointer.read_text() == f"{name}\n"
        assert store.champion().id == name


@pytest.mark.parametrize("ending", ["", "\n", "\r\n", " \n\n"])
def test_a_pointer_written_by_hand_is_read(ending: str, store: Store) -> None:
    add(store, "one")
    store.pointer.write_bytes(f"one{ending}".encode())
    assert store.champion().id == "one"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "\n",
        ".",
        "..",
        "../x",
        "../versions/x",
        "x/sub",
        "x/",
        ".x",
        "gone",
        "gone\nx",
        "x\0",
        "x" * 300,
        b"\xff\xfe",
    ],
)
def test_a_pointer_to_what_is_no_version_is_a_clear_error(name: str | bytes, store: Store) -> None:
    for folder in ("x", "versions/x", "versions/x/sub", "versions/.x", "versions"):  # were it to look, it would find
        (store.root / folder).mkdir(exist_ok=True)
        write_json(store.root / folder / METADATA, {"labels": []})
    store.pointer.write_bytes(name if isinstance(name, bytes) else name.encode())
    with pytest.raises(StoreError) as caught:
        store.champion()
    assert str(store.root) in str(caught.value)


def test_a_pointer_that_is_no_file_is_a_clear_error(store: Store) -> None:
    store.pointer.mkdir()
    with pytest.raises(StoreError, match="champion cannot be read"):
        store.champion()
    with pytest.raises(StoreError, match="champion cannot be written"):
        store.set_champion(add(store, "one"))


def test_prepare_clears_leftovers_and_nothing_else(store: Store) -> None:
    version = add(store, "one")
    store.set_champion(version)
    (store.checkpoints_folder / "run").mkdir()
    (store.root / "jobs").mkdir()
    before = content(store.root)
    assert [name for name in before if "/" not in name] == ["champion", "checkpoints", "jobs", "versions"]
    store.set_challenger(None)  # there is none
    for folder in (store.versions_folder, store.checkpoints_folder):
        leftover = folder / ".unfinished-two-01234567"
        (leftover / "report").mkdir(parents=True)
        os.utime(leftover, (0, 0))
    for name in (".champion-01234567", ".schedule.json-89abcdef", "jobs/.job.json-01234567"):
        leftover = store.root / name
        leftover.write_text("one\n")
        os.utime(leftover, (0, 0))
    store.prepare()
    assert content(store.root) == before


def test_what_another_run_is_writing_now_is_left_alone(store: Store) -> None:
    (store.versions_folder / ".unfinished-two-01234567").mkdir()
    (store.root / ".champion-01234567").write_text("one\n")
    store.prepare()
    assert [path.name for path in store.versions_folder.iterdir()] == [".unfinished-two-01234567"]
    assert (store.root / ".champion-01234567").exists()


def test_a_store_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("")
    with pytest.raises(StoreError, match=r"MODEL_PATH=.* cannot be written to"):
        Store(tmp_path / "models").prepare()


def test_a_store_that_may_not_be_written_to_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("tuneserve.lifecycle.store.replace_file", refuse)
    with pytest.raises(StoreError, match=r"MODEL_PATH=.* cannot be written to: .*Permission denied"):
        store.prepare()


def test_a_read_only_disk_is_a_clear_error_and_can_still_be_read(disk: Any) -> None:
    store = Store(disk.path)
    store.prepare()
    version = add(store, "one")
    store.set_champion(version)
    disk.make_read_only()
    for act in (store.prepare, lambda: add(store, "two"), lambda: store.set_champion(version)):
        with pytest.raises(StoreError, match="Read-only file system"):
            act()
    assert store.champion() == version


def test_a_full_disk_is_a_clear_error_and_the_champion_stays(disk: Any) -> None:
    store = Store(disk.path)
    store.prepare()
    version = add(store, "one")
    store.set_champion(version)
    disk.fill()
    for act in (lambda: add(store, "two"), lambda: store.set_champion(version)):
        with pytest.raises(StoreError, match="No space left"):
            act()
    assert [one.id for one in store.versions()] == ["one"]
    assert store.champion() == version


def save_weights(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1 << 18)}, folder / "model.safetensors")


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({str(number): number for number in range(1 << 16)})).save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("save", [save_weights, save_tokenizer])
def test_a_disk_too_small_for_the_model_is_a_clear_error(save: Callable[[Path], None], disk: Any) -> None:
    store = Store(disk.path)
    store.prepare()
    with pytest.raises(StoreError, match="No space left"), new_version(store.versions_folder / "one") as temporary:
        save(temporary)
    store.prepare()
    assert content(store.versions_folder) == []


def test_a_disk_too_small_for_a_checkpoint_is_a_clear_error(disk: Any) -> None:
    import torch

    from tuneserve.network.optimizer import Optimizer
    from tuneserve.training.checkpoint import Checkpoints, Position
    from tuneserve.training.world import ALONE

    checkpoints = Checkpoints(disk.path / "run", every_minutes=10)
    with Optimizer(torch.nn.Linear(512, 512), learning_rate=1e-3, max_norm=1.0, precision="fp32") as optimizer:
        for save in (
            lambda: checkpoints.save(Position(), optimizer, ALONE),
            lambda: checkpoints.save_best(optimizer, ALONE),
        ):
            with pytest.raises(StoreError, match="No space left"):
                save()
    assert content(disk.path) == ["run"]


def accept(store: Store, *names: str) -> list[Version]:
    versions = []
    for name in names:
        versions.append(add(store, name))
        write_decision(versions[-1], Decision(name, "accepted", "gate", "passed", store.champion_id()))
        store.set_champion(versions[-1])
    return versions


def test_the_champion_before_is_remembered(store: Store) -> None:
    assert store.previous() is None
    accept(store, "one", "two", "three")
    store.set_champion(store.version("three"))  # once more changes nothing
    assert (store.champion_id(), store.previous()) == ("three", store.version("two"))


def test_a_rollback_goes_back_and_withdraws(store: Store) -> None:
    accept(store, "one", "two")
    now, withdrawn = store.rollback()
    assert (now.id, withdrawn, store.champion_id()) == ("one", "two", "one")
    decision = read_decision(store.version("two"))
    assert decision is not None
    assert decision.withdrawn_at
    assert not decision.stands
    with pytest.raises(StoreError, match=r"two, was withdrawn itself; choose one: run\.py promote"):
        store.rollback()
    assert store.champion_id() == "one"


def test_there_is_nothing_to_roll_back_to_after_the_first_version(store: Store) -> None:
    accept(store, "one")
    with pytest.raises(StoreError, match="remembers no version to go back to"):
        store.rollback()


def test_a_rollback_works_when_the_champion_is_gone(store: Store) -> None:
    accept(store, "one", "two")
    shutil.rmtree(store.versions_folder / "two")
    assert store.rollback()[0].id == "one"


def test_people_may_promote_what_the_gate_refused(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    accept(store, "one")
    refused = add(store, "two")
    write_decision(refused, Decision("two", "refused", "gate", "too slow", "one"))
    store.promote("two")
    assert "two is promoted, although: too slow" in caplog.text
    decision = read_decision(refused)
    assert decision is not None
    assert (decision.by, decision.stands, decision.champion, store.champion_id()) == ("person", True, "one", "two")
    assert "too slow" in decision.sentence
    store.rollback()
    store.promote("two")
    assert "two is promoted, although: it was withdrawn 20" in caplog.text
    for name in ("none", "../one", "", ".hidden"):
        with pytest.raises(StoreError):
            store.promote(name)


@pytest.mark.parametrize("garbage", [b"", b"\xff\xfe", b"no such version\n"])
def test_promote_and_rollback_mend_a_pointer_that_cannot_be_read(store: Store, garbage: bytes) -> None:
    accept(store, "one", "two")
    store.pointer.write_bytes(garbage)
    assert "one" in store.table()
    assert store.rollback()[0].id == store.champion_id() == "one"
    store.pointer.write_bytes(garbage)
    store.promote("two")
    assert store.champion_id() == "two"


def test_a_damaged_version_cannot_be_promoted(store: Store) -> None:
    add(store, "one", files={"model.safetensors": 10})
    with pytest.raises(StoreError, match="damaged"):
        store.promote("one")
    assert store.champion_id() is None


def test_old_versions_go_but_never_the_champion_or_the_one_before(store: Store) -> None:
    accept(store, "a", "b", "c", "d", "e")
    store.promote("b")
    (store.evidence_folder / "a").mkdir(parents=True)
    for keep in (5, 6, 10):
        assert store.forget_old(keep) == []
    assert store.forget_old(3) == ["a", "c"]
    assert [version.id for version in store.versions()] == ["b", "d", "e"]
    assert not (store.evidence_folder / "a").exists()
    assert store.forget_old(1) == ["d"]
    assert (store.champion_id(), store.previous()) == ("b", store.version("e"))


@pytest.mark.parametrize(
    ("pointer", "previous", "names"),
    [
        (b"three", b"one", ["one", "two", "three"]),
        (b"three", b"three", ["two", "three", "one"]),  # the champion is none before itself
        (None, b"one", ["one", "two", "three"]),
        (b"", b"one", ["three", "one", "two"]),  # as they were decided on, newest first
        (b"gone", b"undecided", ["three", "one", "two", "undecided"]),
        (b"", b"gone", ["three", "one", "two"]),
        (b"", None, ["three", "one", "two"]),
    ],
)
def test_the_last_good_versions_come_when_the_champion_cannot(
    store: Store, pointer: bytes | None, previous: bytes | None, names: list[str]
) -> None:
    for name, hour in (("one", 14), ("two", 12), ("three", 14)):
        decision = Decision(name, "accepted", "gate", "passed", None, at=f"2026-03-02T{hour}:00:00+00:00")
        write_decision(add(store, name), decision)
    write_decision(add(store, "four"), Decision("four", "refused", "gate", "worse", "three"))
    add(store, "undecided")
    for path, content in ((store.pointer, pointer), (store.previous_pointer, previous)):
        if content is not None:
            path.write_bytes(content)
    assert [version.id for version in store.last_good()] == names


def test_a_name_that_is_taken_gets_a_number(store: Store) -> None:
    for name in ("one", "one-2", "one-3"):
        folder = store.free_folder("one")
        assert folder == store.versions_folder / name
        folder.mkdir()


def test_a_store_that_is_a_model_says_how_to_serve_it_unless_it_has_a_champion(store: Store) -> None:
    (store.root / "config.json").write_text("{}")
    with pytest.raises(NoModelError, match=f"run.py import {store.root}; to fine-tune it, name it in BASE_MODEL"):
        store.champion()
    store.set_champion(add(store, "one"))
    assert store.champion().id == "one"


def test_the_table_shows_each_version_with_its_decision(store: Store) -> None:
    assert "no version" in store.table()
    accept(store, "one", "two")
    store.rollback()
    add(store, "zero", metrics={"test": {"accuracy": 0.875}}, created_at="2026-01-02T03:04:05+00:00")
    lines = store.table().splitlines()
    assert [line.split()[0] for line in lines] == ["version", "one", "two", "zero"]
    assert "champion" in lines[1]
    assert "previous" in lines[2]
    assert "withdrawn" in lines[2]
    assert "87.50%" in lines[3]
    assert "not judged" in lines[3]


def test_of_a_challenger_the_table_says_that_it_is_one_and_what_became_of_it(store: Store) -> None:
    versions = [add(store, name) for name in ("a", "b", "c")]
    for version in versions:
        write_decision(version, Decision(version.id, "accepted", "gate", "is good", None))
    store.set_champion(versions[0])
    store.set_challenger(versions[1])
    assert [line.split()[:2] for line in store.table().splitlines()[1:]] == [
        ["a", "champion"],
        ["b", "challenger"],
        ["c", "accepted:"],
    ]
    store.set_challenger(versions[1])  # the same again is no news
    assert "took its place" not in store.table()
    store.set_challenger(versions[2])
    assert "is good; c took its place in the champion's shadow" in store.table()
    store.challenger_pointer.write_bytes(b"\xff")
    assert f"{store.challenger_pointer} cannot be read" in store.table()
    store.set_challenger(versions[2])
    assert store.challenger_id() == "c"


def test_a_version_is_on_disk_before_it_has_its_name_and_its_name_before_it_is_pointed_at(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    fsync, rename, replace_ = os.fsync, Path.rename, Path.replace

    def sync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(store.root)
        events.append(("fsync", re.sub(r"-[0-9a-f]{8}", "", str(path))))
        fsync(descriptor)

    def named(move: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def moved(self: Path, target: Path) -> Path:
            events.append(("rename", str(target.relative_to(store.root))))
            return move(self, target)

        return moved

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", named(rename))
    monkeypatch.setattr(Path, "replace", named(replace_))
    with new_version(store.versions_folder / "one") as temporary:
        (temporary / "model.safetensors").write_bytes(b"weights")
        (temporary / METADATA).write_text('{"labels": []}')
    hidden = "versions/.unfinished-one"
    at = events.index(("rename", "versions/one"))
    assert {path for _, path in events[:at]} == {hidden, f"{hidden}/model.safetensors", f"{hidden}/{METADATA}"}
    assert events[at:] == [("rename", "versions/one"), ("fsync", "versions")]
    events.clear()
    store.set_champion(store.version("one"))
    assert events == [("fsync", ".champion"), ("rename", "champion"), ("fsync", ".")]


def test_a_store_that_is_gone_is_not_made_anew(tmp_path: Path) -> None:
    store = Store(tmp_path / "models")
    with pytest.raises(StoreError, match="no longer holds the versions"):
        store.prepare(new=False)
    with pytest.raises(StoreError, match="cannot be written"), new_version(store.versions_folder / "one"):
        pass
    assert not store.root.exists()
    store.prepare()
    store.prepare(new=False)
