"""Files scored: real files of every kind, shards, and what is refused."""

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serving.conftest import EchoEngine
from tabular import Row, parse, read, write

from tuneserve.artifact import Version
from tuneserve.errors import DataError, EngineError, SettingsError, StoreError
from tuneserve.scoring.input import Input
from tuneserve.scoring.job import choose_shard, score, score_rows
from tuneserve.scoring.output import MANIFEST, Output
from tuneserve.serving.model import Answers
from tuneserve.settings import PROJECT, Settings
from tuneserve.tasks.classifier import Classifier, Prediction

RUN = PROJECT / "production" / "docker-res" / "run.py"
Python = Callable[..., "subprocess.CompletedProcess[str]"]

ENDINGS = [".csv", ".tsv", ".jsonl", ".parquet"]
ANSWER = ["label", "score", "scores", "tokens", "truncated", "error", "model_version", "abstain"]
TEXTS = [
    "a great film",
    'she said "good", twice',
    "bad\nand awful\r\nin three lines",
    "eine wärme, ein Film 映画 🎬",
    "null",
    "01",
    "a\tb;c,d",
    " film ",
    "film " * 40,
]


def run(
    classifier: Classifier,
    source: Path | str,
    output: Path | str,
    *,
    shard: int = 0,
    shards: int = 1,
    chunk_rows: int = 4,
    text_column: str = "",
    model_version: str = "",
    how: dict[str, str] | None = None,
) -> None:
    rows = Input(str(source), text_column=text_column)
    parts = Output(str(output), rows, shard=shard, shards=shards)
    score_rows(
        rows,
        parts,
        classifier.predict,
        how=how,
        model_version=model_version or classifier.version.id,
        shard=shard,
        shards=shards,
        chunk_rows=chunk_rows,
    )


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_row_keeps_its_columns_and_order_and_gets_its_answer(
    classifier: Classifier, version: Version, tmp_path: Path, ending: str
) -> None:
    rows: list[Row] = [{"id": f"{index:03}", "text": text, "note": "ü,\n"} for index, text in enumerate(TEXTS)]
    source = write(tmp_path / f"in{ending}", rows)
    run(classifier, source, tmp_path / f"out{ending}")
    found = read(tmp_path / f"out{ending}")
    assert [list(row) for row in found] == [["id", "text", "note", *ANSWER]] * len(TEXTS)
    assert [{name: row[name] for name in rows[0]} for row in found] == rows
    for row, one in zip(found, classifier.predict(TEXTS), strict=True):
        assert (row["label"], row["scores"]) == (one.label, one.scores)
        assert row["score"] == max(one.scores.values())
        assert (row["tokens"], row["truncated"]) == (one.tokens, one.truncated)
        assert (row["error"], row["model_version"]) == (None, version.id)
    assert [row["truncated"] for row in found] == [False] * 8 + [True]
    assert {path.name for path in tmp_path.iterdir()} == {f"in{ending}", f"out{ending}"}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_row_says_whether_its_answer_abstains_if_the_version_promises_anything(
    version: Version, classifier: Classifier, tmp_path: Path, ending: str
) -> None:
    source = write(tmp_path / f"in{ending}", [{"text": text} for text in ("a", "three three three two", "")])
    run(classifier, source, tmp_path / f"without{ending}")
    scores = [row["score"] for row in read(tmp_path / f"without{ending}")]
    assert [row["abstain"] for row in read(tmp_path / f"without{ending}")] == [None] * 3
    promised = {**version.metadata, "abstention": {"max_error": 0.1, "threshold": scores[1]}}
    promising = Classifier(Version(version.folder, promised), EchoEngine())
    run(promising, source, tmp_path / f"with{ending}")
    promising.close()
    assert [row["abstain"] for row in read(tmp_path / f"with{ending}")] == [True, False, None]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_row_without_a_text_gets_its_error_and_the_others_their_answers(
    classifier: Classifier, tmp_path: Path, ending: str
) -> None:
    texts: list[str | None] = ["film", "", "  \n", "good"] + ([] if ending in (".csv", ".tsv") else [None])
    source = write(tmp_path / f"in{ending}", [{"text": text, "id": "x"} for text in texts])
    run(classifier, source, tmp_path / f"out{ending}", chunk_rows=2)
    found = read(tmp_path / f"out{ending}")
    assert [row["error"] for row in found[:4]] == [None, "The text is empty.", "The text is empty.", None]
    assert all(row["error"] for row in found[4:])
    assert [row["label"] is None for row in found] == [bool(row["error"]) for row in found]
    assert all(row["scores"] is None and row["score"] is None for row in found if row["error"])


