"""The output: a folder of parts, one a chunk, each written atomically; joined at the end if OUTPUT is a file.

<OUTPUT>/manifest.json                  the job that the parts belong to
<OUTPUT>/part-<shard>-<chunk>.<ending>  a chunk's rows with their answers

When OUTPUT is a file, the folder is `<OUTPUT>.parts` until the file is there.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tuneserve.errors import SettingsError, StoreError
from tuneserve.files import sync
from tuneserve.scoring.input import Input
from tuneserve.scoring.locations import Location, locate, refused_as, shown
from tuneserve.tables.formats import file_type, is_known

MANIFEST = "manifest.json"
JOINED = ".joined"


class Output:
    """The file or folder that OUTPUT names.

    Raises:
        SettingsError: OUTPUT does not go with INPUT or with the number of shards.
        StoreError: it cannot be written to.
    """

    def __init__(self, location: str, rows: Input, *, shard: int, shards: int) -> None:
        self.where = f"OUTPUT={shown(location)}"
        self._rows, self._shard = rows, shard
        with self._writing():
            self.location = locate(location)
            self.is_file = is_known(self.location.name)
            self.folder = (
                Location(self.location.files, f"{self.location.path}.parts") if self.is_file else self.location
            )
            self._check(shards)
            self.folder.files.makedirs(self.folder.path, exist_ok=True)
            self._clear_leftovers()
            self._finished = set(self.folder.names())

    def claim(self, belongs_to: dict[str, Any]) -> None:
        """Write the manifest, or check that the one there is the same.

        Raises:
            StoreError: the folder holds parts of other rows, of another model or of other settings.
        """
        manifest = self.folder / MANIFEST
        content = json.dumps(belongs_to, indent=2, ensure_ascii=False) + "\n"
        with self._writing():
            if MANIFEST in self._finished:
                with manifest.open() as file:
                    there = json.loads(file.read())
                other = [name for name, value in json.loads(content).items() if there.get(name) != value]
                if other:
                    raise StoreError(
                        f"{self.where}: {shown(self.folder.path)} holds parts of another job ({' and '.join(other)} "
                        "differ). Delete it or choose another OUTPUT."
                    )
            elif any(name.startswith("part-") for name in self._finished):
                raise StoreError(
                    f"{self.where} holds parts, but no {MANIFEST} that says of what. Choose another OUTPUT."
                )
            else:
                manifest.put(content.encode())

    def has(self, number: int) -> bool:
        """Whether the chunk's part is finished."""
        return self._name(number) in self._finished

    def write(self, number: int, content: bytes) -> None:
        """Write a chunk's part.

        Raises:
            StoreError: it cannot be written.
        """
        with self._writing():
            (self.folder / self._name(number)).put(content)
        self._finished.add(self._name(number))

    def join(self, count: int) -> None:
        """Make one file of the first `count` parts and remove the folder.

        Raises:
            StoreError: the file cannot be written.
        """
        with self._writing():
            with self._whole_file() as file:
                self._rows.join(((self.folder / self._name(number)).open() for number in range(count)), file)
            self.folder.files.rm(self.folder.path, recursive=True)

    @contextmanager
    def _whole_file(self) -> Iterator[BinaryIO]:
        """A new file that becomes OUTPUT when the block ends."""
        if self.location.is_local:
            incoming = Path(self.folder.path) / JOINED
            with incoming.open("wb") as file:
                yield file
            sync(incoming)
            incoming.replace(self.location.path)
            sync(Path(self.location.path).parent)
        else:
            with self.location.files.transaction, self.location.files.open(self.location.path, "wb") as file:
                yield file

    def _check(self, shards: int) -> None:
        location, rows = self.location, self._rows
        if self.is_file and file_type(location.name, self.where).ending != rows.type.ending:
            raise SettingsError(
                f"{self.where} should end with {rows.type.ending}, as the rows of INPUT are, or be a folder."
            )
        if self.is_file and shards > 1:
            raise SettingsError(f"{self.where} is one file, but SHARDS={shards} write at once; name a folder.")
        if self.is_file and location.files.isdir(location.path):
            raise SettingsError(f"{self.where} is a folder; a name that ends with {rows.type.ending} should be a file.")
        inside = {rows.location.real, *(file.real for file in rows.files)}
        folders = {rows.location.real, *(file.real.parent for file in rows.files)}
        if location.real in inside or (rows.is_folder and location.real.parent in folders):
            raise SettingsError(f"{self.where} is in INPUT, which would change what is scored; choose another.")

    def _clear_leftovers(self) -> None:
        """Remove what a killed process of this shard left half-written."""
        if self.folder.is_local:
            for path in Path(self.folder.path).glob(f".{self._name(0).rpartition('-')[0]}-*"):
                path.unlink(missing_ok=True)

    def _name(self, number: int) -> str:
        return f"part-{self._shard:05}-{number:08}{self._rows.type.ending}"

    def _writing(self) -> Any:
        return refused_as(StoreError, f"{self.where} cannot be written to")
