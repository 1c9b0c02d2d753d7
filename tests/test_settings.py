"""The environment: what is read from it, what is refused, and the two files that tell of it."""

import json
import math
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from tuneserve.env_file import read_env_file
from tuneserve.errors import SettingsError
from tuneserve.settings import PROJECT, Settings, unquote
from tuneserve.settings_docs import TABLE_MARKS, fill_table, render_config_env, render_table

RUN = PROJECT / "production" / "docker-res" / "run.py"
CONFIG = read_env_file(PROJECT / "config.env")
NAMES = [name.upper() for name in Settings.model_fields]
FLOATS = [name.upper() for name, field in Settings.model_fields.items() if field.annotation is float]
Python = Callable[..., "subprocess.CompletedProcess[str]"]

# Each: what is set, and what the message must say is right instead.
BAD = {
    "LR": ("abc", "a number, above 0"),
    "N_EPOCHS": ("0", "a whole number, at least 1"),
    "BATCH_SIZE": ("3.5", "a whole number, at least 1"),
    "NUM_TRAIN": ("-1", "a whole number, at least 0"),
    "VALID_PCT": ("10", "at most 0.5"),
    "TEST_PCT": ("0", "above 0"),
    "DROPOUT": ("1", "below 1"),
    "TRAIN_BODY": ("maybe", "`1` or `0`"),
    "DEVICE": ("gpu", "`auto` or `cpu` or `cuda`"),
    "PRECISION": ("fp16", "`auto` or `fp32` or `bf16`"),
    "CLASS_WEIGHTS": ("yes", "`none` or `balanced`"),
    "OMP_NUM_THREADS": ("many", "a whole number, at least 1 and at most 1024 or `auto`"),
    "PORT": ("65536", "at most 65535"),
    "SEED": ("4294967296", "below 4294967296"),
    "CORS_ORIGINS": ("https://a.example,b.example", "`*`, or origins"),
    "RETRAIN_SCHEDULE": ("0 3 * *", "five fields"),
    "RETRAIN_TIME_ZONE": ("Mars", "the name of a time zone"),
}


def test_an_empty_environment_gives_the_defaults() -> None:
    assert Settings.from_environ({}) == Settings()


@pytest.mark.parametrize("blank", ["", "  ", "\t"])
def test_an_empty_value_means_the_default(blank: str) -> None:
    assert Settings.from_environ(dict.fromkeys(NAMES, blank)) == Settings()


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("LR", "3e-5", 3e-5),
        ("LR", " 3e-5\n", 3e-5),
        ("LR", "1", 1.0),
        ("N_EPOCHS", "4", 4),
        ("TRAIN_BODY", "0", False),
        ("TRAIN_BODY", "1", True),
        ("TRAIN_BODY", "false", False),
        ("OMP_NUM_THREADS", "auto", "auto"),
        ("OMP_NUM_THREADS", "4", 4),
        ("VALID_PCT", "0.5", 0.5),
        ("DATASET", " owner/name:configuration ", "owner/name:configuration"),
        ("TEXT_COLUMN", "the text", "the text"),
        ("MODEL_PATH", "~/models", Path.home() / "models"),
        ("MODEL_PATH", "models", Path.cwd() / "models"),
        ("CORS_ORIGINS", "https://a.example:8443 , ,http://b.example", "https://a.example:8443,http://b.example"),
        ("CORS_ORIGINS", "*", "*"),
        ("RETRAIN_SCHEDULE", "0 3 * * 1", "0 3 * * 1"),
        ("RETRAIN_TIME_ZONE", "Europe/Berlin", "Europe/Berlin"),
    ],
)
def test_a_value_is_read_for_what_it_means(name: str, value: str, meant: object) -> None:
    read = getattr(Settings.from_environ({name: value}), name.lower())
    assert read == meant
    assert type(read) is type(meant)


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ('"/data/x.csv"', "/data/x.csv"),
        ("'/data/x.csv'", "/data/x.csv"),
        (' "/data/x.csv" ', "/data/x.csv"),
        ('"/data/run #3"', "/data/run #3"),
        ("\"/data/x.csv'", "\"/data/x.csv'"),
        ('"a" "b"', '"a" "b"'),
        ('"', '"'),
        ('""', "sample"),
        ("https://host/x#part", "https://host/x#part"),
    ],
)
def test_one_pair_of_quotes_is_taken_off(value: str, meant: str) -> None:
    assert Settings.from_environ({"DATASET": value}).dataset == meant


@pytest.mark.parametrize("name", NAMES)
def test_every_variable_may_stand_in_quotes(name: str) -> None:
    given = CONFIG[name] or {"MODEL_PATH": "/m", "DATA_PATH": "/d"}.get(name, "")
    for quote in "'\"":
        assert Settings.from_environ({name: f"{quote}{given}{quote}"}) == Settings.from_environ({name: given})


