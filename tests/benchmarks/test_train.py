"""The comparison with Hugging Face Trainer runs from its texts to its tables, on a tiny checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import conditions
import contenders
import pytest
import torch
from tables import compare, tabulate
from tiny import make_base_model, sentences, write_csv

from tuneserve.hardware import choose_precision
from tuneserve.settings import PROJECT

JOB, TRAINERS = "tuneserve", ["trainer", "trainer-tuned"]
NATIVE = choose_precision("auto", torch.device("cpu"))
"""What this machine computes in."""
Rows = dict[str, dict[str, str]]


def bench(*arguments: str | Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(PROJECT / "benchmarks" / "train.py"), *map(str, arguments)]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)


def read_tables(text: str) -> list[Rows]:
    """Every Markdown table: its rows by their first cells, each with its other cells by their titles."""
    tables: list[Rows] = []
    titles: list[str] = []
    for line in text.splitlines():
        first, *others = [cell.strip() for cell in line.split("|")[1:-1]] or [""]
        if not first:
            titles = []
        elif not titles:
            titles = others
            tables.append({})
        elif first != "---":
            tables[-1][first] = dict(zip(titles, others, strict=True))
    return tables


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Rows], dict[str, list[dict[str, Any]]]]:
    """The tables that one quick run prints, and the runs that it writes down for each task."""
    folder = tmp_path_factory.mktemp("bench")
    write_csv(folder / "sst2" / "train.csv", sentences(150))
    write_csv(folder / "sst2" / "dev.csv", sentences(40, first=150))
    done = bench(
        *("--quick", "--tasks", "sst2,head", "--data", folder, "--base-model", make_base_model(folder / "tiny")),
        *("--max-tokens", "16", "--batch-size", "8", "--output", folder / "runs.json"),
        CLASS_WEIGHTS="heavy",  # the job would refuse it; what stands in the caller's environment must not reach it
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "runs.json").read_text())
    return read_tables(done.stdout), {one["task"]: one["runs"] for one in record["results"]}


def test_every_task_has_a_row_a_contender_and_one_a_ratio(
    outcome: tuple[list[Rows], dict[str, list[dict[str, Any]]]],
) -> None:
    tables, _ = outcome
    assert len(tables) == 4
    for figures, ratios in (tables[:2], tables[2:]):
        assert list(figures) == [f"{JOB}, {NATIVE}", "trainer, fp32", f"trainer-tuned, {NATIVE}"]
        for row in figures.values():
            assert float(row["texts/s"]) > 0
            assert float(row["tokens/s"]) > 0
            assert 0 <= float(row[f"of {NATIVE} rate %"]) < 100
            assert 0 <= float(row["padding %"]) < 100
            assert 0 < float(row["fit s"]) < float(row["process s"])
            assert float(row["peak memory MiB"]) > 100
            assert 0 <= float(row["test accuracy %"]) <= 100
        assert list(ratios) == [f"{JOB} / {trainer}" for trainer in TRAINERS]
        for row in ratios.values():
            assert min(float(row[title]) for title in ("texts/s", "process s", "peak memory")) > 0
            assert -100 <= float(row["test accuracy, points"]) <= 100


def test_all_contenders_learn_the_same_texts(outcome: tuple[list[Rows], dict[str, list[dict[str, Any]]]]) -> None:
    _, runs = outcome
    assert {run["texts"] for run in runs["sst2"]} == {86}  # 96, of which a tenth of each class is for validation
    assert {run["texts"] for run in runs["head"]} == {5 * 86}
    tokens = [run["tokens_per_s"] * run["fit_s"] for run in runs["sst2"]]
    assert max(tokens) == pytest.approx(min(tokens), rel=0.03)  # the job's seconds are rounded to thousandths


def test_trainer_pads_and_less_so_when_it_groups_by_length(
    outcome: tuple[list[Rows], dict[str, list[dict[str, Any]]]],
) -> None:
    _, runs = outcome
    padding = {run["contender"]: run["padding_share"] for run in runs["sst2"]}
    assert 0 < padding["trainer-tuned"] < padding["trainer"]


@pytest.mark.parametrize(("native", "told"), [("bf16", {"bf16": True}), ("fp32", {})])
def test_a_tuned_trainer_computes_in_bf16_only_where_the_device_does(
    monkeypatch: pytest.MonkeyPatch, native: str, told: dict[str, bool]
) -> None:
    monkeypatch.setattr(contenders, "choose_precision", lambda setting, device: native)
    assert contenders.trainer_settings("trainer", "cpu") == {}
    assert contenders.trainer_settings("trainer-tuned", "cpu") == contenders.GROUPED | told


def test_shares_are_of_the_rate_of_the_precision_that_the_device_computes_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base_model = make_base_model(tmp_path / "tiny")
    rates = {torch.float32: 1.0, torch.bfloat16: 2.0}
    monkeypatch.setattr(conditions, "measure_products", lambda device, dtype: rates[dtype])
    for native, rate in (("fp32", 1.0), ("bf16", 2.0)):
        monkeypatch.setattr(conditions, "choose_precision", lambda setting, device, native=native: native)
        found = conditions.survey(name=str(base_model), folder="", device="cpu")
        assert (found["precision"], found["flops"]) == (native, rate)
        assert found["rates"] == {"fp32": 1.0} | {native: rate}  # emulated, one product would take a minute


def test_cells_are_means_with_deviations_and_ratios_are_taken_within_a_seed() -> None:
    figures = {"tokens_per_s": 1, "rate_share": 0.5, "padding_share": None, "fit_s": 1, "precision": "fp32"}
    runs = [
        figures
        | {"contender": contender, "seed": seed, "texts_per_s": speed, "process_s": 1, "peak_bytes": 2**20}
        | {"test_accuracy": accuracy}
        for contender, seed, speed, accuracy in [
            ("job", 0, 40, 0.9),
            ("other", 0, 10, 0.8),
            ("other", 1, 20, 0.9),
            ("job", 1, 40, 0.8),
            ("job", 2, 90, 0.9),
            ("other", 2, 30, 0.8),
            ("blind", 0, 20, None),
        ]
    ]
    [table] = read_tables(tabulate(runs, ["job", "other", "absent", "blind"], "fp32"))
    assert list(table) == ["job, fp32", "other, fp32", "blind, fp32"]
    assert table["other, fp32"]["texts/s"] == "20.0 ± 10.0"
    assert table["other, fp32"]["of fp32 rate %"] == "50.0 ± 0.0"
    assert table["other, fp32"]["padding %"] == "-"
    assert table["blind, fp32"]["texts/s"] == "20.0"
    assert table["blind, fp32"]["test accuracy %"] == "-"
    [ratios] = read_tables(compare(runs, ["job", "other", "absent"]))
    assert list(ratios) == ["job / other"]
    assert ratios["job / other"]["texts/s"] == "3.00 (2.00 to 4.00)"
    assert ratios["job / other"]["test accuracy, points"] == "+10.0 (-10.0 to +10.0)"


def test_what_cannot_be_run_is_refused_in_words() -> None:
    unknown = bench("--tasks", "sst2,sst3")
    assert unknown.returncode == 2
    assert "there is no task sst3; use sst2, imdb, head" in unknown.stderr
    nowhere = bench("--base-model", "./nowhere")
    assert nowhere.returncode == 1
    assert nowhere.stderr.rstrip().endswith("there is no such folder.")
