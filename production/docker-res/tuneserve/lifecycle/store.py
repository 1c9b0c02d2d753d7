"""The model store: a folder of immutable versions and a one-line file that names the one in service.

    MODEL_PATH/versions/<id>/   finished versions, each with the gate's decision.json
    MODEL_PATH/evidence/<id>/   texts to judge a version by
    MODEL_PATH/checkpoints/     training that may be resumed
    MODEL_PATH/champion         the id of the version that answers
    MODEL_PATH/previous         the id of the one that answered before it
    MODEL_PATH/challenger       the id of the one that shadows the champion, if there is one
    MODEL_PATH/trainer.lock     held by the one process that trains
    MODEL_PATH/training.json    the status of the newest training

A pointer file and not a symbolic link: links do not survive object-store mounts. All that moves a pointer
is here, which makes the module a little long.
"""

import logging
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tuneserve.artifact import METADATA, UNFINISHED, Version, is_whole, read_version, require_whole
from tuneserve.errors import NoModelError, StoreError
from tuneserve.files import read_bytes, remove_leftovers, replace_file
from tuneserve.lifecycle.decision import Decision, read_decision, write_decision

logger = logging.getLogger(__name__)

MEND = "Choose one with run.py promote <version>; run.py versions lists them."
COLUMNS = ("version", "created", "test accuracy", "serves", "decision")
POINTER_BYTES = 4096
ABANDONED_S = 3600
"""Age at which something unfinished is taken for that of a killed run."""


