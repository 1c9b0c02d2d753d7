"""Runs that are followed: event files read back as TensorBoard reads them, and a real MLflow server over SQLite."""

import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from transformers import AutoModelForSequenceClassification
from wire import wait_until

from tuneserve.artifact import Version
from tuneserve.errors import SettingsError
from tuneserve.lifecycle.store import Store
from tuneserve.settings import PROJECT, Settings
from tuneserve.training import mlflow_run
from tuneserve.training.trackers import Trackers, open_trackers, require_extra

SERVER = Path(sys.prefix) / "mlflow-server" / "bin" / "mlflow"
PARAMETERS = {"lr": 3e-5, "n_epochs": 2, "dataset": "sample", "text_column": ""}
TEST = {"accuracy": 0.9, "log_loss": 0.3, "per_class": {"good": {"f1": 0.9}}}


class Server:
    """An MLflow server that may be killed, held and started again; what it was told is in an SQLite file."""

    def __init__(self, folder: Path) -> None:
        assert SERVER.exists(), "the tests' MLflow server is not installed: run `make .venv/.mlflow-server`"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = {
            "--backend-store-uri": f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination": str(self.folder / "artifacts"),
            **{"--host": "127.0.0.1", "--port": str(self.port), "--workers": "1"},
        }
        environment = {
            **{"PATH": os.environ["PATH"], "HOME": str(self.folder), "OMP_NUM_THREADS": "1"},
            **{"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        }
        command = [SERVER, "server", *(word for option in options.items() for word in option)]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        wait_until(self.answers)

    def answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "server.log").read_text()
        try:
            return httpx.get(f"{self.uri}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None:
            self.send(signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.kill()


@pytest.fixture
def server(machine: Server) -> Server:
    if machine.process is None:
        machine.start()
    return machine


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test begins without MLflow's variables, and sends often."""
    for name in ("TIMEOUT", "MAX_RETRIES"):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "")  # so that it is put back
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}")
    monkeypatch.setattr(mlflow_run, "EVERY_S", 0.1)


@pytest.fixture
def opened(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Trackers]:
    """Trackers of a run that is called like its test, each time as a new process would open them."""

    def opened(uri: str = "") -> Trackers:
        return open_trackers(
            log_path=tmp_path / "logs",
            run_name="run",
            mlflow_tracking_uri=uri,
            mlflow_experiment=f"team/{name_of(request)}",
            memory=tmp_path / "checkpoints" / "mlflow-run",
        )

    return opened


def name_of(request: pytest.FixtureRequest) -> str:
    return re.sub(r"\W", "-", request.node.name)


@pytest.fixture
def version(tmp_path: Path) -> Version:
    folder = tmp_path / "versions" / "20260102T030405Z-0a1b2c3d"
    (folder / "report").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    (folder / "report" / "test.json").write_text("{}")
    return Version(folder, {"metrics": {"test": TEST}})


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Each figure's points as TensorBoard would draw them."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(point.step, round(point.value, 4)) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


@pytest.fixture
def runs(machine: Server, request: pytest.FixtureRequest) -> Callable[[], list[Any]]:
    """What the server holds of this test's experiment."""

    def runs() -> list[Any]:
        client = MlflowClient(machine.uri)
        experiment = client.get_experiment_by_name(f"team/{name_of(request)}")
        return list(client.search_runs([experiment.experiment_id])) if experiment else []

    return runs


def history(server: Server, run: Any, figure: str) -> list[tuple[int, float]]:
    points = MlflowClient(server.uri).get_metric_history(run.info.run_id, figure)
    return sorted((point.step, point.value) for point in points)


def warnings(caplog: pytest.LogCaptureFixture, about: str = "") -> list[str]:
    """What was warned of this server; threads of an earlier test may still say something of theirs."""
    found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [message for message in found if about in message]


def figures(step: int) -> Mapping[str, float]:
    return {"loss": 1 / step, "learning_rate": 0.001 * step}


def run_until(end: BaseException, trackers: Trackers, parameters: Mapping[str, Any]) -> None:
    """Follow a run of three steps, after which this happens."""
    with trackers:
        trackers.start(parameters)
        for step in (1, 2, 3):
            trackers.record(step, figures(step))
        raise end


def record(trackers: Trackers, steps: range) -> None:
    """Record these steps, some milliseconds apart, so that several batches of figures are sent meanwhile."""
    for step in steps:
        trackers.record(step, figures(step))
        time.sleep(0.002)


def test_tensorboard_shows_each_figure_at_its_step(
    opened: Callable[..., Trackers], version: Version, tmp_path: Path
) -> None:
    with opened() as trackers:
        trackers.start(PARAMETERS)
        for step in (1, 2, 3, 4):
            trackers.record(step, figures(step))
        trackers.record(4, {"validation_accuracy": 0.75})
        trackers.finish(version)
    found = curves(tmp_path / "logs" / "tensorboard" / "run")
    assert found == {
        "loss": [(1, 1.0), (2, 0.5), (3, 0.3333), (4, 0.25)],
        "learning_rate": [(1, 0.001), (2, 0.002), (3, 0.003), (4, 0.004)],
        "validation_accuracy": [(4, 0.75)],
        "test_accuracy": [(4, 0.9)],
        "test_log_loss": [(4, 0.3)],
    }


def test_tensorboard_shows_the_parameters(opened: Callable[..., Trackers], tmp_path: Path) -> None:
    with opened() as trackers:
        trackers.start(PARAMETERS)
        trackers.record(1, {"loss": 1.0})
    events = EventAccumulator(str(tmp_path / "logs" / "tensorboard" / "run"))
    events.Reload()
    (text,) = events.Tensors("parameters/text_summary")
    assert b"| lr | 3e-05 |\n| n_epochs | 2 |" in text.tensor_proto.string_val[0]


def test_a_resumed_run_goes_on_in_the_same_curves(opened: Callable[..., Trackers], tmp_path: Path) -> None:
    for steps, loss in ((range(1, 6), 1.0), (range(4, 8), 2.0)):  # killed after 5, the checkpoint was made after 3
        with opened() as trackers:
            trackers.start(PARAMETERS)
            for step in steps:
                trackers.record(step, {"loss": loss})
    folder = tmp_path / "logs" / "tensorboard" / "run"
    assert len(list(folder.iterdir())) == 2
    assert curves(folder) == {"loss": [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0), (7, 2.0)]}


