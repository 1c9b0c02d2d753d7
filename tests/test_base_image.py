"""What a base image must be, as the check that the Dockerfile runs says it."""

import json
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

import base_image
import build


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a refusal."""
    [line] = capsys.readouterr().err.splitlines()
    assert len(line) < 600
    return line.removeprefix("REFUSED: ")


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A base with torch 2.12.1+cu130 in a folder of its own, and no /opt/venv."""
    (tmp_path / "torch-2.12.1+cu130.dist-info").mkdir()
    (tmp_path / "torch-2.12.1+cu130.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.12.1+cu130\n")
    found = metadata.PathDistribution(tmp_path / "torch-2.12.1+cu130.dist-info")
    monkeypatch.setattr(metadata, "distribution", lambda name: found)
    monkeypatch.setattr(base_image, "VENV", tmp_path / "venv")
    return tmp_path


@pytest.mark.parametrize("wanted", ["2.12.1", "2.12.1+cpu"])
def test_a_torch_of_the_wanted_version_is_kept(wanted: str, base: Path) -> None:
    assert base_image.find_torch(wanted) == str(base)


def test_another_torch_is_refused_with_the_way_to_keep_it(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        base_image.find_torch("2.13.0")
    said = refusal(capsys)
    assert "brings torch 2.12.1+cu130, and the job is made for 2.13.0" in said
    assert "--torch 2.12.1 " in said


def test_a_base_without_torch_is_given_one(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    assert base_image.find_torch("2.13.0") == ""


@pytest.mark.parametrize("version", [(3, 8), (3, 10), (3, 14)])
def test_a_python_that_does_not_fit_is_refused(
    version: tuple[int, int], base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (*version, 1))
    with pytest.raises(SystemExit, match="1"):
        base_image.find_torch("2.12.1")
    assert f"python3 is {version[0]}.{version[1]}, and the job needs 3.11, 3.12 or 3.13" in refusal(capsys)


def test_libraries_of_the_base_are_not_written_over(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (base / "venv").mkdir()
    with pytest.raises(SystemExit, match="1"):
        base_image.find_torch("2.12.1")
    assert "where the job's libraries go" in refusal(capsys)


@pytest.mark.parametrize(
    ("cuda", "base_cuda", "driver"),
    [("", "13.0", 470), ("13.0", "", 0), ("13.0", "13.0", 580), ("13.0", "13.2", 0), ("12.8", "12.9", 535)],
)
def test_cuda_and_driver_that_fit_pass(cuda: str, base_cuda: str, driver: int) -> None:
    base_image.check_cuda(cuda, base_cuda, driver)


@pytest.mark.parametrize(
    ("cuda", "base_cuda", "driver", "words"),
    [
        ("13.0", "12.9", 0, "the base's CUDA is 12.9"),
        ("12.8", "13.0", 0, "take a base with CUDA 12.8 or a later 12"),
        ("12.8", "12.4", 0, "the base's CUDA is 12.4"),
        ("13.0", "", 570, "needs driver 580 or later, and the driver here is 570"),
    ],
)
def test_cuda_or_a_driver_that_does_not_fit_is_refused(
    cuda: str, base_cuda: str, driver: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        base_image.check_cuda(cuda, base_cuda, driver)
    assert words in refusal(capsys)


def test_the_bases_cuda_and_driver_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VERSION", "13.0.3")
    for name in ("libcuda.so.1", "libcuda.so.570.172.08", "libcuda.so.580.95.05"):
        (tmp_path / name).touch()
    monkeypatch.setattr(base_image, "LIBRARIES", (str(tmp_path), "/no/such"))
    assert (base_image.read_base_cuda(), base_image.read_driver()) == ("13.0", 580)


def test_what_is_imported_is_what_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    torch = SimpleNamespace(__version__="2.13.0+cu130", __file__="/base/torch.py", version=SimpleNamespace(cuda="13.0"))
    users: list[int] = []
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="5.24.0"))
    monkeypatch.setattr(base_image, "LIBRARIES", ())
    monkeypatch.setenv("CUDA_VERSION", "12.4")  # of a base whose torch is its own, and therefore fits
    for name in ("setgid", "setuid"):
        monkeypatch.setattr(base_image.os, name, users.append)
    facts = base_image.read_facts("2.13.0", "5.24.0")
    assert users == [0, 1000]
    assert facts | {"python": ""} == {
        **{"python": "", "torch": "2.13.0+cu130", "transformers": "5.24.0", "cuda": "13.0", "driver": "580"}
    }
    with pytest.raises(SystemExit, match="1"):
        base_image.read_facts("2.13.0", "5.23.0")
    assert "transformers 5.23.0 was installed, and 5.24.0 is imported" in refusal(capsys)


def test_the_requirements_pin_what_can_be_chosen() -> None:
    requirements = build.CONTEXT / "docker-res" / "requirements.txt"
    pins = [base_image.read_pin(requirements, name) for name in ("torch", "transformers")]
    assert json.dumps(pins).count(".") == 4