class Store:
    """The folder at `MODEL_PATH`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.versions_folder = root / "versions"
        self.checkpoints_folder = root / "checkpoints"
        self.evidence_folder = root / "evidence"
        self.pointer = root / "champion"
        self.previous_pointer = root / "previous"
        self.challenger_pointer = root / "challenger"
        self.lock = root / "trainer.lock"
        self.status_file = root / "training.json"

    def prepare(self, *, new: bool = True) -> None:
        """Create the folders and remove what killed runs left unfinished.

        Args:
            new: whether there may be no store yet.

        Raises:
            StoreError: the folder cannot be written to, or there is no store and there should be.
        """
        if not new and self.is_lost:
            raise StoreError(self.lost)
        try:
            for folder in (self.versions_folder, self.checkpoints_folder):
                folder.mkdir(parents=True, exist_ok=True)
                for leftover in folder.glob(f"{UNFINISHED}*"):
                    if leftover.is_symlink():
                        leftover.unlink()
                    elif time.time() - leftover.stat().st_mtime > ABANDONED_S:
                        shutil.rmtree(leftover)
            remove_leftovers(self.root, self.root / "jobs", older_than_s=ABANDONED_S)  # others may write there now
            replace_file(self.root / ".writable", b"")
            (self.root / ".writable").unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"MODEL_PATH={self.root} cannot be written to: {error}") from error

    @property
    def is_lost(self) -> bool:
        """Whether a store that was prepared is there no more: its disk is gone."""
        return not self.versions_folder.is_dir()

    @property
    def lost(self) -> str:
        """That, as a sentence."""
        return f"MODEL_PATH={self.root} no longer holds the versions that it held"

    def versions(self) -> list[Version]:
        """All finished versions that can be read, oldest first (ids begin with their time)."""
        found = []
        for folder in sorted(path.parent for path in self.versions_folder.glob(f"*/{METADATA}")):
            try:
                if not folder.name.startswith("."):
                    found.append(read_version(folder))
            except StoreError as error:
                logger.warning("%s", error)
        return found

    def free_folder(self, name: str) -> Path:
        """The folder for a version of this name, with a number appended if the name is taken."""
        number, folder = 1, self.versions_folder / name
        while folder.exists():
            number += 1
            folder = self.versions_folder / f"{name}-{number}"
        return folder

    def find(self, fingerprint: str) -> Version | None:
        """The newest undamaged version with this fingerprint."""
        same = [one for one in self.versions() if one.metadata.get("fingerprint") == fingerprint and is_whole(one)]
        return same[-1] if same else None

    def champion(self) -> Version:
        """The version that answers now.

        Raises:
            NoModelError: none has been published yet.
            StoreError: the pointer names a version that is not there.
        """
        name = _read_pointer(self.pointer)
        if name is None and (self.root / "config.json").is_file():
            raise NoModelError(
                f"MODEL_PATH={self.root} is a Hugging Face model, and no store of versions. To serve it as it is, name "
                f"another folder in MODEL_PATH and run.py import {self.root}; to fine-tune it, name it in BASE_MODEL."
            )
        if name is None:
            raise NoModelError(
                f"There is no model in MODEL_PATH={self.root} yet. Train one first: run.py train (or train-serve)."
            )
        return read_version(self.versions_folder / name)

    def champion_id(self) -> str | None:
        """The id that the pointer holds; None before the first publication.

        Raises:
            StoreError: the pointer cannot be read, or holds something else.
        """
        return _read_pointer(self.pointer)

    def previous(self) -> Version | None:
        """The version that answered before the champion, if it is still there."""
        try:
            name = _read_pointer(self.previous_pointer)
            other = name and name != self._readable_champion_id()
            return read_version(self.versions_folder / name) if name and other else None
        except StoreError as error:
            logger.warning("%s", error)
            return None

    def last_good(self) -> list[Version]:
        """Versions that may answer while the champion cannot: the previous one, then all accepted ones, newest first.

        If the pointer cannot be read, the champion was probably the version that was decided on last.
        """
        versions = {one.id: one for one in self.versions()}
        decided = {name: found.at for name, one in versions.items() if (found := read_decision(one)) and found.stands}
        previous = [before.id] if (before := self.previous()) else []
        names = [*previous, *reversed(decided)]
        try:
            self.champion()
        except NoModelError:
            pass
        except StoreError:
            names = [*sorted(decided, key=lambda name: (decided[name], name), reverse=True), *previous]
        return [versions[name] for name in dict.fromkeys(names) if name in versions]

    def set_champion(self, version: Version) -> None:
        """Make this version the champion, and remember the one before it.

        Raises:
            StoreError: a pointer cannot be written.
        """
        before = self._readable_champion_id()  # an unreadable one cannot be returned to
        if before not in (None, version.id):
            _write_pointer(self.previous_pointer, before)
        _write_pointer(self.pointer, version.id)

    def _readable_champion_id(self) -> str | None:
        try:
            return self.champion_id()
        except StoreError as error:
            logger.warning("%s", error)
            return None

    def challenger_id(self) -> str | None:
        """The id of the version that is to shadow the champion.

        Raises:
            StoreError: the pointer cannot be read, or holds something else.
        """
        return _read_pointer(self.challenger_pointer)

    def set_challenger(self, version: Version | None) -> None:
        """Let this version shadow the champion; None ends it. The decision of a replaced challenger says so.

        Raises:
            StoreError: the pointer cannot be written.
        """
        if version is not None:
            self._note_replaced(version)
        _write_pointer(self.challenger_pointer, version.id if version else None)

    def _note_replaced(self, newer: Version) -> None:
        with suppress(StoreError):  # an unreadable pointer, or a version that is gone
            name = self.challenger_id()
            if name is not None and name != newer.id:
                decision = read_decision(older := self.version(name)) or Decision.unknown(name)
                said = f"{decision.sentence}; {newer.id} took its place in the champion's shadow"
                write_decision(older, replace(decision, sentence=said))

    def promote(self, name: str) -> Version:
        """Make a version champion by hand, whatever the gate decided.

        Raises:
            StoreError: there is no such version, it is damaged, or the pointer cannot be written.
        """
        version = self.version(name)
        require_whole(version)
        if (decision := read_decision(version)) and not decision.stands:
            why = f"it was withdrawn {decision.withdrawn_at}" if decision.withdrawn_at else decision.sentence
            logger.warning("version %s is promoted, although: %s", version.id, why)
        champion = self._readable_champion_id()
        write_decision(version, Decision.by_a_person(version.id, champion=champion, before=decision))
        self.set_champion(version)
        return version

    def rollback(self, expected: str | None = None) -> tuple[Version, str | None]:
        """Return to the previous champion and withdraw the current one, which no retraining brings back.

        Args:
            expected: the champion that is to be withdrawn; None for whichever it is.

        Returns:
            The new champion, and the id of the version that was withdrawn.

        Raises:
            StoreError: there is nothing to go back to, or another version is the champion.
        """
        withdrawn = self._readable_champion_id()
        if expected not in (None, withdrawn):
            raise StoreError(f"Version {expected!r} is not the champion, or is no longer.")
        version = self.previous()
        if version is None:
            raise StoreError(f"MODEL_PATH={self.root} remembers no version to go back to; see run.py versions.")
        require_whole(version)
        if (decision := read_decision(version)) and decision.withdrawn_at:
            raise StoreError(
                f"the version before, {version.id}, was withdrawn itself; choose one: run.py promote <version>."
            )
        try:  # withdraw first: if killed in between, the same command continues
            left = self.version(withdrawn or "")
            write_decision(left, (read_decision(left) or Decision.unknown(left.id)).withdrawn())
        except StoreError as error:  # its folder may be gone, which is a reason to roll back
            logger.warning("%s", error)
        self.set_champion(version)
        return version, withdrawn

    def version(self, name: str) -> Version:
        """A finished version by its id.

        Raises:
            StoreError: there is none of this name.
        """
        if not _is_id(name):
            raise StoreError(f"{name!r} is no version's id; run.py versions lists them.")
        if not (self.versions_folder / name).is_dir():
            raise StoreError(f"There is no version {name!r} in MODEL_PATH={self.root}; run.py versions lists them.")
        return read_version(self.versions_folder / name)

    def forget_old(self, keep: int) -> list[str]:
        """Remove the oldest versions until `keep` are left, but no version that a pointer names; return their ids.

        Raises:
            StoreError: the pointer cannot be read, and nothing was removed.
        """
        kept = {self.champion_id(), self.challenger_id()} | ({before.id} if (before := self.previous()) else set())
        versions = self.versions()
        others = [version for version in versions if version.id not in kept]
        surplus = others[: max(0, min(len(others), len(versions) - keep))]
        for version in surplus:
            gone = version.folder.with_name(f"{UNFINISHED}{version.id}")
            version.folder.rename(gone)  # atomic: no reader finds half a version
            shutil.rmtree(gone, ignore_errors=True)
        for evidence in self.evidence_folder.glob("[!.]*"):  # also of those that went when a process was killed here
            if not (self.versions_folder / evidence.name).exists():
                shutil.rmtree(evidence, ignore_errors=True)
        return [version.id for version in surplus]

    def table(self) -> str:
        """The versions for people, oldest first: id, when, accuracy, which one serves, what was decided and why."""
        roles, problems = {before.id: "previous"} if (before := self.previous()) else {}, list[str]()
        for role, pointer in (("challenger", self.challenger_id), ("champion", self.champion_id)):
            try:
                roles[pointer() or ""] = role
            except StoreError as error:
                problems.append(str(error))
        rows = [COLUMNS]
        for version in self.versions():
            decision = read_decision(version)
            accuracy = version.metadata.get("metrics", {}).get("test", {}).get("accuracy")
            shown = f"{accuracy:.2%}" if isinstance(accuracy, float) else ""
            created, serves = str(version.metadata.get("created_at", "")), roles.get(version.id, "")
            rows.append((version.id, created, shown, serves, decision.summary if decision else "not judged"))
        if len(rows) == 1:
            return f"There is no version in MODEL_PATH={self.root} yet."
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join([*lines, *problems])


def _is_id(name: str) -> bool:
    """Whether this is the name of one folder, without a path and not hidden."""
    return (
        name != ""
        and name.isprintable()
        and Path(name).name == name
        and not name.startswith(".")
        and len(name.encode()) < 256
    )


def _write_pointer(path: Path, name: str | None) -> None:
    try:
        if name is None:
            path.unlink(missing_ok=True)
        else:
            replace_file(path, f"{name}\n".encode())
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error}") from error


def _read_pointer(path: Path) -> str | None:
    try:
        name = read_bytes(path, max_bytes=POINTER_BYTES).decode().strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise StoreError(f"{path} cannot be read: {error}. {MEND}") from error
    if not _is_id(name):
        raise StoreError(f"{path} should hold a version's id, but holds {name!r}. {MEND}")
    return name
