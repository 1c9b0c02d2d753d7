"""The verbs that look after the store, as people type them."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tuneserve.artifact import Version
from tuneserve.errors import DeviceError, SettingsError, TrainingError
from tuneserve.lifecycle.feedback import Feedback
from tuneserve.lifecycle.feedback_database import FILE
from tuneserve.serving.engines.choice import load_torch_engine
from tuneserve.settings import PROJECT, Settings
from tuneserve.signals import Stop

Run = Callable[..., tuple[object, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run.py` with these arguments on the store `tmp_path`: its exit code and what it says."""
    monkeypatch.syspath_prepend(str(PROJECT / "production" / "docker-res"))
    monkeypatch.setattr("tuneserve.signals.Stop.listen", lambda stop: None)
    monkeypatch.setenv("MODEL_PATH", str(tmp_path))
    monkeypatch.setattr(logging.root, "handlers", [*logging.root.handlers])  # one on this test's stderr must not stay
    import run as program

    def run(*arguments: str) -> tuple[object, str]:
        try:
            code: object = program.main(list(arguments))
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return code, out + err

    return run


def test_feedback_is_counted_listed_trusted_and_removed(run: Run, tmp_path: Path) -> None:
    assert run("feedback") == (0, f"There is no label in {tmp_path / FILE}.\n")
    Feedback(tmp_path / FILE, max_rows=10, keep_texts=False).label_text("a text", "good", client="10.0.0.1")
    code, said = run("feedback")
    assert code == 0
    assert "kept apart" in said
    assert "anonymous/" in said
    assert "'a text'" in run("feedback", "list", "anonymous")[1]
    assert run("feedback", "list") == run("feedback", "list", "anonymous")
    assert run("feedback", "trust", "1") == (0, "1 labels count as yours: the next training uses them\n")
    assert run("feedback", "remove", "reviewed") == (0, "1 labels removed\n")
    code, said = run("feedback", "remove", "reviewed")
    assert code == 1
    assert "No label" in said


@pytest.mark.parametrize(
    ("verb", "key", "said"),
    [("serve", "", 1), ("train-serve", " ", 1), ("serve", "hunter2", 0), ("serve", None, 0), ("train", "", 0)],
)
def test_a_server_says_that_the_key_it_was_given_is_empty(
    run: Run,
    verb: str,
    key: str | None,
    said: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    import run as program

    monkeypatch.setitem(program.VERBS, verb, lambda *_: None)
    monkeypatch.setattr("tuneserve.logs.start", lambda *_, **__: None)
    monkeypatch.setattr("tuneserve.hardware.set_threads", lambda _: 1)
    if key is not None:
        monkeypatch.setenv("API_KEY", key)
    assert run(verb) == (0, "")
    assert [record.message.partition(" is ")[0] for record in caplog.records] == ["API_KEY"] * said


def test_of_models_that_were_named_three_stay_beside_the_one_that_is_served(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import run as program

    seen: list[list[str]] = []
    served = tmp_path / "served"

    def serve(settings: Settings, **_: object) -> None:
        settings.model_path.mkdir(parents=True, exist_ok=True)
        seen.append(sorted(path.name for path in served.iterdir()))

    monkeypatch.setattr("tuneserve.serving.http.server.serve", serve)
    for name in "abcdab":
        for path in served.glob("*"):
            os.utime(path, (path.stat().st_mtime - 10,) * 2)
        program.serve(Settings(model=name, data_path=tmp_path), Stop(), 1)
    assert [len(one) for one in seen] == [1, 2, 3, 4, 3, 4]
    assert set(seen[2]) - set(seen[4]) == set(seen[1]) - set(seen[0])  # the second one, which was used least lately


@pytest.mark.parametrize(
    "arguments",
    [["feedback", "remove"], ["feedback", "drop", "1"], ["feedback", "list", "1", "2"], ["promote"], ["versions", "x"]],
)
def test_what_a_verb_does_not_take_is_refused_with_what_it_does(run: Run, arguments: list[str]) -> None:
    code, said = run(*arguments)
    assert code == 2
    assert "usage" in said


def test_the_failure_file_of_a_platform_holds_no_secret(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise TrainingError("https://me:geheim@host/data.csv?sig=geheim cannot be read with the key verborgen")

    variables = {"PLATFORM": "sagemaker", "SAGEMAKER_BASE_DIR": str(tmp_path), "HF_TOKEN": "verborgen"}
    for name, value in (variables | {"DATASET": "/x.csv", "LOG_PATH": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules["run"].VERBS, "train", fail)
    run("train")
    said = (tmp_path / "output" / "failure").read_text()
    assert "host/data.csv" in said
    assert "geheim" not in said
    assert "verborgen" not in said


@pytest.mark.parametrize(("verb", "library"), [("train", "torch"), ("import", "torch"), ("predict", "pyarrow")])
def test_where_a_verbs_libraries_are_missing_it_says_so(
    run: Run, verb: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, said = run(verb, *(["FOLDER"] if verb == "import" else []))
    assert code == SettingsError.exit_code
    assert f"{verb} needs {library}, which is not installed" in said


def test_a_version_that_only_torch_runs_says_so_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="Only torch runs version v-1"):
        load_torch_engine(Version(Path("v-1"), {}), Settings(), threads=1)
