"""The model store: a folder of immutable versions and a one-line file that names the one in service.

    MODEL_PATH/versions/<id>/   finished versions
    MODEL_PATH/checkpoints/     training that may be resumed
    MODEL_PATH/champion         the id of the version that answers

A pointer file and not a symbolic link: links do not survive object-store mounts.
"""

import logging
import shutil
import time
from pathlib import Path

from tuneserve.artifact import METADATA, UNFINISHED, Version, is_whole, read_version, replace_file
from tuneserve.errors import NoModelError, StoreError

logger = logging.getLogger(__name__)

ABANDONED_S = 3600
"""Age at which a half-written version is taken for a killed run's and not for one that is being written."""


class Store:
    """The folder at `MODEL_PATH`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.versions_folder = root / "versions"
        self.checkpoints_folder = root / "checkpoints"
        self.pointer = root / "champion"

    def prepare(self) -> None:
        """Make the folders and clear away what killed runs left half-written.

        Raises:
            StoreError: the place cannot be written to.
        """
        try:
            for folder in (self.versions_folder, self.checkpoints_folder):
                folder.mkdir(parents=True, exist_ok=True)
                for leftover in folder.glob(f"{UNFINISHED}*"):
                    if time.time() - leftover.stat().st_mtime > ABANDONED_S:
                        shutil.rmtree(leftover)
            replace_file(self.root / ".writable", b"")
            (self.root / ".writable").unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"MODEL_PATH={self.root} cannot be written to: {error}") from error

    def versions(self) -> list[Version]:
        """All finished versions that can be read, oldest first (ids begin with their time)."""
        found = []
        for folder in sorted(path.parent for path in self.versions_folder.glob(f"*/{METADATA}")):
            if not folder.name.startswith("."):
                try:
                    found.append(read_version(folder))
                except StoreError as error:
                    logger.warning("%s", error)
        return found

    def free_folder(self, name: str) -> Path:
        """Where a version of this name goes; with a number behind it when the name is taken."""
        number, folder = 1, self.versions_folder / name
        while folder.exists():
            number += 1
            folder = self.versions_folder / f"{name}-{number}"
        return folder

    def find(self, fingerprint: str) -> Version | None:
        """The newest version trained with these settings on these data, if there is one that is undamaged."""
        same = [
            version
            for version in self.versions()
            if version.metadata.get("fingerprint") == fingerprint and is_whole(version)
        ]
        return same[-1] if same else None

    def champion(self) -> Version:
        """The version that answers now.

        Raises:
            NoModelError: none has been published yet.
            StoreError: the pointer names a version that is not there.
        """
        try:
            name = self.pointer.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            raise NoModelError(
                f"There is no model in MODEL_PATH={self.root} yet. Train one first: run.py train (or train-serve)."
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise StoreError(f"{self.pointer} cannot be read: {error}") from error
        if not name or Path(name).name != name or name.startswith("."):
            raise StoreError(f"{self.pointer} should hold a version's id, but holds {name!r}.")
        return read_version(self.versions_folder / name)

    def set_champion(self, version: Version) -> None:
        """Let this version answer from now on.

        Raises:
            StoreError: the pointer cannot be written.
        """
        try:
            replace_file(self.pointer, f"{version.id}\n".encode())
        except OSError as error:
            raise StoreError(f"{self.pointer} cannot be written: {error}") from error
