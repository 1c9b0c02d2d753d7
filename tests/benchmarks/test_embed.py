"""The benchmark of embeddings: a real server under its load, and what its table says."""

import json
from pathlib import Path

import embed
import pytest
import tiny


def test_this_projects_server_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embed, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("NUM_MAX_POSITIONS", "64")
    checkpoint = tiny.make_base_model(tmp_path / "model", max_position_embeddings=256)
    load = ["--connections", "1,3", "--seconds", "1", "--rounds", "1"]
    places = ["--peers", "", "--checkpoint", str(checkpoint), "--json", str(tmp_path / "json")]
    assert embed.main([*load, *places]) == 0
    runs = json.loads((tmp_path / "json").read_text())
    assert [(run["texts"], run["connections"]) for run in runs] == [
        ("short", 1),
        ("short", 3),
        ("long", 1),
        ("long", 3),
    ]
    assert all(run["requests_per_s"] >= 1 and run["errors"] == 0 and run["cosine"] > 0.999 for run in runs)
    assert "| long, 3 |" in capsys.readouterr().out


def test_each_ratio_is_of_one_round() -> None:
    figures = [("tuneserve", 60.0, 0), ("infinity", 20.0, 0), ("tuneserve", 40.0, 1), ("infinity", 10.0, 1)]
    runs = [
        {"texts": "short", "connections": 32, "contender": name, "requests_per_s": speed, "round": number}
        | {"p99_ms": 12.0, "cosine": 1.0}
        for name, speed, number in figures
    ]
    *_, row = embed.describe(runs, ["tuneserve", "infinity"]).splitlines()
    cells = "50 ± 14 | 15 ± 7 | 3.50 (3.00 to 4.00) | 12 ± 0, 12 ± 0 | 1.00000, 1.00000"
    assert row == f"| short, 32 | {cells} |"


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("tuneserve", [[0.6, 0.8]]),
        ("infinity", {"data": [{"embedding": [0.6, 0.8], "index": 0}]}),
        ("sentence-transformers", {"vector": [0.6, 0.8]}),
    ],
)
def test_the_vector_is_found_in_every_answer(name: str, answer: object) -> None:
    assert json.loads(embed.CONTENDERS[name].label(answer)) == [0.6, 0.8]
