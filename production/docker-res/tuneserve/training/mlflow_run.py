"""A run on an MLflow server, told by threads of its own: training never waits for the server, nor needs it."""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from tuneserve.artifact import Version
from tuneserve.logs import in_one_line
from tuneserve.redaction import redact_url

logger = logging.getLogger(__name__)

EVERY_S = 5.0
"""Seconds between two batches of figures."""
BATCH = 1000
"""Figures that a server takes at once."""
KEPT = 200_000
"""Figures kept while the server is away; the oldest go first."""
ANSWER_S, KILLED_S, UPLOAD_S = 10, 3, 600
"""The longest waits: for one answer, for the last when a signal came (Docker kills after 10 s), for a whole upload."""

Figure = tuple[str, float, int, int]
"""Name, value, milliseconds since 1970, step: a server that is sent one twice has it once."""


class MLflowRun:
    """Figures are kept until the server has taken them: it may be away for a while, also when the run begins."""

    def __init__(self, uri: str, experiment: str, run_name: str, memory: Path) -> None:
        self.name = f"MLflow at {redact_url(uri)}"
        self._uri, self._experiment, self._run_name, self._memory = uri, experiment, run_name, memory
        self._began_ms = _now_ms()
        self._parameters: Mapping[str, Any] = {}
        self._figures: list[Figure] = []
        self._sending: Future[None] = Future()
        self._underway = 0
        self._due = 0.0
        self._one_at_a_time = threading.Lock()
        self._client: Any = None
        self._run: Any = None
        self._silent = False

    def start(self, parameters: Mapping[str, Any]) -> None:
        """Look for the server."""
        self._parameters = parameters
        self._send_soon()

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        """Keep the figures, and now and then send what is kept."""
        now_ms = _now_ms()
        self._figures += [(name, float(value), now_ms, step) for name, value in figures.items()]
        if time.monotonic() >= self._due and self._sending.done():
            del self._figures[: self._underway if self._sending.exception() is None else -KEPT]
            self._send_soon()

    def finish(self, version: Version) -> None:
        """Send the figures that are left and the version's files, and register the model."""
        _within(2 * ANSWER_S, lambda: self._send(self._figures))
        try:
            _within(UPLOAD_S, lambda: self._deliver(version))
        finally:
            _within(ANSWER_S, lambda: self._client.set_terminated(self._run.info.run_id, "FINISHED"))

    def close(self, status: str) -> None:
        """Send the figures that are left, and how the run ended."""

        def say() -> None:
            self._send(self._figures)
            self._client.set_terminated(self._run.info.run_id, status)

        _within(KILLED_S if status == "KILLED" else 2 * ANSWER_S, say)

    def _send_soon(self) -> None:
        figures = list(self._figures)
        self._underway, self._due = len(figures), time.monotonic() + EVERY_S
        self._sending = _aside(lambda: self._send(figures))

    def _send(self, figures: list[Figure]) -> None:
        with self._one_at_a_time:
            try:
                if self._run is None:
                    self._open()
                from mlflow.entities import Metric

                for first in range(0, len(figures), BATCH):
                    metrics = [Metric(*figure) for figure in figures[first : first + BATCH]]
                    self._client.log_batch(self._run.info.run_id, metrics=metrics)
            except Exception as error:
                if not self._silent:
                    logger.warning("%s takes no figures: %s. Training goes on.", self.name, in_one_line(error))
                self._silent = True
                raise

    def _open(self) -> None:
        """Find the run that the memory names, or begin one."""
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # what a job does is its user's business
        os.environ["MLFLOW_CONFIGURE_LOGGING"] = "false"
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT
        from mlflow.exceptions import MlflowException

        # MLflow itself would wait for minutes. What fails here is tried again with the next figures.
        for variable, bound in ((MLFLOW_HTTP_REQUEST_TIMEOUT, ANSWER_S), (MLFLOW_HTTP_REQUEST_MAX_RETRIES, 0)):
            if not variable.is_set():
                variable.set(bound)
        self._client = client = MlflowClient(self._uri)
        run = None
        if self._memory.exists():
            try:
                run = client.get_run(self._memory.read_text(encoding="utf-8"))
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
        if run and run.info.lifecycle_stage == "active" and run.info.status != "FINISHED":
            client.update_run(run.info.run_id, "RUNNING")
        else:
            experiment = client.get_experiment_by_name(self._experiment)
            found = experiment.experiment_id if experiment else client.create_experiment(self._experiment)
            run = client.create_run(found, self._began_ms, run_name=self._run_name)
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            self._memory.write_text(run.info.run_id, encoding="utf-8")
        new = [Param(k, str(v)) for k, v in self._parameters.items() if k not in run.data.params]
        client.log_batch(run.info.run_id, params=new)  # those it has cannot be changed
        self._run = run
        logger.info("%s has this run as %s in %s", self.name, run.info.run_id, self._experiment)

    def _deliver(self, version: Version) -> None:
        from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT
        from mlflow.exceptions import MlflowException

        for variable, bound in ((MLFLOW_HTTP_REQUEST_TIMEOUT, 120), (MLFLOW_HTTP_REQUEST_MAX_RETRIES, 3)):
            variable.set(max(bound, variable.get()))  # a large file takes its time, and is sent only once
        run_id, name = self._run.info.run_id, self._experiment.rpartition("/")[2]
        self._client.log_artifacts(run_id, str(version.folder), "model")
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source, tags = f"{self._run.info.artifact_uri}/model", {"version": version.id}
        self._client.create_model_version(name, source, run_id, tags, await_creation_for=0)
        self._client.set_tag(run_id, "version", version.id)
        logger.info("%s has version %s", self.name, version.id)


def _aside(call: Callable[[], None]) -> "Future[None]":
    """Call in a thread that nobody has to wait for, not even the end of the process."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            call()
            future.set_result(None)
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _within(seconds: float, call: Callable[[], None]) -> None:
    future = _aside(call)
    try:
        future.result(seconds)
    except TimeoutError:
        if future.done():
            raise
        raise TimeoutError(f"no answer within {seconds:g} s") from None


def _now_ms() -> int:
    return int(time.time() * 1000)
