"""The template notebook runs from the top, and what it writes is a job."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tuneserve.settings import PROJECT, Settings

TEMPLATES = sorted((PROJECT / "research" / "templates").glob("*.ipynb"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_the_template_runs_and_ends_in_an_environment_file(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = nbformat.read(template, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "templates are stored without outputs"
    for cell in notebook.cells:
        cell.source = cell.source.replace('{"DATASET"', '{"NUM_MAX_POSITIONS": "32", "DATASET"')
    for name in ("DATA_PATH", "LOG_PATH"):
        monkeypatch.setenv(name, str(tmp_path / name))
    folder = tmp_path / "research" / "develop"
    folder.mkdir(parents=True)
    (tmp_path / "production").symlink_to(PROJECT / "production")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    written = (folder / "from-texts-to-a-job.env").read_text()
    settings = Settings.from_environ(dict(line.split("=", 1) for line in written.splitlines()))
    assert settings.lr in (5e-5, 1e-4)
    assert settings.num_max_positions == 32


def test_there_is_a_template() -> None:
    assert TEMPLATES
