"""Files and folders that are whole or not there."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from tuneserve.files import in_use, mark_used, new_file, new_folder, replace_file, write_json


def fail_after(_: object) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old", durable=durable)
    with new_file(path, durable=durable) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
        assert temporary.name.startswith(".file-")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_fails_midway_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), new_file(path) as temporary:
        fail_after(temporary.write_bytes(b"ne"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        replace_file(tmp_path / "folder", b"new")
    (tmp_path / "folder").rmdir()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_sees_the_old_file_or_the_new_one_and_never_a_part(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = {b"short\n", b"long" * 5000}
    replace_file(path, b"short\n")
    seen: set[bytes] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(50):
        for one in contents:
            replace_file(path, one)
    done.set()
    reader.join()
    assert seen == contents
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_takes_its_name_once_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with new_folder(folder) as temporary:
        (temporary / "file").write_bytes(b"1")
        assert not folder.exists()
    assert (folder / "file").read_bytes() == b"1"
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_that_is_there_is_replaced_only_if_told_so(tmp_path: Path, overwrite: bool) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()

    def write() -> None:
        with new_folder(folder, overwrite=overwrite) as temporary:
            (temporary / "new").touch()

    if overwrite:
        write()
    else:
        with pytest.raises(OSError, match="not empty"):
            write()
    assert [path.name for path in folder.iterdir()] == ["new" if overwrite else "old"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_fails_midway_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ZeroDivisionError), new_folder(folder, overwrite=True) as temporary:
        fail_after((temporary / "file").touch())
    assert list(tmp_path.iterdir()) == [folder]
    assert list(folder.iterdir()) == []


def test_a_full_disk_keeps_the_old_file(disk: Any) -> None:
    path = disk.path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, bytes(1 << 20))
    assert path.read_bytes() == b"old"
    assert list(disk.path.iterdir()) == [path]


def test_of_a_cache_the_entries_used_last_stay_and_nothing_goes_while_somebody_else_uses_it(tmp_path: Path) -> None:
    folders = [tmp_path / "tokens" / f"{number:032x}" for number in range(6)]
    files = [tmp_path / "arrow" / f"{number:032x}.arrow" for number in range(6)]
    others = [tmp_path / "arrow" / "owner___name", tmp_path / "hub" / f"{1:032x}"]
    for path in [*folders, *others]:
        path.mkdir(parents=True)
        (path / "content").write_bytes(b"")
    for path in files:
        path.write_bytes(b"")
    for age, path in enumerate([*folders, *files, *others]):
        os.utime(path, (1e9 - age, 1e9 - age))
    mark_used(folders[5])
    with in_use(tmp_path), in_use(tmp_path, "arrow", "tokens", most=3):
        assert len(list(tmp_path.glob("*/*"))) == 14
    with in_use(tmp_path, "arrow", "tokens", "none", most=3):
        assert sorted((tmp_path / "tokens").iterdir()) == [folders[0], folders[1], folders[5]]
        assert sorted(tmp_path.glob("arrow/*")) == [*files[:3], others[0]]
        assert others[1].exists()
