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


SKIPS = "import pytest\n\ndef test_it():\n    pytest.skip({!r})\n"
SETS = "import os\n\ndef test_it():\n    os.environ.update(OMP_NUM_THREADS='7', PATH='')\n"
FINDS = "import os\n\ndef test_it():\n    assert 'OMP_NUM_THREADS' not in os.environ and os.environ['PATH']\n"


@pytest.mark.parametrize(
    ("tests", "code"),
    [
        pytest.param([SETS, FINDS, SKIPS.format("no GPU is here")], 0, id="what a module sets ends with it"),
        pytest.param([SKIPS.format("no command")], 1, id="where all is required only a GPU's tests may skip"),
    ],
)
def test_what_all_tests_share(tests: list[str], code: int, tmp_path: Path) -> None:
    for number, test in enumerate(tests):
        (tmp_path / f"test_{number}.py").write_text(test)
    path = os.pathsep.join(map(str, (PROJECT / "tests", conftest.PACKAGE)))
    done = run("-p", "conftest", "--rootdir", str(tmp_path), str(tmp_path), PYTHONPATH=path, TUNESERVE_REQUIRE_ALL="1")
    assert done.returncode == code, done.stdout