@pytest.mark.parametrize("value", ["hunter2 # the key", '"hunter2" # the key', "hunter2\t#"])
def test_a_comment_behind_a_value_is_refused_by_its_variables_name(value: str) -> None:
    for name in ("API_KEY", "DATASET", "LR"):
        with pytest.raises(SettingsError, match=f"{name}: ` #` in a value") as caught:
            Settings.from_environ({name: value})
    for told in str(caught.value).splitlines():
        assert "hunter2" not in told or told.strip().startswith("LR=")


def test_an_environment_file_with_quotes_is_read_and_said(tmp_path: Path, python: Python) -> None:
    quoted = {"MODEL_PATH": str(tmp_path / "m"), "API_KEY": "hunter2", "HF_TOKEN": "hunter3", "PET_NNODES": "1:2"}
    environ = {name: f'"{value}"' for name, value in quoted.items()} | {"PS1": '"$ "'}
    (tmp_path / "m").mkdir()
    done = python(RUN, "versions", **environ)
    assert done.stdout == f"There is no version in MODEL_PATH={tmp_path / 'm'} yet.\n"
    [said] = [line for line in done.stderr.splitlines() if "quotes" in line]
    assert said.endswith(": MODEL_PATH, API_KEY, HF_TOKEN, PET_NNODES")
    assert unquote(environ) == list(quoted)
    assert environ == quoted | {"PS1": '"$ "'}


def test_settings_do_not_change_once_they_are_read() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().lr = 1.0  # type: ignore[misc]


def test_every_bad_variable_is_named_at_once_with_its_value_and_what_is_right() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_environ({name: value for name, (value, _) in BAD.items()} | {"N_EPOCH": "3", "HOST": "localhost"})
    heading, *lines = str(caught.value).splitlines()
    assert "cannot be used" in heading
    assert len(lines) == len(BAD) + 1
    for name, (value, right) in BAD.items():
        (line,) = [line for line in lines if line.strip().startswith(f"{name}=")]
        assert repr(value) in line
        assert right in line
        assert f"default is {CONFIG[name]}" in line
    assert sum("N_EPOCH:" in line and "N_EPOCHS?" in line for line in lines) == 1


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", ["nan", "NaN", "inf", "-inf", "Infinity", "1e999"])
def test_a_number_is_finite(name: str, value: str) -> None:
    assert not math.isfinite(float(value))
    with pytest.raises(SettingsError, match=f"{name}='{value}' is not a number"):
        Settings.from_environ({name: value})


@pytest.mark.parametrize(
    ("name", "neighbour"),
    [
        ("N_EPOCH", "N_EPOCHS"),
        ("NUM_EPOCHS", "N_EPOCHS"),
        ("lr", "LR"),
        ("Batch_Size", "BATCH_SIZE"),
        ("BATCHSIZE", "BATCH_SIZE"),
        ("MODELPATH", "MODEL_PATH"),
        ("DATASETS", "DATASET"),
        ("API_KEYS", "API_KEY"),
    ],
)
def test_an_unknown_variable_is_named_with_its_neighbour(name: str, neighbour: str) -> None:
    with pytest.raises(
        SettingsError, match=rf"{name}: there is no such variable; did you mean {neighbour}\?"
    ) as caught:
        Settings.from_environ({name: "hunter2"})
    assert "hunter2" not in str(caught.value)  # it may be a secret


OTHERS = """
    PATH HOME USER LOGNAME LANG SHELL TERM PWD HOSTNAME HOSTTYPE MANPATH MODULEPATH PYTHONPATH LD_LIBRARY_PATH
    LOG_LEVEL LOG_DIR DATA_DIR MODEL_DIR SM_MODEL_DIR HF_HOME HF_TOKEN OPENAI_API_KEY NO_PROXY https_proxy
    CUDA_VISIBLE_DEVICES NVIDIA_VISIBLE_DEVICES KUBERNETES_PORT KUBERNETES_SERVICE_HOST SLURM_JOB_ID DB_PORT
    OMP_PROC_BIND OMP_THREAD_LIMIT OMP_MAX_ACTIVE_LEVELS MKL_NUM_THREADS OPENBLAS_NUM_THREADS NUMEXPR_NUM_THREADS
    RAYON_NUM_THREADS VECLIB_MAXIMUM_THREADS
    MLFLOW_TRACKING_USERNAME MLFLOW_TRACKING_PASSWORD MLFLOW_TRACKING_TOKEN MLFLOW_TRACKING_AUTH MLFLOW_EXPERIMENT_ID
    OTEL_EXPORTER_OTLP_TRACES_ENDPOINT OTEL_EXPORTER_OTLP_HEADERS OTEL_SERVICE_NAME
    MLFLOW_REGISTRY_URI MLFLOW_RUN_ID MLFLOW_S3_ENDPOINT_URL MLFLOW_HTTP_REQUEST_TIMEOUT
""".split()  # noqa: SIM905  (a list of names reads best as lines)


@pytest.mark.parametrize("name", OTHERS)
def test_variables_of_other_programs_are_none_of_ours(name: str) -> None:
    assert Settings.from_environ({name: "1"}) == Settings()


