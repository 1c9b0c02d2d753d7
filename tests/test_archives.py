"""Archives of models: people's as they are, and hostile ones, each built here."""

import errno
import gzip
import io
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuneserve import archives
from tuneserve.archives import unpack
from tuneserve.errors import ArchiveError

Add = Callable[..., None]


def build(path: Path, fill: Callable[[Add], object], *, mode: str = "w:gz", form: int = tarfile.PAX_FORMAT) -> Path:
    """An archive of what `fill` adds: a name, its content, and attributes of the entry."""
    with tarfile.open(path, mode, format=form) as tar:  # type: ignore[call-overload]

        def add(name: str, content: bytes = b"", **attributes: Any) -> None:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            for key, value in attributes.items():
                setattr(entry, key, value)
            tar.addfile(entry, io.BytesIO(content))

        fill(add)
    return path


def header(**attributes: Any) -> bytes:
    """One raw header."""
    entry = tarfile.TarInfo("x")
    for key, value in attributes.items():
        setattr(entry, key, value)
    return entry.tobuf(tarfile.GNU_FORMAT)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def as_people_have_them(add: Add) -> None:
    add("./", type=tarfile.DIRTYPE, mode=0o755)
    add("./._code", b"resource fork")
    add("./code/inference.py", b"x = 1", mode=0o4777, uid=12345)
    add("./code/.ipynb_checkpoints/inference-checkpoint.py", b"x = 0" * 500_000)
    add("./model/", type=tarfile.DIRTYPE, mode=0)
    add("./model/config.json", b"{}", mode=0)
    add(f"./model/{'long' * 60}/ü.bin", b"\0" * 100_000, pax_headers={"comment": "from a notebook"})
    add(".DS_Store", b"finder")
    add("__MACOSX/code/._inference.py", b"finder")


@pytest.mark.parametrize("mode", ["w:gz", "w"])
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_peoples_archives_are_unpacked_without_what_is_astray(tmp_path: Path, mode: str, form: int) -> None:
    archive = build(tmp_path / "model.tar.gz", as_people_have_them, mode=mode, form=form)
    unpack(archive, tmp_path / "new" / "model")
    assert files(tmp_path / "new" / "model") == {
        "code/inference.py": b"x = 1",
        "model/config.json": b"{}",
        f"model/{'long' * 60}/ü.bin": b"\0" * 100_000,
    }
    assert (tmp_path / "new/model/code/inference.py").stat().st_mode & 0o7111 == 0  # neither setuid nor executable
    assert (tmp_path / "new/model/model").stat().st_mode & 0o700 == 0o700
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


def refusal(archive: Path, **bounds: Any) -> str:
    """Why an archive is refused; nothing of it is left."""
    before = {path: path.stat().st_size for path in archive.parent.rglob("*")}
    with pytest.raises(ArchiveError) as error:
        unpack(archive, archive.parent / "model", **bounds)
    assert {path: path.stat().st_size for path in archive.parent.rglob("*")} == before
    assert error.value.status == 400
    assert len(str(error.value)) < 300
    return str(error.value)


HOSTILE: dict[str, tuple[Callable[[Add], object], str]] = {
    "absolute": (lambda add: add("/tmp/x", b"x"), "entry '/tmp/x': its path leads out"),
    "parent": (lambda add: add("../x", b"x"), "entry '../x': its path leads out"),
    "parent within": (lambda add: add("a/../../x", b"x"), "entry 'a/../../x': its path leads out"),
    "parent folder": (lambda add: add("../x", type=tarfile.DIRTYPE), "leads out"),
    "stray parent": (lambda add: add("../._x", b"x"), "leads out"),
    "pax absolute": (lambda add: add("x", b"x", pax_headers={"path": "/etc/x"}), "entry '/etc/x': its path leads out"),
    "symbolic link": (lambda add: add("x", type=tarfile.SYMTYPE, linkname="/etc"), "'x': it is a link"),
    "link within": (lambda add: add("x", type=tarfile.SYMTYPE, linkname="y"), "--dereference"),
    "hard link": (lambda add: add("x", type=tarfile.LNKTYPE, linkname="/etc/passwd"), "it is a link"),
    "pipe": (lambda add: add("x", type=tarfile.FIFOTYPE), "it is no file"),
    "character device": (lambda add: add("x", type=tarfile.CHRTYPE, devmajor=1, devminor=5), "it is no file"),
    "block device": (lambda add: add("x", type=tarfile.BLKTYPE, devmajor=8), "it is no file"),
    "unknown type": (lambda add: add("x", type=b"Z"), "it is no file"),
    "sparse": (lambda add: add("x", bytes(512), type=tarfile.GNUTYPE_SPARSE), "it is no file"),
    "sparse by pax": (
        lambda add: add("x", b"1\n0\n1\n".ljust(512), pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}),
        "it is no file",
    ),
    "line break": (lambda add: add("a\nb", b"x"), r"'a\nb': its name is not"),
    "NUL": (lambda add: add("x", b"x", pax_headers={"path": "a\0b"}), "its name is not"),
    "not Unicode": (lambda add: add("a\udce4", b"x"), "its name is not"),
    "long": (lambda add: add("/".join(["a" * 200] * 6), b"x"), "too long or too deep"),
    "deep": (lambda add: add("a/" * 40 + "x", b"x"), "too long or too deep"),
    "nameless": (lambda add: add(".", b"x"), "a file has no name"),
    "file and folder": (lambda add: [add("x", b"x"), add("x/y", b"y")], "entry 'x/y': "),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_entry_is_named_and_nothing_is_left(tmp_path: Path, kind: str) -> None:
    fill, said = HOSTILE[kind]

    def fill_all(add: Add) -> None:
        add("good", b"good")
        fill(add)

    assert said in refusal(build(tmp_path / "model.tar.gz", fill_all))


