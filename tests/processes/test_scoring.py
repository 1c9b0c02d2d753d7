"""`predict` as real processes: killed and gone on with, and memory that does not grow with the rows."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from tabular import read, write
from wire import wait_until

from tuneserve.artifact import write_golden
from tuneserve.files import write_json
from tuneserve.scoring.job import CHUNK_ROWS
from tuneserve.settings import PROJECT
from tuneserve.text import TextEncoder
from tuneserve.training.publication import golden_answers

RUN = PROJECT / "production" / "docker-res" / "run.py"
Python = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose champion has random weights."""
    root = tmp_path_factory.mktemp("store")
    folder = tiny.make_base_model(root / "versions" / "20260102T030405Z-0a1b2c3d")
    model = tiny.make_classifier(labels=2, words=len(tiny.SPECIAL) + len(tiny.WORDS)).eval()
    model.save_pretrained(folder)
    write_json(folder / "metadata.json", {"labels": ["bad", "good"], "settings": {"num_max_positions": 16}})
    write_golden(folder, golden_answers(model, TextEncoder.from_folder(folder, max_tokens=16), ["bad", "good"]))
    (root / "champion").write_text(folder.name)
    return root


def test_the_verb_needs_an_input_an_output_and_a_model(python: Python, tmp_path: Path, store: Path) -> None:
    folders = {"LOG_PATH": str(tmp_path), "MODEL_PATH": str(tmp_path / "none")}
    done = python(RUN, "predict", **folders)
    assert (done.returncode, "INPUT and OUTPUT" in done.stderr) == (2, True)
    done = python(RUN, "predict", **folders, INPUT="in.csv", OUTPUT="out.csv")
    assert (done.returncode, "no model" in done.stderr) == (8, True)
    done = python(RUN, "predict", **folders | {"MODEL_PATH": str(store)}, INPUT="in.csv", OUTPUT="out.csv")
    assert (done.returncode, "INPUT=in.csv cannot be read" in done.stderr) == (3, True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_was_hit_goes_on_and_ends_like_one_that_was_not(
    python: Python, tmp_path: Path, store: Path, number: signal.Signals, code: int
) -> None:
    rows = [{"id": str(index), "text": text} for index, (text, _) in enumerate(tiny.sentences(5 * CHUNK_ROWS + 9))]
    source, output = write(tmp_path / "in.csv", rows), tmp_path / "out.csv"
    variables = {
        "LOG_PATH": str(tmp_path),
        "MODEL_PATH": str(store),
        "INPUT": str(source),
        "OUTPUT": str(output),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen([sys.executable, RUN, "predict"], env=os.environ | variables, stdout=subprocess.DEVNULL)
    folder = tmp_path / "out.csv.parts"
    wait_until(lambda: (folder / "part-00000-00000001.csv").exists() or process.poll() is not None)
    process.send_signal(number)
    assert process.wait(20) == code
    assert not output.exists()
    finished = {path.name for path in folder.glob("part-*")}
    assert {"part-00000-00000000.csv", "part-00000-00000001.csv"} <= finished
    assert len(finished) < 6, "the run was over too soon"

    done = python(RUN, "predict", timeout_s=550, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(finished)} parts were there already" in done.stdout
    found = read(output)
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert {row["label"] for row in found} <= {"good", "bad"}
    assert not folder.exists()


MEASURE = """
import re, sys
from pathlib import Path
from tuneserve.tasks.classifier import Prediction as make
from tuneserve.scoring.output import Output
from tuneserve.scoring.job import score_rows
from tuneserve.scoring.input import Input

SCORES = {"bad": 0.25, "good": 0.75}

def predict(texts):
    return [make(label="good", scores=SCORES, tokens=len(text), truncated=False, model_version="v") for text in texts]

source = Input(sys.argv[1])
score_rows(source, Output(sys.argv[2], source, shard=0, shards=1), predict, model_version="v")
assert not {"torch", "transformers", "datasets"} & set(sys.modules)
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_memory_does_not_grow_with_the_rows(python: Python, tmp_path: Path, ending: str) -> None:
    few, many = 40_000, 200_000
    peaks_mib = []
    for count in (few, many):
        texts = np.array([f"{text} {'and a film ' * 20}" for text, _ in tiny.sentences(count)])
        source = tmp_path / f"{count}{ending}"
        if ending == ".parquet":  # one row group, which nothing makes small
            table = pa.table({"text": texts, "id": np.arange(count)})
            pq.write_table(table, source, compression="none", use_dictionary=False, row_group_size=count)
        else:
            write(source, [{"id": str(index), "text": str(text)} for index, text in enumerate(texts)])
        done = python("-c", MEASURE, source, tmp_path / f"out{count}{ending}")
        assert done.returncode == 0, done.stderr
        peaks_mib.append(int(done.stdout.split()[-1]) / 1024)
    assert (tmp_path / f"{many}{ending}").stat().st_size > 40 << 20
    assert peaks_mib[1] - peaks_mib[0] < 30, peaks_mib
