"""The store's secret: one for all processes, for its owner alone, and a clear error when it is none."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lifecycle.conftest import ENVIRONMENT

from tuneserve.errors import StoreError
from tuneserve.lifecycle.secret import SECRET, lot, pseudonym, read_secret

CHILD = """
import sys
from pathlib import Path
from tuneserve.lifecycle.secret import read_secret
sys.stdin.readline()
print(read_secret(Path(sys.argv[1])).hex())
"""


def test_processes_that_make_it_at_once_agree(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        for _ in range(4)
    ]
    found = {child.communicate("\n", timeout=240)[0] for child in children}
    assert found == {read_secret(tmp_path).hex() + "\n"}
    assert [(path.name, path.stat().st_mode & 0o777) for path in tmp_path.iterdir()] == [(SECRET, 0o600)]


def test_a_file_system_without_hard_links_takes_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(self: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "hardlink_to", link)
    assert read_secret(tmp_path) == read_secret(tmp_path)


@pytest.mark.parametrize("spoil", ["short", "long", "folder", "link", "gone"])
def test_what_is_no_secret_is_a_clear_error(tmp_path: Path, spoil: str) -> None:
    path = tmp_path / SECRET
    if spoil == "folder":
        path.mkdir()
    elif spoil == "link":
        path.symlink_to(tmp_path / "nowhere" / "else")
    elif spoil != "gone":
        path.write_bytes(b"x" if spoil == "short" else b"x" * 33)
    with pytest.raises(StoreError, match="secret"):
        read_secret(tmp_path if spoil != "gone" else tmp_path / "gone")


def test_lots_are_spread_evenly_and_pseudonyms_change_every_day() -> None:
    lots = [lot(bytes(32), key) for key in range(10_000)]
    assert 0.09 < sum(one < 0.1 for one in lots) / len(lots) < 0.11
    assert lots != [lot(b"x" * 32, key) for key in range(10_000)]
    marks = {pseudonym(bytes(32), address, day) for address in ("10.0.0.1", "10.0.0.2") for day in ("1", "2")}
    assert len(marks) == 4
