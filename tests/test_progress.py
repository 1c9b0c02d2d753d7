"""Lines about a loop's progress where there is no terminal."""

import io
import logging
import sys

import pytest

from tuneserve import progress
from tuneserve.progress import Progress


@pytest.fixture(autouse=True)
def _log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "LINE_S", 0.0)


def test_a_line_says_what_is_done_of_the_total_and_the_figures(caplog: pytest.LogCaptureFixture) -> None:
    with Progress("epoch 1", total=10, done=4) as shown:
        shown.advance(2, loss=0.5)
    assert caplog.messages[0].startswith("epoch 1: 6/10 texts, ")
    assert caplog.messages[0].endswith(" s left loss=0.5000")


def test_without_a_total_a_line_says_the_share(caplog: pytest.LogCaptureFixture) -> None:
    with Progress("scoring", total=None, unit="row") as shown:
        shown.advance(2, share=0.125)
        shown.advance(3, share=0.25)
    assert caplog.messages[1].startswith("scoring: 5 rows, ")
    assert caplog.messages[1].endswith("/s, 25.0% done")


def test_between_two_lines_it_is_silent(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_S", 60.0)
    with Progress("epoch 1", total=10) as shown:
        shown.advance(2)
    assert caplog.messages == []


@pytest.mark.parametrize(("total", "words"), [(10, " 5/10 "), (None, " 50%|")])
def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, total: int | None, words: str) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    shown = Progress("loop", total=total)
    shown.advance(5, share=0.5, loss=0.5)
    shown._bar.refresh()
    assert words in terminal.getvalue()
    assert "loss=0.5000" in terminal.getvalue()
    shown.close()