def test_the_api_key_is_never_shown() -> None:
    settings = Settings.from_environ({"API_KEY": "hunter2"})
    assert settings.api_key.get_secret_value() == "hunter2"
    for shown in (repr(settings), str(settings), str(settings.public()), settings.model_dump_json()):
        assert "hunter2" not in shown
    assert "api_key" not in settings.public()
    assert set(settings.public()) == set(Settings.model_fields) - {"api_key", "mlflow_tracking_uri"}


def test_an_error_does_not_show_the_api_key_beside_what_is_bad() -> None:
    with pytest.raises(SettingsError, match="LR='abc'") as caught:
        Settings.from_environ({"API_KEY": "hunter2", "LR": "abc"})
    assert "hunter2" not in str(caught.value)


def test_the_variables_that_users_rely_on_keep_their_names() -> None:
    promised = """
        LR N_EPOCHS BATCH_SIZE TRAIN_BODY NUM_TRAIN NUM_TEST NUM_MAX_POSITIONS VALID_PCT MAX_NORM SEED OMP_NUM_THREADS
        DATA_PATH LOG_PATH DATASET TEXT_COLUMN LABEL_COLUMN BASE_MODEL MODEL_PATH DEVICE PRECISION HOST PORT API_KEY
    """
    assert set(promised.split()) <= set(NAMES)


def test_every_variable_has_its_sentence() -> None:
    for name, field in Settings.model_fields.items():
        assert (field.description or "").endswith("."), name


def test_config_env_is_what_the_settings_render() -> None:
    assert (PROJECT / "config.env").read_text(encoding="utf-8") == render_config_env()


def test_config_env_as_docker_reads_it_gives_the_defaults() -> None:
    assert list(CONFIG) == NAMES
    assert Settings.from_environ(CONFIG) == Settings()


def test_the_table_in_the_docs_is_what_the_settings_render() -> None:
    page = (PROJECT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert all(page.count(mark) == 1 for mark in TABLE_MARKS), "configuration.md lacks the marks around its table"
    assert fill_table(page) == page


def test_a_table_that_drifted_is_filled_anew() -> None:
    begin, end = TABLE_MARKS
    page = "before\n{}{}{}\nafter\n"
    filled = fill_table(page.format(begin, "| `OLD` |\n", end))
    assert filled == page.format(begin, render_table(), end)
    assert all(filled.count(f"| `{name}` |") == 1 for name in NAMES)


def test_the_module_writes_config_env_and_the_table(tmp_path: Path, python: Python) -> None:
    package = tmp_path / "clone" / "production" / "docker-res" / "tuneserve"
    package.mkdir(parents=True)
    for name in ("__init__.py", "settings.py", "settings_docs.py", "errors.py", "redaction.py", "text.py"):
        shutil.copy(RUN.parent / "tuneserve" / name, package)
    page = tmp_path / "clone" / "docs" / "configuration.md"
    page.parent.mkdir()
    page.write_text("".join(TABLE_MARKS), encoding="utf-8")
    done = python("-m", "tuneserve.settings_docs", PYTHONPATH=str(package.parent))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "clone" / "config.env").read_text(encoding="utf-8") == render_config_env()
    assert render_table() in page.read_text(encoding="utf-8")


def test_a_bad_value_ends_the_job_at_once_before_anything_heavy_is_imported(python: Python) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = python("-X", "importtime", RUN, LR="abc", N_EPOCH="3")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert done.returncode == 2
    assert done.stdout == ""
    told = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert told[0].startswith("error: ")
    assert len(told) == 3
    assert "LR='abc'" in told[1]
    assert "N_EPOCHS" in told[2]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "pydantic" in imported
    assert not imported & {"torch", "transformers", "datasets", "numpy", "tokenizers", "fastapi", "uvicorn"}


def test_a_log_folder_that_cannot_be_written_ends_the_job(tmp_path: Path, python: Python) -> None:
    (tmp_path / "file").write_text("")
    done = python(RUN, "train", LOG_PATH=str(tmp_path / "file"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: LOG_PATH={tmp_path / 'file'} cannot be written to")


def test_a_password_in_a_url_is_not_shown() -> None:
    settings = Settings.from_environ({"DATASET": "ftp://me:secret@host/reviews.csv"})
    assert settings.dataset == "ftp://me:secret@host/reviews.csv"
    assert settings.public()["dataset"] == "ftp://host/reviews.csv"


@pytest.mark.parametrize("name", ["dataset", "base_model", "host", "mlflow_experiment_name"])
def test_no_name_is_empty(name: str) -> None:
    assert getattr(Settings.model_validate({name: "a"}), name) == "a"
    with pytest.raises(ValidationError, match=name):
        Settings.model_validate({name: ""})


def test_what_is_shown_of_the_settings_is_json() -> None:
    shown = Settings.from_environ({"MODEL_PATH": "/models", "OMP_NUM_THREADS": "4"}).public()
    assert json.loads(json.dumps(shown)) == shown
    assert (shown["model_path"], shown["omp_num_threads"], shown["lr"]) == ("/models", 4, 1e-4)


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(SettingsError, match="API_KEY is not UTF-8 text"):
        Settings.from_environ({"API_KEY": "\udcff"})
