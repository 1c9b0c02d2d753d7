"""Memory in processes of their own: it hardly grows with the rows, and a batch that is too large for it is learned."""

import csv
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from tuneserve.settings import PROJECT

Python = Callable[..., "subprocess.CompletedProcess[str]"]

FEW, MANY = 40_000, 160_000
WORDS = 60
MOST_BYTES = 200
"""A row's hash, label, place, length and order take about 80; its text alone, kept as a string, would take 350."""

MEASURE = """
import sys
from itertools import islice
from pathlib import Path
import rows
path, base_model, stages = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
rows.measure(islice(rows.prepare(path, base_model, path.parent), 1 + stages), path.suffix)
"""


def write(path: Path, rows: int) -> Path:
    """Different texts of about 300 characters, as one array or one row group, which nothing makes small."""
    path.parent.mkdir()
    words = tiny.WORDS * 8
    texts = [f"{number} {' '.join(words[number % 50 : number % 50 + WORDS])} {number}" for number in range(rows)]
    labels = [("bad", "good")[number % 2] for number in range(rows)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts, "label": labels}), path, compression="none", use_dictionary=False)
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]))
    else:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *zip(texts, labels, strict=True)])
    return path


def peaks(python: Python, path: Path, base_model: Path, stages: int) -> dict[str, float]:
    """The most anonymous memory of each stage, in bytes."""
    benchmarks = str(PROJECT / "benchmarks")
    done = python("-c", MEASURE, path, base_model, str(stages), PYTHONPATH=benchmarks, timeout_s=550)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()]
    return {stage: float(mib) * 2**20 for _, stage, _, _, mib in rows}


@pytest.mark.parametrize(("ending", "stages"), [("csv", 6), ("json", 1), ("parquet", 1)])
def test_memory_hardly_grows_with_the_rows(
    ending: str, stages: int, tiny_bert: Path, tmp_path: Path, python: Python
) -> None:
    few, many = (
        peaks(python, write(tmp_path / str(rows) / f"reviews.{ending}", rows), tiny_bert, stages)
        for rows in (FEW, MANY)
    )
    assert len(few) == stages
    growth = {stage: (many[stage] - few[stage]) / (MANY - FEW) for stage in few}
    assert max(growth.values()) < MOST_BYTES, growth


LEARN_IN_LITTLE_MEMORY = """
import logging, os, resource, sys
from tuneserve.settings import Settings
from tuneserve.signals import Stop
from tuneserve.training import job, loop

fit = loop.fit
def fit_in_little_memory(*arguments, **named):
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + (400 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    seen = fit(*arguments, **named)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print("parts of", seen.part_tokens)
    return seen

logging.basicConfig(level=logging.INFO, stream=sys.stdout)
loop.PART_TOKENS["cpu"] = 1 << 30
loop.fit = fit_in_little_memory
version = job.train(Settings.from_environ(os.environ), Stop(), threads=1)
print("accuracy", version.metadata["metrics"]["test"]["accuracy"])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux bounds a process' memory in this way")
def test_a_batch_that_memory_does_not_hold_is_learned_all_the_same(
    environment: dict[str, str], tmp_path: Path, python: Python
) -> None:
    """A real allocation fails in a process of its own: half a gigabyte for a layer's output, with 0.4 to be had."""
    assert resource.getrlimit(resource.RLIMIT_AS)[1] == resource.RLIM_INFINITY
    environment |= {
        "DATASET": str(tiny.write_csv(tmp_path / "many.csv", tiny.sentences(5000))),
        "BASE_MODEL": str(tiny.make_base_model(tmp_path / "wide", intermediate_size=4096)),
        "BATCH_SIZE": "4000",
        "N_EPOCHS": "1",
        # What an attempt that failed has freed goes back to the system, or the bound would count it for ever.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }
    ended = python("-c", LEARN_IN_LITTLE_MEMORY, **environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "out of memory: going on with at most" in ended.stdout
    assert "parts of" in ended.stdout
    assert "accuracy" in ended.stdout
