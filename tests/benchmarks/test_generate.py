"""The benchmark of writing: a real server under its load, and what its table says."""

import json
from pathlib import Path

import generate
import pytest
import writers


def test_this_projects_server_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "CACHE", tmp_path / "cache")
    checkpoint = writers.make_causal(tmp_path / "model", positions=128)
    load = ["--connections", "1,3", "--seconds", "0.5", "--rounds", "1"]
    places = ["--kinds", "text", "--peers", "", "--checkpoint", str(checkpoint), "--json", str(tmp_path / "json")]
    assert generate.main([*load, *places]) == 0
    runs = json.loads((tmp_path / "json").read_text())
    assert [run["connections"] for run in runs] == [1, 3]
    for run in runs:
        assert run["answers"] >= run["connections"]
        assert run["tokens_per_s"] == pytest.approx(run["answers"] * 64 / run["seconds"])
    assert "| text, 3 |" in capsys.readouterr().out


def test_the_ratio_is_to_the_best_other_of_the_same_round() -> None:
    figures = [("tuneserve", 60.0, 0), ("gunicorn", 20.0, 0), ("litserve", 30.0, 0), ("tuneserve", 40.0, 1)]
    runs = [
        {"kind": "text", "connections": 8, "contender": name, "tokens_per_s": speed, "round": number}
        for name, speed, number in [*figures, ("gunicorn", 10.0, 1)]
    ]
    *_, row = generate.describe(runs, ["tuneserve", "gunicorn", "litserve"]).splitlines()
    assert row == "| text, 8 | 50.0 ± 14.1 | 15.0 ± 7.1 | 30.0 | 3.00 (2.00 to 4.00) |"


@pytest.mark.parametrize("kind", ["summary", "text"])
def test_each_contender_is_asked_for_as_many_tokens(kind: str) -> None:
    ours, *others = generate.contenders(kind).values()
    asked = json.loads(ours.encode("a text"))
    wanted = generate.WRITTEN[kind]
    limits = asked if kind == "summary" else asked["parameters"]
    assert {value - (kind == "summary") for name, value in limits.items() if "_" in name} == {wanted}
    assert all(json.loads(one.encode("a text")) == {"text": "a text"} for one in others)
