"""The recipes of docs/scale.md, run as the page has them by Ray and Spark on two cores, in environments without torch.

Each is run once, with a worker that dies midway: its rows must be those that `predict` writes all the same.
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from tuneserve.scoring import job
from tuneserve.settings import PROJECT, Settings

Client = Callable[..., Any]
Noted = dict[str, list[str]]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall((PROJECT / "docs" / "scale.md").read_text(encoding="utf-8"))
FILES, ROWS = 6, 60
"""Files of the input, each a task for Spark, and rows in each."""
BATCH_ROWS = 20

COUNTED = """
import os
from tuneserve.scoring import scorer

def note(what):
    with open(os.environ["COUNTED"], "a") as file:
        file.write(f"{os.getpid()} {what}\\n")

def load(folder, _load=scorer.load, **settings):
    note("load")
    return _load(folder, **settings)

scorer.load = load

class Scorer(scorer.Scorer):
    def __call__(self, table):
        if self._model is not None:  # not the first batch
            try:
                os.close(os.open(os.environ["COUNTED"] + ".died", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                note("died")
                os._exit(1)
        note("batch")
        return super().__call__(table)
"""
"""The Scorer, which writes down what it does in which process; the first second batch kills its process."""

LAST = """
import importlib.util, json
print(json.dumps([name for name in ("torch", "transformers") if importlib.util.find_spec(name)]))
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Parquet files; some rows have no text."""
    folder = tmp_path_factory.mktemp("rows")
    texts = [None if number % 50 == 7 else text for number, (text, _) in enumerate(tiny.sentences(FILES * ROWS))]
    table = pa.table({"id": range(len(texts)), "text": texts})
    for number in range(FILES):
        pq.write_table(table.slice(number * ROWS, ROWS), folder / f"{number}.parquet")
    return folder


@pytest.fixture(scope="module")
def predicted(rows: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `run.py predict` writes for these rows."""
    output = tmp_path_factory.mktemp("predicted") / "parts"
    environment = {"MODEL_PATH": str(store), "INPUT": str(rows), "OUTPUT": str(output)}
    job.score(Settings.from_environ(environment), threads=1, environ={})
    return read(output)


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder's Parquet files, by their ids: no engine promises an order."""
    found = pa.concat_tables(pq.read_table(path) for path in folder.glob("*.parquet"))
    rows: list[dict[str, Any]] = found.sort_by("id").to_pylist()
    return rows


def recipe(*starts: str) -> str:
    """The blocks of the page that start so, with the Scorer that counts."""
    found = [block for start in starts for block in BLOCKS if block.startswith(start)]
    assert len(found) == len(starts)
    code = "\n".join(found)
    assert code.count("from tuneserve.scoring.scorer import Scorer") == 1
    return code.replace("from tuneserve.scoring.scorer import", "from counted import") + LAST


def run(client: Client, name: str, code: str, folder: Path, *arguments: object, **variables: str) -> Noted:
    """Run a recipe in its client's environment; what was written down by process."""
    (folder / "counted.py").write_text(COUNTED)
    res = PROJECT / "production" / "docker-res"
    variables |= {"PYTHONPATH": f"{folder}{os.pathsep}{res}", "COUNTED": str(folder / "log")}
    assert client(name, code, *map(str, arguments), timeout_s=300, **variables) == []
    noted = defaultdict(list)
    for line in (folder / "log").read_text().splitlines():
        process, what = line.split()
        noted[process].append(what)
    return noted


def same(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> bool:
    """Whether rows are equal, but for the last digits of probabilities, which depend on what shares a batch."""

    def rounded(rows: list[dict[str, Any]]) -> list[Any]:
        return [
            {
                **row,
                "score": pytest.approx(row["score"], abs=1e-4),
                "scores": row["scores"] and pytest.approx(dict(row["scores"]), abs=1e-4),
            }
            for row in rows
        ]

    return [{**row, "scores": row["scores"] and dict(row["scores"])} for row in found] == rounded(wanted)


def check_loads(noted: Noted, tasks: int = 0) -> None:
    """One process died, and each loaded the model once, however many batches and tasks it was given."""
    assert [what for written in noted.values() for what in written].count("died") == 1
    assert {process: written.count("load") for process, written in noted.items()} == dict.fromkeys(noted, 1)
    assert sum(written.count("batch") for written in noted.values()) >= FILES * ROWS // BATCH_ROWS
    assert not tasks or len(noted) < tasks


def test_ray_answers_as_predict_does(
    client: Client, rows: Path, predicted: list[dict[str, Any]], store: Path, tmp_path: Path
) -> None:
    code = recipe('"""ray_score.py')
    assert "batch_size=1024" in code
    code = code.replace("batch_size=1024", f"batch_size={BATCH_ROWS}")
    output = tmp_path / "scored"
    noted = run(client, "scale", code, tmp_path, rows, output, store, 2, RAY_USAGE_STATS_ENABLED="0")
    assert same(read(output), predicted)
    check_loads(noted)


def test_spark_answers_as_predict_does(
    client: Client, rows: Path, predicted: list[dict[str, Any]], store: Path, tmp_path: Path
) -> None:
    code = recipe('"""spark_score.py', "def answer_frames")
    output = tmp_path / "scored"
    conf = {
        "spark.sql.execution.arrow.maxRecordsPerBatch": BATCH_ROWS,
        "spark.sql.files.openCostInBytes": 128 << 20,  # a file a task, however small
        "spark.ui.enabled": "false",
    }
    options = " ".join(f"--conf {name}={value}" for name, value in conf.items())
    noted = run(
        client,
        "scale",
        code,
        tmp_path,
        rows,
        output,
        store,
        PYSPARK_PYTHON=str(PROJECT / ".venv" / "clients" / "scale" / "bin" / "python"),
        PYSPARK_SUBMIT_ARGS=f"--master local[2,4] {options} pyspark-shell",  # two cores, four attempts
    )
    for folder in (output, Path(f"{output}-frames")):
        assert same(read(folder), predicted)
    check_loads(noted, tasks=FILES)