def test_a_folder_that_cannot_be_written_is_said_once(
    opened: Callable[..., Trackers], version: Version, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    with opened() as trackers:
        trackers.start(PARAMETERS)
        for step in (1, 2, 3):
            trackers.record(step, {"loss": 1.0})
        trackers.finish(version)
    (said,) = warnings(caplog)
    assert said.startswith(f"TensorBoard in {tmp_path}/logs/tensorboard/run was not told all of this run")


def test_a_disk_that_stops_for_a_while_is_not_waited_for(
    opened: Callable[..., Trackers], version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written, goes_on = RecordWriter.write, [], threading.Event()

    def write_once_it_goes_on(writer: RecordWriter, event: bytes) -> None:
        if not goes_on.wait(20):
            goes_on.set()  # who waits for it has waited long enough to be seen
        write(writer, event)
        written.append(event)

    with opened() as trackers:
        trackers.start(PARAMETERS)
        trackers.record(1, figures(1))  # torch's part of TensorBoard is imported
        monkeypatch.setattr(RecordWriter, "write", write_once_it_goes_on)
        record(trackers, range(2, 102))
        assert not written  # all is recorded, and the disk has taken nothing yet
        goes_on.set()
        trackers.finish(version)
    assert len(curves(tmp_path / "logs" / "tensorboard" / "run")["loss"]) == 101


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_a_disk_that_is_full_does_not_end_the_run(
    disk: Any, tmp_path: Path, version: Version, caplog: pytest.LogCaptureFixture
) -> None:
    threads = threading.active_count()
    options = {"run_name": "run", "mlflow_tracking_uri": "", "mlflow_experiment": "x", "memory": tmp_path / "memory"}
    with open_trackers(log_path=disk.path, **options) as trackers:
        trackers.start(PARAMETERS)
        trackers.record(1, {"loss": 1.0})
        disk.fill()
        for step in range(2, 200):
            trackers.record(step, {"loss": 1.0})
        trackers.finish(version)
    (said,) = warnings(caplog)
    assert "No space left on device" in said
    wait_until(lambda: threading.active_count() == threads)


def test_without_tensorboard_there_is_a_line_in_the_log_and_no_folder(
    opened: Callable[..., Trackers],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with opened() as trackers:
        trackers.start(PARAMETERS)
        trackers.record(1, {"loss": 1.0})
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "TensorBoard" in caplog.text
    assert not (tmp_path / "logs").exists()


def test_mlflow_without_its_client_ends_the_job(
    opened: Callable[..., Trackers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(SettingsError, match=r"MLFLOW_TRACKING_URI=http://host:5000 .*pip install -r .*trackers\.txt"):
        opened("http://me:secret@host:5000")
    require_extra("")


@pytest.mark.parametrize("uri", ["mlflow:5000", "sqlite:///mlflow.db", "mlruns"])
def test_what_is_no_servers_address_ends_the_job(opened: Callable[..., Trackers], uri: str) -> None:
    with pytest.raises(SettingsError, match=rf"MLFLOW_TRACKING_URI={uri} is not the address"):
        opened(uri)


def test_mlflow_has_the_parameters_the_figures_and_the_model(
    server: Server,
    opened: Callable[..., Trackers],
    runs: Callable[[], list[Any]],
    version: Version,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    for _ in range(2):  # the second run is a run of its own, and its model another version
        with opened(server.uri) as trackers:
            trackers.start(PARAMETERS)
            for step in range(1, 31):
                trackers.record(step, figures(step))
                time.sleep(0.01)
            trackers.record(30, {"validation_accuracy": 0.75})
            trackers.finish(version)
    run, first = runs()
    assert run.info.status == first.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params == {"lr": "3e-05", "n_epochs": "2", "dataset": "sample", "text_column": ""}
    assert history(server, run, "loss") == [(step, 1 / step) for step in range(1, 31)]
    assert history(server, run, "learning_rate") == [(step, 0.001 * step) for step in range(1, 31)]
    assert history(server, run, "validation_accuracy") == [(30, 0.75)]
    assert {name: value for name, value in run.data.metrics.items() if name.startswith("test_")} == {
        "test_accuracy": 0.9,
        "test_log_loss": 0.3,
    }
    client = MlflowClient(server.uri)
    registered = {one.version: one for one in client.search_model_versions(f"name = '{name_of(request)}'")}
    assert sorted(registered, key=int) == ["1", "2"]
    assert registered["2"].run_id == run.info.run_id
    assert registered["2"].tags == {"version": version.id}
    assert registered["2"].status == "READY"
    assert registered["2"].source == f"{run.info.artifact_uri}/model"

    folder = Path(client.download_artifacts(run.info.run_id, "model", str(tmp_path)))
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == {
        path.relative_to(version.folder): path.read_bytes() for path in version.folder.rglob("*") if path.is_file()
    }


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(
    server: Server, opened: Callable[..., Trackers], runs: Callable[[], list[Any]], version: Version
) -> None:
    with pytest.raises(SystemExit):
        run_until(SystemExit(143), opened(server.uri), PARAMETERS | {"port": 8000})
    (run,) = runs()
    assert run.info.status == "KILLED"
    assert history(server, run, "loss") == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]

    with opened(server.uri) as trackers:
        trackers.start(PARAMETERS | {"port": 9000, "device": "cpu"})
        wait_until(lambda: runs()[0].info.status == "RUNNING")
        for step in (4, 5):
            trackers.record(step, figures(step))
        trackers.finish(version)
    (resumed,) = runs()
    assert resumed.info.run_id == run.info.run_id
    assert resumed.info.status == "FINISHED"
    assert resumed.data.params["port"] == "8000"
    assert resumed.data.params["device"] == "cpu"
    assert history(server, resumed, "loss") == [(step, 1 / step) for step in range(1, 6)]


@pytest.mark.parametrize("remembered", ["0" * 32, "torn"])
def test_a_run_that_the_server_does_not_know_begins_anew(
    server: Server, opened: Callable[..., Trackers], runs: Callable[[], list[Any]], tmp_path: Path, remembered: str
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mlflow-run").write_text(remembered)
    with opened(server.uri) as trackers:
        trackers.start(PARAMETERS)
        trackers.record(1, {"loss": 1.0})
    (run,) = runs()
    assert (tmp_path / "checkpoints" / "mlflow-run").read_text() == run.info.run_id
    assert run.data.metrics == {"loss": 1.0}


def test_a_run_that_ends_by_an_error_is_marked_as_failed(
    server: Server, opened: Callable[..., Trackers], runs: Callable[[], list[Any]]
) -> None:
    with pytest.raises(ZeroDivisionError):
        run_until(ZeroDivisionError(), opened(server.uri), PARAMETERS)
    (run,) = runs()
    assert run.info.status == "FAILED"
    assert history(server, run, "loss") == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]


def test_a_server_that_is_killed_and_comes_back_misses_nothing(
    server: Server,
    opened: Callable[..., Trackers],
    runs: Callable[[], list[Any]],
    version: Version,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with opened(server.uri) as trackers:
        trackers.start(PARAMETERS)
        record(trackers, range(1, 201))
        wait_until(lambda: [run for run in runs() if run.data.metrics])
        server.kill()
        record(trackers, range(201, 701))
        wait_until(lambda: warnings(caplog, server.uri))
        server.start()
        trackers.finish(version)
    (said,) = warnings(caplog, server.uri)
    assert said.startswith(f"MLflow at {server.uri} takes no figures")
    (run,) = runs()
    assert run.info.status == "FINISHED"
    assert history(server, run, "loss") == [(step, 1 / step) for step in range(1, 701)]


def test_a_server_that_hangs_is_not_waited_for(
    server: Server,
    opened: Callable[..., Trackers],
    runs: Callable[[], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3600")  # who waits for this server waits past the test's limit
    trackers = opened(server.uri)
    trackers.start(PARAMETERS)
    wait_until(runs)
    server.send(signal.SIGSTOP)
    try:
        record(trackers, range(1, 701))
        with pytest.raises(SystemExit):
            run_until(SystemExit(143), trackers, PARAMETERS)
    finally:
        server.send(signal.SIGCONT)
    (said,) = warnings(caplog, server.uri)
    assert said == f"MLflow at {server.uri} was not told all of this run: no answer within 3 s"


def test_a_server_that_is_not_there_costs_a_warning_and_no_curve(
    unreachable: str,
    opened: Callable[..., Trackers],
    version: Version,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(mlflow_run, "ANSWER_S", 1)
    with opened(unreachable.replace("://", "://me:hunter2@")) as trackers:
        trackers.start(PARAMETERS)
        record(trackers, range(1, 11))
        wait_until(lambda: warnings(caplog, unreachable))
        record(trackers, range(11, 200))
        assert len(warnings(caplog, unreachable)) == 1
        trackers.finish(version)
    running, end = warnings(caplog, unreachable)
    assert running.startswith(f"MLflow at {unreachable} takes no figures: ")
    assert running.endswith("Training goes on.")
    assert end.startswith(f"MLflow at {unreachable} was not told all of this run")
    assert "hunter2" not in caplog.text
    assert len(curves(tmp_path / "logs" / "tensorboard" / "run")["loss"]) == 199


def test_a_server_that_comes_late_has_the_run_from_its_beginning(
    machine: Server, opened: Callable[..., Trackers], runs: Callable[[], list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    machine.kill()
    with opened(machine.uri) as trackers:
        trackers.start(PARAMETERS)
        trackers.record(1, figures(1))
        wait_until(lambda: warnings(caplog, machine.uri))
        machine.start()
        trackers.record(2, figures(2))
    (run,) = runs()
    assert run.info.status == "FINISHED"
    assert run.data.params["lr"] == "3e-05"
    assert history(machine, run, "loss") == [(1, 1.0), (2, 0.5)]


def test_an_upload_that_fails_leaves_a_finished_run_and_says_so(
    server: Server,
    opened: Callable[..., Trackers],
    runs: Callable[[], list[Any]],
    version: Version,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (version.folder / "config.json").symlink_to("nowhere")
    with opened(server.uri) as trackers:
        trackers.start(PARAMETERS)
        trackers.record(1, figures(1))
        trackers.finish(version)
    (run,) = runs()
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test_accuracy"] == 0.9
    (said,) = warnings(caplog, server.uri)
    assert "config.json" in said
    assert not MlflowClient(server.uri).search_model_versions(f"run_id = '{run.info.run_id}'")


def test_the_trackers_load_nothing_before_they_are_used_and_report_to_nobody_else(
    server: Server, tmp_path: Path, python: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    code = f"""
import sys
from pathlib import Path
from tuneserve.training.trackers import open_trackers
here = Path({str(tmp_path)!r})
with open_trackers(
    log_path=here, run_name="run", mlflow_tracking_uri={server.uri!r}, mlflow_experiment="quiet", memory=here / "memory"
) as trackers:
    assert not {{"torch", "mlflow", "tensorboard"}} & set(sys.modules)
    trackers.start({{}})
    trackers.record(1, {{"loss": 1.0}})
from mlflow.telemetry import get_telemetry_client
assert get_telemetry_client() is None
"""
    done = python("-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""
    assert (tmp_path / "memory").exists()


def test_the_servers_address_is_a_secret() -> None:
    settings = Settings.from_environ({"MLFLOW_TRACKING_URI": "http://me:hunter2@host:5000"})
    assert settings.mlflow_tracking_uri.get_secret_value() == "http://me:hunter2@host:5000"
    assert "hunter2" not in f"{settings} {settings!r} {settings.public()}"


def start_job(environment: Mapping[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(PROJECT / "production" / "docker-res" / "run.py"), "train"],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_job_that_is_interrupted_is_one_run_to_its_trackers(
    server: Server,
    environment: dict[str, str],
    runs: Callable[[], list[Any]],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    uri = server.uri.replace("://", "://me:hunter2@")
    environment |= {"MLFLOW_TRACKING_URI": uri, "MLFLOW_EXPERIMENT_NAME": f"team/{name_of(request)}"}
    environment |= {"N_EPOCHS": "40", "LR": "1e-3"}
    job = start_job(environment)
    wait_until(lambda: list(tmp_path.glob("models/checkpoints/*/[0-9]*.safetensors")))
    job.terminate()
    printed, _ = job.communicate(timeout=240)
    assert job.returncode == 143, printed
    assert not [line for line in printed.splitlines() if "WARNING" in line and "tokens are unknown" not in line]
    (run,) = runs()
    assert run.info.status == "KILLED"

    job = start_job(environment | {"PORT": "9000"})
    printed, _ = job.communicate(timeout=240)
    assert job.returncode == 0, printed
    assert all(line.startswith("20") for line in printed.splitlines()), printed
    assert "hunter2" not in printed
    (run,) = runs()
    assert run.info.status == "FINISHED"
    version = Store(tmp_path / "models").champion()
    epochs = version.metadata["history"]
    an_epoch = math.ceil(sum(version.metadata["data"]["counts"]["train"].values()) / 16)
    steps = len(epochs) * an_epoch
    assert {step for step, _ in history(server, run, "loss")} == set(range(1, steps + 1))
    found = curves(tmp_path / "logs" / "tensorboard" / version.metadata["fingerprint"][:16])
    assert [step for step, _ in found["loss"]] == list(range(1, steps + 1))
    assert found["validation_accuracy"] == [
        (an_epoch * number, round(epoch["validation_accuracy"], 4)) for number, epoch in enumerate(epochs, start=1)
    ]
    assert run.data.metrics["test_accuracy"] == version.metadata["metrics"]["test"]["accuracy"]
    assert run.data.params["lr"] == "0.001"
    assert not {name for name in run.data.params if name == "api_key" or "uri" in name}
    assert not list(tmp_path.glob("models/checkpoints/*"))

    folder = MlflowClient(server.uri).download_artifacts(run.info.run_id, "model", str(tmp_path))
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.id2label == {0: "bad", 1: "good"}
