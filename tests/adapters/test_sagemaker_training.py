"""What SageMaker's training says in files, as this job's variables; and what is handed over."""

import json
from pathlib import Path
from typing import Any

import pytest

from tuneserve.adapters.sagemaker_training import FAILURE_CHARACTERS, RESOLVE_S, Training, read_hyperparameters, resolve
from tuneserve.errors import DataError, SettingsError, TrainingError
from tuneserve.settings import Settings

FILE = {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated", "RecordWrapperType": "None"}


class Job:
    """The platform's folder, as it is when a training starts."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.channels: dict[str, Any] = {}
        (base / "input" / "config").mkdir(parents=True)
        self.write("resourceconfig", {"current_host": "algo-1", "hosts": ["algo-1"], "network_interface_name": "eth0"})

    def write(self, name: str, content: Any) -> None:
        raw = content if isinstance(content, str) else json.dumps(content)
        (self.base / "input" / "config" / f"{name}.json").write_text(raw)

    def channel(self, name: str, **changed: str) -> None:
        self.channels[name] = FILE | changed
        self.write("inputdataconfig", self.channels)
        (self.base / "input" / "data" / name).mkdir(parents=True)

    def start(self, **environ: str) -> Training:
        return Training({"SAGEMAKER_BASE_DIR": str(self.base), **environ})

    def variables(self, **environ: str) -> dict[str, str]:
        return dict(self.start(**environ).variables())


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path / "ml")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"lr": "3e-5", "N_EPOCHS": "2"}, {"LR": "3e-5", "N_EPOCHS": "2"}),
        ({"base-model": '"./my base"', "seed": 7}, {"BASE_MODEL": "./my base", "SEED": "7"}),
        ({"train_body": "true", "use_feedback": "false", "keep_texts": True}, None),
        ({"label_column": '"3"', "text_column": "null", "dataset": '"s3://b/\\u00e4.csv"'}, None),
        ({"sagemaker_program": '"x.py"', "_tuning_objective_metric": "accuracy"}, {}),
        ({"label_column": "[1"}, {"LABEL_COLUMN": "[1"}),
    ],
)
def test_hyperparameters_are_read_with_and_without_their_json(given: dict[str, Any], found: Any) -> None:
    expected: dict[str, Any] = {
        "train_body": {"TRAIN_BODY": "1", "USE_FEEDBACK": "0", "KEEP_TEXTS": "true"},
        "label_column": {"LABEL_COLUMN": "3", "DATASET": "s3://b/ä.csv"},
    }
    read = read_hyperparameters(given)
    assert read == (found if found is not None else expected[next(iter(given))])
    Settings.from_environ(read)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("N_EPOCH", "N_EPOCH: there is no such hyperparameter; did you mean N_EPOCHS?"),
        ("learning_rate", "learning_rate: there is no such hyperparameter."),
        ("batchsize", "did you mean BATCH_SIZE?"),
        ("model_path", "model_path: there is no such hyperparameter"),
    ],
)
def test_an_unknown_hyperparameter_is_refused_with_the_near_miss(name: str, words: str) -> None:
    with pytest.raises(SettingsError) as refused:
        read_hyperparameters({name: "1", "lr": "1"})
    assert words in str(refused.value)
    assert "lr:" not in str(refused.value)


def test_channels_are_the_data_and_the_base_model(job: Job) -> None:
    job.channel("training")
    job.channel("validation")
    assert job.variables() == {
        "MODEL_PATH": str(job.base / "checkpoints"),
        "DATA_PATH": "/tmp/tuneserve",
        "DATASET": str(job.base / "input" / "data"),
    }
    job.channel("model")
    assert job.variables()["BASE_MODEL"] == str(job.base / "input" / "data" / "model")
    job.write("hyperparameters", {"base_model": "owner/name", "n_epochs": "1"})
    found = job.variables(DATA_PATH="/scratch", N_EPOCHS="9")
    assert (found["BASE_MODEL"], found["N_EPOCHS"], found["DATA_PATH"]) == ("owner/name", "1", "/scratch")


def test_channels_that_cannot_be_trained_on_are_refused_with_the_reason(job: Job) -> None:
    with pytest.raises(DataError, match=r"no channel train or training .the channels are: none"):
        job.variables()
    assert "DATASET" not in job.variables(DATASET="sample")
    job.channel("train", TrainingInputMode="Pipe")
    with pytest.raises(DataError, match=r"Channel train is in Pipe mode.*File or FastFile"):
        job.variables()
    job.write("inputdataconfig", {"train": FILE | {"TrainingInputMode": "FastFile"}})
    with pytest.raises(DataError, match="DATASET and the channel train"):
        job.variables(DATASET="sample")
    job.write("inputdataconfig", {"train": FILE | {"S3DistributionType": "ShardedByS3Key"}})
    job.variables()
    job.write("resourceconfig", {"current_host": "a", "hosts": ["a", "b"]})
    with pytest.raises(DataError, match=r"ShardedByS3Key.*FullyReplicated"):
        job.variables()


@pytest.mark.parametrize("content", ["[]", "{", "\x00"])
def test_a_broken_file_of_the_platform_is_named(job: Job, content: str) -> None:
    job.channel("train")
    job.write("hyperparameters", content)
    with pytest.raises(SettingsError, match=r"hyperparameters.json cannot be read"):
        job.variables()


def test_several_hosts_are_torchruns_nodes_and_the_first_hands_over(job: Job) -> None:
    job.channel("train")
    assert not any(name.startswith("PET_") for name in job.variables())
    for rank, here in enumerate(["algo-1", "algo-2"]):
        job.write(
            "resourceconfig",
            {"current_host": here, "hosts": ["algo-1", "algo-2"], "network_interface_name": "eth1"},
        )
        found = job.variables()
        assert {name: value for name, value in found.items() if name.startswith(("PET_", "NCCL_", "GLOO_"))} == {
            "PET_NNODES": "2",
            "PET_NODE_RANK": str(rank),
            "PET_MASTER_ADDR": "algo-1",
            "PET_MASTER_PORT": "7777",
            "NCCL_SOCKET_IFNAME": "eth1",
            "GLOO_SOCKET_IFNAME": "eth1",
        }
        start = job.start()
        start.variables()
        assert start.leads is (rank == 0)
    job.write("resourceconfig", {"current_host": "algo-9", "hosts": ["algo-1", "algo-2"]})
    with pytest.raises(SettingsError, match="algo-9"):
        job.variables()


def test_names_that_do_not_resolve_at_once_are_asked_for_again() -> None:
    asked, now = [], [0.0]

    def look_up(name: str) -> str:
        asked.append(name)
        if len(asked) < 5 or name == "never":
            raise OSError("not yet")
        return "10.0.0.1"

    def pause(seconds: float) -> None:
        now[0] += seconds

    resolve(["a", "b"], look_up=look_up, pause=pause, clock=lambda: now[0])
    assert asked == ["a"] * 5 + ["b"]
    with pytest.raises(TrainingError, match="The host never has no address after 300 s"):
        resolve(["never"], look_up=look_up, pause=pause, clock=lambda: now[0])
    assert RESOLVE_S <= now[0] < RESOLVE_S + 30


def test_a_version_is_handed_over_as_a_plain_folder_with_its_report_beside(job: Job, tmp_path: Path) -> None:
    version = tmp_path / "version"
    (version / "report").mkdir(parents=True)
    for name in ("config.json", "metadata.json", "decision.json", "report/test.csv"):
        (version / name).write_text(name)
    (job.base / "model").mkdir()
    job.start().hand_over(version)
    model, output = job.base / "model", job.base / "output" / "data"
    assert (model / "config.json").read_text() == "config.json"
    assert sorted(path.name for path in output.rglob("*") if path.is_file()) == [
        "decision.json",
        "metadata.json",
        "test.csv",
    ]


def test_a_failure_is_said_in_a_thousand_characters_and_gone_with_the_next_attempt(job: Job) -> None:
    failure = job.base / "output" / "failure"
    job.start().fail("x" * 5000)
    assert len(failure.read_text()) == FAILURE_CHARACTERS
    job.start()
    assert not failure.exists()
    job.start().fail("LR='x' is not a number.")
    assert failure.read_text() == "LR='x' is not a number."