def test_a_json_value_that_is_no_text_is_one_rows_error(classifier: Classifier, tmp_path: Path) -> None:
    lines = ['{"text": ["a"]}', '{"text": {"a": 1}}', '{"text": "\\ud800"}', '{"id": 5}', '{"text": 7.0}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    run(classifier, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    errors = [row["error"] for row in read(tmp_path / "out.jsonl")]
    assert [error and error.split()[-1] for error in errors] == ["text.", "text.", "text.", "empty.", None]


def test_json_keeps_its_spelling(classifier: Classifier, tmp_path: Path) -> None:
    lines = ['{"text": "film", "n": 1.10, "big": 123456789012345678901234567890.50 }', "{ }", '{"text": "\\u00fc"}']
    (tmp_path / "in.jsonl").write_text("\ufeff" + "\r\n\r\n".join(lines), encoding="utf-8")
    run(classifier, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    found = (tmp_path / "out.jsonl").read_text().splitlines()
    assert found[0].startswith('{"text": "film", "n": 1.10, "big": 123456789012345678901234567890.50, "label": ')
    assert found[1].startswith('{"label": null')
    assert found[2].startswith('{"text": "\\u00fc", "label": ')


def test_parquet_keeps_its_types(classifier: Classifier, tmp_path: Path) -> None:
    kept = pa.table(
        {
            "text": pa.array(["film", "good", "film"]).dictionary_encode(),
            "when": pa.array([1, 2, None], pa.timestamp("us", "UTC")),
            "parts": pa.array([[1], [], None], pa.list_(pa.int8())),
        }
    )
    pq.write_table(kept, tmp_path / "in.parquet")
    run(classifier, tmp_path / "in.parquet", tmp_path / "out.parquet", chunk_rows=2)
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.select(["text", "when", "parts"]).cast(kept.schema).equals(kept)
    assert found.schema.field("when").type == pa.timestamp("us", "UTC")
    assert found.schema.field("tokens").type == pa.int32()


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_answer_never_takes_the_place_of_an_input_column(
    classifier: Classifier, tmp_path: Path, ending: str
) -> None:
    row = {"text": "film", "label": "mine", "predicted_label": "older", "tokens": "9"}
    run(classifier, write(tmp_path / f"in{ending}", [row]), tmp_path / f"out{ending}")
    renamed = {"label": "predicted_predicted_label", "tokens": "predicted_tokens"}
    (found,) = read(tmp_path / f"out{ending}")
    assert list(found) == [*row, *(renamed.get(name, name) for name in ANSWER)]
    assert {name: str(found[name]) for name in row} == row
    assert found["predicted_predicted_label"] in ("good", "bad")


def test_a_later_record_with_a_field_of_an_answers_name_is_named(classifier: Classifier, tmp_path: Path) -> None:
    lines = ['{"text": "film"}'] * 1500 + ['{"text": "film", "score": 3}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"line 1501: here is a field 'score'"):
        run(classifier, tmp_path / "in.jsonl", tmp_path / "out.jsonl", chunk_rows=500)


def test_a_text_that_the_model_fails_on_does_not_fail_its_neighbours(classifier: Classifier, tmp_path: Path) -> None:
    def predict(texts: Sequence[str]) -> Answers:
        failed = EngineError("The model gave a figure that is not a number.")
        return [failed if text == "three" else one for text, one in zip(texts, classifier.predict(texts), strict=True)]

    source = Input(str(write(tmp_path / "in.csv", [{"text": text} for text in ("one", "two", "three", "a", "the")])))
    score_rows(source, Output(str(tmp_path / "out.csv"), source, shard=0, shards=1), predict, model_version="v")
    found = read(tmp_path / "out.csv")
    assert [row["error"] for row in found] == [None, None, "The model gave a figure that is not a number.", None, None]


def test_a_damaged_model_is_no_texts_fault(tmp_path: Path) -> None:
    def predict(texts: Sequence[str]) -> list[Prediction]:
        raise StoreError("damaged")

    source = Input(str(write(tmp_path / "in.csv", [{"text": "one"}, {"text": "two"}])))
    parts = Output(str(tmp_path / "out.csv"), source, shard=0, shards=1)
    with pytest.raises(StoreError, match="damaged"):
        score_rows(source, parts, predict, model_version="v")


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 29])
def test_chunks_lose_and_repeat_nothing_at_their_edges(
    classifier: Classifier, tmp_path: Path, ending: str, count: int
) -> None:
    source = write(tmp_path / f"in{ending}", [{"id": str(row), "text": "film"} for row in range(max(1, count))])
    if count == 0:
        content = pq.read_table(source)[:0] if ending == ".parquet" else source.read_text().splitlines()[0]
        if ending == ".parquet":
            pq.write_table(content, source)
        else:
            source.write_text("" if ending == ".jsonl" else f"{content}\n")
    run(classifier, source, tmp_path / f"out{ending}")
    assert [row["id"] for row in read(tmp_path / f"out{ending}")] == [str(row) for row in range(count)]
    run(classifier, source, tmp_path / "parts")
    parts = sorted((tmp_path / "parts").glob("part-*"))
    assert len(parts) == max(1, -(-count // 4))  # no rows are a part, too: a table without rows has columns
    if ending != ".jsonl":
        schema = pq.read_schema if ending == ".parquet" else lambda path: path.read_text().splitlines()[0]
        assert schema(parts[0]) == schema(tmp_path / f"out{ending}")


@pytest.mark.parametrize("ending", ENDINGS)
def test_shards_together_score_every_row_once(classifier: Classifier, tmp_path: Path, ending: str) -> None:
    names = [f"{index:02}" for index in range(30)]
    for number, some in enumerate((names[:13], names[13:14], names[14:])):
        write(tmp_path / "in" / f"{number}{ending}", [{"id": name, "text": "film"} for name in some])
    (tmp_path / "in" / "_SUCCESS").touch()
    for shard in (1, 0, 2):
        run(classifier, tmp_path / "in", tmp_path / "out", shard=shard, shards=3)
    parts = sorted(tmp_path.glob(f"out/part-*{ending}"), key=lambda path: path.name.split("-")[2])
    assert [row["id"] for part in parts for row in read(part)] == names
    assert {path.name[:10] for path in parts} == {"part-00000", "part-00001", "part-00002"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {MANIFEST, *(path.name for path in parts)}


def test_a_second_run_scores_only_what_is_missing(classifier: Classifier, engine: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", [{"text": f"film {index}"} for index in range(20)])
    run(classifier, source, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "part-00000-00000002.csv").unlink()
    (tmp_path / "out" / ".part-00000-00000002.csv-0badcafe").write_text("half")
    engine.batches.clear()
    run(classifier, source, tmp_path / "out")
    assert sum(map(len, engine.batches)) == 4
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_parts_of_another_job_are_never_mixed_in(classifier: Classifier, tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", [{"text": "film", "body": "good"}])
    run(classifier, source, tmp_path / "out", text_column="text")
    with pytest.raises(StoreError, match="model_version differ"):
        run(classifier, source, tmp_path / "out", text_column="text", model_version="another")
    with pytest.raises(StoreError, match="text_column differ"):
        run(classifier, source, tmp_path / "out", text_column="body")
    with pytest.raises(StoreError, match="shards differ"):
        run(classifier, source, tmp_path / "out", text_column="text", shards=2)
    with pytest.raises(StoreError, match="long_text differ"):
        run(classifier, source, tmp_path / "out", text_column="text", how={"long_text": "window"})
    write(source, [{"text": "film", "body": "goods"}])
    with pytest.raises(StoreError, match="input differ"):
        run(classifier, source, tmp_path / "out", text_column="text")
    (tmp_path / "out" / MANIFEST).unlink()
    with pytest.raises(StoreError, match="no manifest"):
        run(classifier, source, tmp_path / "out", text_column="text")


@pytest.mark.parametrize("ending", ENDINGS)
def test_urls_are_read_and_written(classifier: Classifier, tmp_path: Path, ending: str) -> None:
    files = fsspec.filesystem("memory")
    rows = [{"id": str(index), "text": "film"} for index in range(10)]
    for number in range(2):
        content = write(tmp_path / f"{number}{ending}", rows[number * 5 :][:5]).read_bytes()
        files.pipe_file(f"/{tmp_path.name}/in/{number}{ending}", content)
    url = f"memory://{tmp_path.name}"
    try:
        run(classifier, f"{url}/in", f"{url}/out{ending}")
        assert [row["id"] for row in parse(files.cat_file(f"/{tmp_path.name}/out{ending}"), ending)] == list(
            "0123456789"
        )
        assert not files.exists(f"/{tmp_path.name}/out{ending}.parts")
        run(classifier, f"{url}/in", (tmp_path / "out").as_uri())
        parts = sorted((tmp_path / "out").glob("part-*"))
        assert [row["id"] for part in parts for row in read(part)] == list("0123456789")
    finally:
        files.rm(f"/{tmp_path.name}", recursive=True)


def test_a_file_from_the_web_is_scored(classifier: Classifier, tmp_path: Path, web: tuple[str, Path]) -> None:
    address, folder = web
    write(folder / "in.csv", [{"text": "film"}] * 10)
    run(classifier, f"{address}/in.csv?signature=secret", tmp_path / "out.csv")
    assert len(read(tmp_path / "out.csv")) == 10
    with pytest.raises(DataError, match="cannot be read") as caught:
        Input(f"{address}/none.csv?signature=secret")
    assert f"{address}/none.csv" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.csv", b"", "is empty"),
        ("in.csv", b"a,b,c\n1,2,3\n", "which column holds the text.*TEXT_COLUMN"),
        ("in.jsonl", b'[["a"]]\n', "no record"),
        ("in.parquet", b"PAR1 no", "cannot be read"),
        ("in.txt", b"film\n", "cannot read .txt"),
        ("none/in.csv", None, "cannot be read"),
    ],
)
def test_an_input_that_cannot_be_read_is_a_data_error(
    classifier: Classifier, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        run(classifier, tmp_path / name, tmp_path / "out")
    assert str(tmp_path / name) in str(caught.value)


def test_a_folder_holds_one_kind_of_file_with_one_set_of_columns(classifier: Classifier, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match=r"no \.csv"):
        Input(str(tmp_path / "in"))
    write(tmp_path / "in" / "a.csv", [{"text": "film"}])
    write(tmp_path / "in" / "b.csv", [{"text": "film", "id": "1"}])
    with pytest.raises(DataError, match=r"b\.csv has the columns text \(text\), id \(text\); .*a\.csv has"):
        Input(str(tmp_path / "in"))
    write(tmp_path / "in" / "b.jsonl", [{"text": "film"}])
    with pytest.raises(DataError, match=r"\.csv, \.jsonl"):
        Input(str(tmp_path / "in"))


def test_bytes_are_no_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [b"film"]}), tmp_path / "in.parquet")
    with pytest.raises(DataError, match="holds binary"):
        Input(str(tmp_path / "in.parquet"))


def test_an_output_that_does_not_go_with_the_input_is_refused(tmp_path: Path) -> None:
    source = Input(str(write(tmp_path / "in" / "in.csv", [{"text": "film"}])))
    folder = Input(str(tmp_path / "in"))
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    (tmp_path / "link.csv").symlink_to(tmp_path / "in" / "in.csv")
    for output, rows, shards, message in [
        (tmp_path / "out.jsonl", source, 1, r"should end with \.csv"),
        (tmp_path / "out.csv", source, 2, "SHARDS=2"),
        (tmp_path / "folder.csv", source, 1, "is a folder"),
        (tmp_path / "in" / "in.csv", source, 1, "is in INPUT"),
        (tmp_path / "in", folder, 1, "is in INPUT"),
        (tmp_path / "in" / "out.csv", folder, 1, "is in INPUT"),
        (tmp_path / "in" / ".." / "in" / "in.csv", source, 1, "is in INPUT"),
        (tmp_path / "link" / "in.csv", source, 1, "is in INPUT"),
        (tmp_path / "link", folder, 1, "is in INPUT"),
        (tmp_path / "in" / "in.csv", Input(str(tmp_path / "link.csv")), 1, "is in INPUT"),
    ]:
        with pytest.raises(SettingsError, match=message):
            Output(str(output), rows, shard=0, shards=shards)
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["in.csv"]


def test_an_output_that_cannot_be_written_is_a_store_error(classifier: Classifier, tmp_path: Path, disk: Any) -> None:
    source = write(tmp_path / "in.csv", [{"text": "film"}] * 10)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be written"):
        run(classifier, source, tmp_path / "file" / "out.csv")
    with pytest.raises(StoreError, match="cannot be written"):
        run(classifier, source, "nonsense://out")
    disk.fill()
    with pytest.raises(StoreError, match="No space left"):
        run(classifier, source, disk.path / "out")


def test_the_shard_is_what_is_set_or_what_kubernetes_says() -> None:
    four = {"SHARDS": "4"}
    assert choose_shard(Settings.from_environ(four), {}) == 0
    assert choose_shard(Settings.from_environ(four), {"JOB_COMPLETION_INDEX": "3"}) == 3
    assert choose_shard(Settings.from_environ(four | {"SHARD": "1"}), {"JOB_COMPLETION_INDEX": "3"}) == 1
    for variables, environ, message in [
        ({"SHARD": "4"}, {}, "SHARD=4 is no shard of SHARDS=4"),
        ({}, {"JOB_COMPLETION_INDEX": "4"}, "JOB_COMPLETION_INDEX=4"),
        ({}, {"JOB_COMPLETION_INDEX": "-1"}, "JOB_COMPLETION_INDEX=-1"),
        ({}, {"JOB_COMPLETION_INDEX": "x"}, "JOB_COMPLETION_INDEX=x"),
    ]:
        with pytest.raises(SettingsError, match=message):
            choose_shard(Settings.from_environ(four | variables), environ)


@pytest.mark.parametrize(
    ("variables", "message"),
    [({}, "INPUT and OUTPUT"), ({"INPUT": "a.csv"}, "wants OUTPUT"), ({"OUTPUT": "a.csv"}, "wants INPUT")],
)
def test_predict_names_what_it_lacks(variables: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        score(Settings.from_environ(variables), threads=1, environ={})