def test_a_link_is_no_way_out_for_what_follows(tmp_path: Path) -> None:
    def fill(add: Add) -> None:
        add("x", type=tarfile.SYMTYPE, linkname=str(tmp_path))
        add("x/escaped", b"x")

    refusal(build(tmp_path / "model.tar", fill, mode="w"))


def test_size_and_count_are_bounded(tmp_path: Path) -> None:
    large = build(tmp_path / "model.tar.gz", lambda add: add("zeros", bytes(3 << 20)))
    assert "entry 'zeros': unpacked, it has more than 2097152 bytes" in refusal(large, max_bytes=2 << 20)
    stray = build(tmp_path / "model.tar.gz", lambda add: add("._zeros", bytes(3 << 20)))
    assert "more than 2097152 bytes" in refusal(stray, max_bytes=2 << 20)
    many = build(tmp_path / "model.tar.gz", lambda add: [add(str(number)) for number in range(11)])
    unpack(many, tmp_path / "all", max_entries=11)
    assert "it has more than 10 entries" in refusal(many, max_entries=10)


def test_a_bomb_is_told_by_its_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "FREE_OF_RATIO", 1 << 20)
    noise = random.Random(0).randbytes(3 << 20)
    unpack(build(tmp_path / "noise.tar.gz", lambda add: add("noise", noise)), tmp_path / "noise")
    bomb = build(tmp_path / "model.tar.gz", lambda add: add("zeros", bytes(8 << 20)))
    assert "it unpacks to more than 100 times its size" in refusal(bomb)


END = bytes(2 * tarfile.BLOCKSIZE)
HEADERS = {
    "pax of 8 MiB": header(type=tarfile.XHDTYPE, size=8 << 20) + bytes(8 << 20),
    "name of 8 MiB": header(type=tarfile.GNUTYPE_LONGNAME, size=8 << 20) + bytes(8 << 20),
    "pax in pax": (header(type=tarfile.XHDTYPE, size=0)) * 100_000,
    "pax without an end": header(type=tarfile.XHDTYPE, size=8 << 40),
    "negative size": header(size=-512) + END,
    "negative pax": header(type=tarfile.XHDTYPE, size=-512) + END,
    "huge size": header(size=8 << 40) + b"x",
    "negative size by pax": header(type=tarfile.XHDTYPE, size=12) + b"12 size=-99\n".ljust(512, b"\0") + header() + END,
    "sparse map without an end": header(type=tarfile.XHDTYPE, size=44)
    + b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n".ljust(512, b"\0")
    + header(size=8 << 30)
    + b"9999999999\n" * 200_000,
    "no archive": b"PK\3\4" + bytes(2000),
    "nothing": b"",
    "no end": header(size=1) + b"x".ljust(512, b"\0"),
    "half a header": header(size=1) + b"x".ljust(512, b"\0") + header()[:100],
    "a damaged header": header(size=1) + b"x".ljust(512, b"\0") + b"!" + header() + END,
}

UNBOUNDED = {"pax of 8 MiB", "name of 8 MiB", "sparse map without an end"}
"""Of these tarfile would hold all in memory."""


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_attack_the_reader_are_refused(tmp_path: Path, kind: str, packed: bool) -> None:
    content = HEADERS[kind]
    archive = tmp_path / "model.tar.gz"
    archive.write_bytes(gzip.compress(content, 1) if packed else content)
    said = refusal(archive)
    assert said.startswith("model.tar.gz")
    if kind in UNBOUNDED:
        assert "headers have more than" in said


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_a_damaged_archive_leaves_nothing(tmp_path: Path, mode: str) -> None:
    noise = random.Random(0).randbytes(20_000)
    whole = build(tmp_path / "whole", lambda add: [add("a", noise), add("b", noise)], mode=mode).read_bytes()
    archive = tmp_path / "model.tar.gz"
    ends = [*range(0, 42_000, 1771), 512, 20_992, 21_504, 41_984]  # the last ones lie between entries
    for end in (one for one in ends if one < len(whole)):
        archive.write_bytes(whole[:end])
        refusal(archive)
    if mode == "w:gz":  # its checksum sees each bit
        for number in range(0, len(whole), 2111):
            archive.write_bytes(whole[:number] + bytes([whole[number] ^ 16]) + whole[number + 1 :])
            if number not in range(4, 10):  # time and system in gzip's header
                refusal(archive)


def test_what_is_no_file_is_refused_and_a_full_disk_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe")
    assert "No such file" in refusal(tmp_path / "none.tar.gz")
    archive = build(tmp_path / "model.tar.gz", lambda add: add("x", b"x"))
    unpack(archive, tmp_path / "taken")
    with pytest.raises(ArchiveError, match="not empty"):
        unpack(archive, tmp_path / "taken")

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tarfile.TarFile, "extract", full)
    with pytest.raises(ArchiveError, match="entry 'x': No space left on device") as error:
        unpack(archive, tmp_path / "model")
    assert error.value.status == 507
    assert not (tmp_path / "model").exists()
