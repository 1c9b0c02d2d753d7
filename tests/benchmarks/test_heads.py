"""The benchmark of many heads: a real server under its load, and what its table says."""

import json
import shutil
from pathlib import Path

import heads
import pytest
import tiny

from tuneserve.artifact import HEAD, read_version

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")


@needs_wrk
def test_heads_are_made_loaded_and_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = tiny.write_csv(tmp_path / "reviews.csv", tiny.sentences(160))
    version = tiny.train(dataset, tmp_path, TRAIN_BODY="0")
    places = ["--version", str(version.folder), "--folder", str(tmp_path), "--json", str(tmp_path / "json")]
    load = ["--heads", "1,3", "--connections", "2", "--seconds", "1", "--rounds", "1"]
    assert heads.main([*load, *places]) == 0
    runs = json.loads((tmp_path / "json").read_text())
    assert [run["heads"] for run in runs] == [1, 3]
    for run in runs:
        assert min(*run["requests_per_s"], *run["alone_per_s"], run["load_s"]) > 0
    assert "| 3 |" in capsys.readouterr().out
    made = heads.make_heads(version, tmp_path / "made", 2)
    one, other = (read_version(tmp_path / "made" / name) for name in made)
    assert one.metadata["body"] == other.metadata["body"] == version.metadata["body"]
    assert one.metadata["sha256"][HEAD] != other.metadata["sha256"][HEAD] != version.metadata["sha256"][HEAD]


def test_the_ratio_is_that_of_each_round() -> None:
    run = {"heads": 1000, "memory": 600 << 20, "a_head": 700 << 10, "load_s": 0.005}
    run |= {"requests_per_s": [50.0, 90.0, 60.0], "alone_per_s": [100.0, 100.0, 60.0]}
    *_, row = heads.describe([run], 32).splitlines()
    assert row == "| 1,000 | 600 | 700 | 5.0 | 60 | 100 | 0.90 |"
