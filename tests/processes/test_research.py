"""The template notebooks run from the top, and what they choose is a job; what was delivered is whole and a job."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tuneserve.env_file import read_env_file
from tuneserve.settings import PROJECT, Settings

RESEARCH = PROJECT / "research"
TEMPLATES = sorted((RESEARCH / "templates").glob("*.ipynb"))
DELIVERED = sorted((RESEARCH / "deliver").glob("*.ipynb"))
SAMPLE = re.compile(r'{"DATASET": "sample", "NUM_TRAIN": "\d+", "NUM_TEST": "\d+"')
SMALL = '{"NUM_MAX_POSITIONS": "32", "OMP_NUM_THREADS": "1", "DATASET": "sample", "NUM_TRAIN": "80", "NUM_TEST": "40"'
CHOOSE = {
    "try-a-setting": lambda settings: settings.lr in (1e-4, 5e-4),
    "compare-base-models": lambda settings: (
        settings.base_model == Settings().base_model or settings.base_model.endswith("/untrained")
    ),
}
"""Templates that end in an environment file, and what its settings must be."""

NAME = re.compile(r"\d{8}-[a-z]{2,3}-[a-z0-9-]+")
ABSOLUTE = re.compile(r"(?<![\w.:/<~])/\w[\w.-]*/|\b[A-Z]:\\")
MAX_BYTES = 300_000


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_of(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook: Any) -> list[Any]:
    return [output for cell in code_of(notebook) for output in cell.outputs]


def said_by(output: Any) -> str:
    """What an output says in words; of a picture nothing."""
    words = [value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")]
    return "\n".join([output.get("text", ""), *map(str, words)])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_runs_and_what_it_chooses_is_a_job(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = read(template)
    assert all(not cell.get("outputs") for cell in notebook.cells), "templates are stored without outputs"
    setup = code_of(notebook)[0]
    setup.source, found = SAMPLE.subn(SMALL, setup.source)
    assert found == 1
    for name in ("DATA_PATH", "LOG_PATH"):
        monkeypatch.setenv(name, str(tmp_path / name))
    folder = tmp_path / "research" / "develop"
    folder.mkdir(parents=True)
    (tmp_path / "production").symlink_to(PROJECT / "production")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    assert [path.name for path in folder.iterdir()] == [f"{template.stem}.env"] * (template.stem in CHOOSE)
    for file in folder.iterdir():
        settings = Settings.from_environ(read_env_file(file))
        assert CHOOSE[template.stem](settings)
        assert settings.num_max_positions == 32
        assert settings.num_train == 0


def test_every_template_begins_alike_and_loads_a_model() -> None:
    assert {*CHOOSE, "explore-data", "error-analysis"} == {path.stem for path in TEMPLATES}
    setups = set()
    for path in TEMPLATES:
        code = [cell.source for cell in code_of(read(path))]
        setups.add(re.sub(r"environment .*\n", "", code[0]))
        assert any("from tuneserve import load" in source for source in code), path
    assert len(setups) == 1


def test_every_delivered_notebook_has_its_environment_file_and_every_file_its_notebook() -> None:
    stems = [path.stem for path in DELIVERED]
    assert stems
    assert stems == sorted(path.stem for path in (RESEARCH / "deliver").glob("*.env"))
    assert [stem for stem in stems if not NAME.fullmatch(stem)] == []


@pytest.mark.parametrize("path", DELIVERED, ids=lambda path: path.stem)
def test_a_delivered_environment_file_is_a_job_and_what_the_notebook_ended_with(path: Path) -> None:
    file = path.with_suffix(".env")
    Settings.from_environ(read_env_file(file))
    assert file.read_text(encoding="utf-8").strip() in "\n".join(map(said_by, outputs_of(read(path))))


@pytest.mark.parametrize("path", DELIVERED, ids=lambda path: path.stem)
def test_a_delivered_notebook_was_run_once_from_the_top(path: Path) -> None:
    notebook = read(path)
    counts = [cell.execution_count for cell in code_of(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    kinds = [output.output_type for output in outputs_of(notebook)]
    assert "error" not in kinds
    assert any("image/png" in output.get("data", {}) for output in outputs_of(notebook))


@pytest.mark.parametrize("path", DELIVERED, ids=lambda path: path.stem)
def test_a_delivered_notebook_is_small_and_names_no_path_of_a_machine(path: Path) -> None:
    notebook = read(path)
    said = [cell.source for cell in notebook.cells] + list(map(said_by, outputs_of(notebook)))
    assert [found[0] for text in said for found in ABSOLUTE.finditer(text)] == []
    assert path.stat().st_size < MAX_BYTES
