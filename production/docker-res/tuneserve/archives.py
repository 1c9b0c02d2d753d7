"""Archives of models, `.tar.gz` or `.tar`, unpacked without trusting them.

tarfile's `data` filter is beneath, and more is refused than it refuses: links of any kind, names that are absolute or
lead out, and what would take more bytes, entries, depth or memory than a model needs.
"""

import errno
import gzip
import tarfile
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import IO, Self, cast

from tuneserve.errors import ArchiveError
from tuneserve.files import new_folder, open_regular
from tuneserve.text import has_surrogates

MAX_BYTES = 32 << 30
MAX_ENTRIES = 10_000
MAX_RATIO = 100.0
"""Bytes unpacked for one packed; weights give one or two, and zeros a thousand."""
FREE_OF_RATIO = 64 << 20
"""Bytes unpacked up to which the ratio does not matter."""
MAX_NAME, MAX_DEPTH = 1024, 32
"""Bytes of an entry's path, and folders above it."""
MAX_HEADER = 1 << 20
"""Bytes of an entry's headers, which tarfile holds in memory."""
STRAY = {".ipynb_checkpoints", "__MACOSX", ".DS_Store"}
"""Names that notebooks and macOS leave in archives; so is every `._name`."""


def unpack(
    archive: Path,
    folder: Path,
    *,
    max_bytes: int = MAX_BYTES,
    max_entries: int = MAX_ENTRIES,
    max_ratio: float = MAX_RATIO,
) -> None:
    """Unpack an archive into a new folder: all of it or nothing. Stray files are left out, nothing is executable.

    Args:
        archive: a `.tar.gz` or `.tar`, told by its content.
        folder: its path, which must be free; folders above it are created.
        max_bytes: of the whole archive, unpacked.
        max_entries: files and folders in it, stray ones too.
        max_ratio: most bytes unpacked for one packed.

    Raises:
        ArchiveError: it is damaged, hostile or too large, or the disk does not take it; names the entry.
    """
    entry = ""
    try:
        with open_regular(archive) as file, new_folder(folder) as temporary:
            stream = _Stream(file, max_bytes=max_bytes, max_ratio=max_ratio)
            with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|", tarinfo=_Entry) as tar:
                for _ in range(max_entries + 1):
                    stream.left = MAX_HEADER
                    member = tar.next()
                    stream.left = None
                    entry = member.name if member else ""
                    if member is None:
                        break
                    if not any(one in STRAY or one.startswith("._") for one in _checked(member)):
                        tar.extract(member, temporary, set_attrs=False, filter="data")
                    elif content := tar.extractfile(member):
                        while content.read(1 << 16):
                            pass
                else:
                    raise ArchiveError(f"it has more than {max_entries} entries")
            while stream.read(1 << 16):  # to the checksum
                pass
    except ArchiveError as error:
        raise ArchiveError(_sentence(archive, entry, str(error)), status=error.status) from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        words = error.strerror or "it is damaged"  # gzip's own error has no number
        raise ArchiveError(_sentence(archive, entry, words), status=507 if full else 400) from error
    except Exception as error:  # tarfile, zlib and what they call raise whatever met them in hostile headers
        raise ArchiveError(_sentence(archive, entry, "it is damaged or incomplete")) from error


def find_program(folder: Path, name: str = "inference.py") -> Path | None:
    """The code of an unpacked archive: in `code/`, or beside the weights; None if it has none.

    Args:
        folder: of the archive.
        name: of the file, as SAGEMAKER_PROGRAM has it; `.py` may be left out.
    """
    name = name.removesuffix(".py") + ".py"
    if Path(name).name != name:
        return None
    return next((path for path in (folder / "code" / name, folder / name) if path.is_file()), None)


class _Stream:
    """The unpacked bytes of an archive, within bounds."""

    def __init__(self, file: BufferedReader, *, max_bytes: int, max_ratio: float) -> None:
        self.left: int | None = MAX_HEADER
        """Bytes that may still be read; None while a file's content is."""
        self._file, self._max_bytes, self._max_ratio = file, max_bytes, max_ratio
        packed = file.peek(2)[:2] == b"\x1f\x8b"
        self._source: IO[bytes] | gzip.GzipFile = gzip.GzipFile(fileobj=file) if packed else file
        self._read = 0

    def read(self, size: int) -> bytes:
        """As a file does."""
        chunk = self._source.read(size)
        self._read += len(chunk)
        if self._read > self._max_bytes:
            raise ArchiveError(f"unpacked, it has more than {self._max_bytes} bytes")
        if self._read > FREE_OF_RATIO and self._read > self._max_ratio * self._file.tell():
            raise ArchiveError(f"it unpacks to more than {self._max_ratio:g} times its size")
        if self.left is not None:
            self.left -= max(1, len(chunk))  # tarfile may ask for ever at the end
            if self.left < 0:
                raise ArchiveError(f"its headers have more than {MAX_HEADER} bytes")
        return chunk


class _Entry(tarfile.TarInfo):
    """An entry; damage between entries, which tarfile takes for the archive's end, is an error."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Read a header."""
        try:
            found = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):  # a block of zeros is the end
                raise
            raise ArchiveError("it is no whole .tar or .tar.gz") from None
        if found.size < 0:
            raise ArchiveError("an entry has a negative size")
        return found


def _checked(member: tarfile.TarInfo) -> tuple[str, ...]:
    """The parts of an entry's path."""
    name, path = member.name, PurePosixPath(member.name)
    if not (member.isreg() or member.isdir()) or member.issparse():
        kind = "a link; pack the archive with `tar --dereference`" if member.issym() or member.islnk() else "no file"
        raise ArchiveError(f"it is {kind}")
    if path.is_absolute() or ".." in path.parts:
        raise ArchiveError("its path leads out of the folder")
    if has_surrogates(name) or any(ord(one) < 32 for one in name):
        raise ArchiveError("its name is not Unicode text without control characters")
    if len(name.encode()) > MAX_NAME or len(path.parts) > MAX_DEPTH or member.size < 0:
        raise ArchiveError("its path is too long or too deep, or its size negative")
    if member.isreg() and not path.parts:
        raise ArchiveError("a file has no name")
    return path.parts


def _sentence(archive: Path, entry: str, words: str) -> str:
    shown = entry if len(entry) <= 100 else f"{entry[:60]}…{entry[-30:]}"
    where = f", entry {shown!a}" if entry else ""
    return f"{archive.name}{where}: {words}."
