"""The programs of docs/api.md as they stand there, in their runtimes, against a server that is overloaded at first."""

import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from serving.conftest import classifier, engine, held, make_engine, settings, slot, version
from wire import Full, counts, served, wait_until

from tuneserve.lifecycle.feedback import Feedback
from tuneserve.lifecycle.feedback_database import FILE
from tuneserve.serving.slot import Slot
from tuneserve.settings import PROJECT, Settings

__all__ = ["classifier", "engine", "held", "make_engine", "settings", "slot", "version"]

PAGE = (PROJECT / "docs" / "api.md").read_text(encoding="utf-8")
PROGRAMS = dict(re.findall(r"^```(sh|python|js|java)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
COMMANDS = {
    "sh": (["bash", "-e"], "ask.sh"),
    "python": ([sys.executable, "-W", "error"], "ask.py"),
    "js": (["node"], "ask.mjs"),
    "java": (["java"], "Ask.java"),
}


@pytest.fixture
def feedback(tmp_path: Path) -> Iterator[Feedback]:
    feedback = Feedback(tmp_path / FILE, max_rows=100, keep_texts=False, keyed=True)
    feedback.start()
    yield feedback
    feedback.close()


def test_every_language_has_its_program() -> None:
    assert set(PROGRAMS) == set(COMMANDS)


@pytest.mark.parametrize("language", COMMANDS)
def test_a_program_asks_waits_and_corrects(
    language: str, settings: Settings, held: tuple[Slot, threading.Event], feedback: Feedback, tmp_path: Path
) -> None:
    command, name = COMMANDS[language]
    if shutil.which(command[0]) is None or (language == "java" and shutil.which("javac") is None):
        pytest.skip(f"{command[0]} is not here")
    (tmp_path / name).write_text(PROGRAMS[language], encoding="utf-8")
    slot, go = held
    keyed = settings.model_copy(update={"api_key": SecretStr("k")})
    with served(keyed, slot, feedback=feedback) as port:
        full = Full(slot, go, port, "X-API-Key: k")
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "API_KEY": "k"}
        environment |= {"TUNESERVE_URL": f"http://127.0.0.1:{port}"}
        path = shutil.which(command[0])
        assert path is not None
        running = subprocess.Popen(
            [path, *command[1:], name],
            cwd=tmp_path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            wait_until(lambda: counts(slot).get(("/inference", "429")) or running.poll() is not None)
            full.make_room()
            said, complaints = running.communicate(timeout=120)
        finally:
            running.kill()
            running.wait()
            full.close()
        assert running.returncode == 0, complaints + said
        assert counts(slot)[("/inference", "429")] >= 1, "it was let in at once"
        wait_until(lambda: feedback.counts()["labels"])
        assert feedback.counts() == {"labels": 1, "labelled_texts": 0, "kept_apart": 0}
    assert said.count("good") >= 2
    assert re.search(r"stored\W+true", said, re.IGNORECASE)


def test_what_is_no_overload_is_told(settings: Settings, slot: Slot, tmp_path: Path) -> None:
    keyed = settings.model_copy(update={"api_key": SecretStr("k")})
    with served(keyed, slot) as port:
        environment: dict[str, Any] = {"PATH": "/usr/bin:/bin", "TUNESERVE_URL": f"http://127.0.0.1:{port}"}
        for language in ("python", "sh"):
            command, name = COMMANDS[language]
            (tmp_path / name).write_text(PROGRAMS[language], encoding="utf-8")
            done = subprocess.run([*command, name], cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode != 0
            assert "wants its API key" in done.stdout + done.stderr
