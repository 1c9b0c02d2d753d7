"""A job's environment file: by Docker's rules it is read back as it was written; what must not be kept is refused."""

from pathlib import Path

import pytest

from tuneserve.env_file import MAX_LINE_BYTES, read_env_file, write_env_file
from tuneserve.errors import SettingsError
from tuneserve.settings import Settings

SPACED = ["a b", " a ", "\ta", "a\u2028b\x85c", ""]
QUOTED = ['"a b"', '"a # b"', "'a", 'a"b', "\\n$A`b`"]


@pytest.mark.parametrize("value", [*SPACED, *QUOTED, "#a", "a#b", "a=b=c", "=", "Größe – 価格"])
def test_a_value_is_read_back_as_it_was_written(tmp_path: Path, value: str) -> None:
    chosen = {"N_EPOCHS": "2", "TEXT_COLUMN": value, "LR": "5e-5"}
    write_env_file(tmp_path / "job.env", chosen)
    assert read_env_file(tmp_path / "job.env") == chosen
    assert list(read_env_file(tmp_path / "job.env")) == list(chosen)


def test_the_file_holds_a_comment_and_what_was_chosen(tmp_path: Path) -> None:
    write_env_file(tmp_path / "job.env", {"SEED": "7", "LR": "1e-4"})
    comment, *lines = (tmp_path / "job.env").read_text().splitlines()
    assert comment.startswith("#")
    assert "--env-file" in comment
    assert lines == ["SEED=7", "LR=1e-4"]


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"LEARNING_SPEED": "1"}, "LEARNING_SPEED: the job has no such variable"),
        ({"lr": "1e-4"}, "lr: the job has no such variable"),
        ({"HF_TOKEN": "hf_secret"}, "HF_TOKEN: the job has no such variable"),
        ({"API_KEY": "a-secret-key"}, "API_KEY: a secret"),
        ({"MLFLOW_TRACKING_URI": "http://host:5000"}, "MLFLOW_TRACKING_URI: a secret"),
        ({"DATASET": "https://me:a-secret-key@host/data.csv"}, "DATASET: a secret"),
        ({"DATASET": '"https://host/data.csv?sig=a-secret-key"'}, "DATASET: a secret"),
        ({"TEXT_COLUMN": "a\nAPI_KEY=b"}, "TEXT_COLUMN: its value holds a line break"),
        ({"TEXT_COLUMN": "a\r"}, "TEXT_COLUMN: its value holds a line break"),
        ({"TEXT_COLUMN": "a\0b"}, "NUL"),
        ({"TEXT_COLUMN": "é" * (MAX_LINE_BYTES // 2)}, "TEXT_COLUMN: its line is longer"),
        ({"TEXT_COLUMN": "\udc80"}, "TEXT_COLUMN is not UTF-8"),
        ({"LR": "fast"}, "LR='fast' is not a number"),
        ({"LR": "1e-4 # the best"}, "LR: ` #` in a value"),
        ({"MODEL": "a", "MODELS": "b"}, "MODEL and MODELS"),
    ],
)
def test_what_does_not_belong_into_the_file_is_refused_and_nothing_is_written(
    tmp_path: Path, chosen: dict[str, str], said: str
) -> None:
    (tmp_path / "job.env").write_text("SEED=1\n")
    with pytest.raises(SettingsError) as refused:
        write_env_file(tmp_path / "job.env", {"N_EPOCHS": "2", **chosen})
    assert said in str(refused.value)
    assert "secret-key" not in str(refused.value)
    assert (tmp_path / "job.env").read_text() == "SEED=1\n"


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as refused:
        write_env_file(tmp_path / "job.env", {"API_KEY": "k", "SPEED": "1", "TEXT_COLUMN": "a\nb", "SEED": "1"})
    _, *lines = str(refused.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["API_KEY", "SPEED", "TEXT_COLUMN"]


def test_the_longest_line_is_written_and_read(tmp_path: Path) -> None:
    chosen = {"TEXT_COLUMN": "a" * (MAX_LINE_BYTES - len("TEXT_COLUMN="))}
    write_env_file(tmp_path / "job.env", chosen)
    assert read_env_file(tmp_path / "job.env") == chosen


def test_a_file_is_read_as_docker_reads_it(tmp_path: Path) -> None:
    (tmp_path / "job.env").write_bytes(
        b"\xef\xbb\xbf# a comment\r\n\n  \t\n  #another\n  LR=1e-4\r\n"
        b'TEXT_COLUMN= "a" # b \nLR=5e-5\nOTHER=\nHOST=a\rb\r\nSEED=7'
    )
    found = {"LR": "5e-5", "TEXT_COLUMN": ' "a" # b ', "OTHER": "", "HOST": "a\rb", "SEED": "7"}
    assert read_env_file(tmp_path / "job.env") == found


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"LR", "NAME=value"),
        (b"=1", "NAME=value"),
        (b"LR =1", "NAME=value"),
        (b"export LR=1", "NAME=value"),
        (b"LR=\xff", "UTF-8"),
        (b"LR=" + b"1" * (MAX_LINE_BYTES - 2), "longer"),
    ],
)
def test_a_line_that_docker_refuses_or_completes_is_named(tmp_path: Path, line: bytes, said: str) -> None:
    (tmp_path / "job.env").write_bytes(b"SEED=7\n" + line + b"\n")
    with pytest.raises(SettingsError, match=said) as refused:
        read_env_file(tmp_path / "job.env")
    assert "job.env, line 2 " in str(refused.value)


def test_what_was_written_gives_the_settings_that_were_chosen(tmp_path: Path) -> None:
    chosen = {"DATASET": "data/my texts.csv", "LR": "5e-5", "LABEL_COLUMN": '"the # label"'}
    write_env_file(tmp_path / "job.env", chosen)
    settings = Settings.from_environ(read_env_file(tmp_path / "job.env"))
    assert (settings.dataset, settings.lr, settings.label_column) == ("data/my texts.csv", 5e-5, "the # label")
