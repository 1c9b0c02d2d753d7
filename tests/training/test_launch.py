"""What the launcher leaves: nothing, not even when it is killed; `processes/test_distributed.py` has the workers."""

from pathlib import Path
from typing import Any

import pytest

from tuneserve.errors import StoreError
from tuneserve.files import CACHE_PARTS, in_use
from tuneserve.settings import Settings
from tuneserve.signals import Stop
from tuneserve.training import launch


class Launched:
    """A launcher that ends at once."""

    returncode = 0

    def __init__(self, command: list[str], *, env: dict[str, str], **options: Any) -> None:
        Path(env[launch.ERROR_FILE]).with_name("left").write_bytes(b"")
        self.seen.append(Path(env[launch.ERROR_FILE]).parent)

    seen: list[Path]

    def poll(self) -> int:
        return 0

    def kill(self) -> None:
        pass


def test_the_errors_of_workers_go_through_the_cache_and_a_killed_launcher_leaves_nothing_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(Launched, "seen", seen, raising=False)
    monkeypatch.setattr(launch.subprocess, "Popen", Launched)
    settings = Settings(data_path=tmp_path, processes=2)
    launch.run(settings, Stop(), {}, threads=1)
    assert seen[0].parent == tmp_path / "launch"
    assert not seen[0].exists()
    monkeypatch.setattr(launch.shutil, "rmtree", lambda *_, **__: None)  # as after a kill
    launch.run(settings, Stop(), {}, threads=1)
    assert seen[1].exists()
    monkeypatch.undo()
    with in_use(tmp_path, *CACHE_PARTS):
        assert not seen[1].exists()


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="DATA_PATH="):
        launch.run(Settings(data_path=tmp_path / "file", processes=2), Stop(), {}, threads=1)
