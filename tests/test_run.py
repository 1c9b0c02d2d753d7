"""The verbs that look after the store, as people type them."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from tuneserve.lifecycle.feedback import Feedback
from tuneserve.lifecycle.feedback_database import FILE
from tuneserve.settings import PROJECT

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


@pytest.mark.parametrize(
    "arguments",
    [["feedback", "remove"], ["feedback", "drop", "1"], ["feedback", "list", "1", "2"], ["promote"], ["versions", "x"]],
)
def test_what_a_verb_does_not_take_is_refused_with_what_it_does(run: Run, arguments: list[str]) -> None:
    code, said = run(*arguments)
    assert code == 2
    assert "usage" in said
