"""What the platforms' tests share: each platform's own client, in an environment of its own in .venv/clients."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuneserve.settings import PROJECT

Client = Callable[..., Any]


@pytest.fixture
def client(tmp_path: Path) -> Client:
    """Run a script in a client's environment: `client(name, script, *arguments)` → the JSON that it prints last."""

    def run(name: str, script: str, *arguments: str, timeout_s: float = 120, **variables: str) -> Any:
        python = PROJECT / ".venv" / "clients" / name / "bin" / "python"
        if not python.exists():
            pytest.skip(f"{python} is not there: make test-platforms makes it")
        done = subprocess.run(
            [python, "-c", script, *arguments],
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)} | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run
