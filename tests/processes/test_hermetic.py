"""What the tests say does not depend on the environment of whoever runs them."""

import os
import subprocess
import sys
from pathlib import Path

import conftest
import pytest

from tuneserve.settings import PROJECT

HOSTILE = {
    "API_KEY": "mine",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
    "N_EPOCHS": "none",
    "PORT": "1",
    "PET_NNODES": "2",
    "HF_HUB_OFFLINE": "1",
}


def run(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]
    return subprocess.run(command, cwd=PROJECT, env=os.environ | variables, capture_output=True, text=True)


def test_nothing_of_a_persons_environment_reaches_a_test() -> None:
    done = run("tests/processes/test_hermetic.py::test_the_environment_is_clean", "tests/test_logs.py", **HOSTILE)
    assert done.returncode == 0, done.stdout


def test_the_environment_is_clean() -> None:
    assert not set(HOSTILE) & set(os.environ)
    assert not [name for name in os.environ if conftest.is_foreign(name)]


@pytest.mark.parametrize(("reason", "code"), [("no command", 1), ("no GPU is here", 0)])
def test_where_all_is_required_only_a_gpus_tests_may_skip(reason: str, code: int, tmp_path: Path) -> None:
    file = tmp_path / "test_skips.py"
    file.write_text(f"import pytest\n\ndef test_it():\n    pytest.skip({reason!r})\n")
    path = os.pathsep.join(map(str, (PROJECT / "tests", conftest.PACKAGE)))
    done = run("-p", "conftest", "--rootdir", str(tmp_path), str(file), PYTHONPATH=path, TUNESERVE_REQUIRE_ALL="1")
    assert done.returncode == code, done.stdout
