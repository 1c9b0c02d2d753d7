"""The model as a function of tables: what `predict` writes, without files, and in other processes too."""

import json
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneserve import load
from tuneserve.errors import DataError
from tuneserve.lifecycle.store import Store
from tuneserve.scoring import job, scorer
from tuneserve.scoring.scorer import Scorer
from tuneserve.serving.model import Model
from tuneserve.settings import Settings

Python = Callable[..., "subprocess.CompletedProcess[str]"]
ROWS = pa.table({"id": [1, 2, 3, 4], "text": ["a great film", " ", None, "awful food"], "score": [0.5, 1, 2, 3]})


def test_a_table_gets_the_columns_that_predict_writes_to_a_file(store: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(ROWS, source)
    about = {"MODEL_PATH": str(store), "INPUT": str(source), "OUTPUT": str(output)}
    job.score(Settings.from_environ(about), threads=1, environ={})
    scored = Scorer(store)(ROWS)
    assert scored.equals(pq.read_table(output))
    assert scored.column("label").to_pylist() == ["good", None, None, "bad"]
    assert scored.column("score").to_pylist() == ROWS.column("score").to_pylist()
    assert scored.column("error").to_pylist() == [None, "The text is empty.", "The text is empty.", None]


FRESH = """
import json, pickle, sys
import pyarrow as pa
score = pickle.load(open(sys.argv[1], "rb"))
print(json.dumps(score(pa.table({"what": ["a great film " * 40]})).to_pylist()))
"""


def test_it_travels_to_another_process_even_after_use(python: Python, store: Path, tmp_path: Path) -> None:
    score = Scorer(store, text_column="what", long_text="window")
    table = pa.table({"what": ["a great film " * 40]})
    before = score(table).to_pylist()
    (tmp_path / "scorer").write_bytes(pickle.dumps(score))
    done = python("-c", FRESH, tmp_path / "scorer")
    assert done.returncode == 0, done.stderr
    [found], [wanted] = json.loads(done.stdout), before
    assert (found["label"], found["truncated"], found["tokens"]) == ("good", False, wanted["tokens"])
    assert found["score"] == pytest.approx(wanted["score"], abs=1e-4)


def test_a_table_that_does_not_say_which_column_holds_the_text_is_refused(store: Path) -> None:
    with pytest.raises(DataError, match="which column holds the text; its columns are one, two"):
        Scorer(store)(pa.table({"one": ["film"], "two": ["film"]}))


def test_a_process_loads_a_version_once_however_many_scorers_come_to_it(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[dict[str, object]] = []
    one, other = {"omp_num_threads": 1}, {"omp_num_threads": 1, "long_text": "window"}

    def counted(folder: str, **settings: object) -> Model:
        loads.append(settings)
        return load(folder, **settings)

    monkeypatch.setattr(scorer, "load", counted)
    for settings in (one, one, other):
        pickle.loads(pickle.dumps(Scorer(store, **settings)))(ROWS)  # as engines do for each task
    assert loads == [one, other]


def test_a_new_scorer_of_a_store_asks_the_champion_of_now(store: Path, tmp_path: Path) -> None:
    models = Store(tmp_path / "models")
    first = store / "versions" / Store(store).champion().id
    for name in ("20260101T000000Z-00000000", "20260102T000000Z-00000000"):
        shutil.copytree(first, models.versions_folder / name)
        models.promote(name)
        assert set(Scorer(models.root)(ROWS).column("model_version").to_pylist()) == {name}
