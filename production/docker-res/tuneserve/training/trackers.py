"""Who follows a run from outside: TensorBoard, by event files, and MLflow. Both are optional, and neither can do harm.

No step waits for a tracker and none fails because of one; what a tracker could not be told is said once in the log.
"""

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from tuneserve.artifact import Version
from tuneserve.errors import SettingsError
from tuneserve.extras import require
from tuneserve.logs import in_one_line
from tuneserve.redaction import redact_url
from tuneserve.training.mlflow_run import MLflowRun

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Follows one run. A method may raise: the tracker is then told nothing more."""

    @property
    def name(self) -> str:
        """What the log calls it."""

    def start(self, parameters: Mapping[str, Any]) -> None:
        """The run begins, or goes on."""

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures after so many optimizer steps."""

    def finish(self, version: Version) -> None:
        """The run has brought a version; nothing comes after it."""

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """The run has ended without a version."""


class Trackers:
    """The trackers of one run, as a context: an error or a signal that leaves it marks the run as FAILED or KILLED."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = list(trackers)
        self._step = 0

    def start(self, parameters: Mapping[str, Any]) -> None:
        """Tell what the run is made with; no secrets may be in it."""
        self._tell(lambda tracker: tracker.start(parameters))

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        """Tell figures after so many optimizer steps, counted from 1 through all epochs."""
        self._step = step
        self._tell(lambda tracker: tracker.record(step, figures))

    def finish(self, version: Version) -> None:
        """Tell the version's test figures, hand over its files, and mark the run as finished."""
        metrics = version.metadata["metrics"]["test"]
        self.record(self._step, {f"test_{k}": v for k, v in metrics.items() if isinstance(v, int | float)})
        self._tell(lambda tracker: tracker.finish(version))
        self._trackers.clear()

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed: Literal["FAILED", "KILLED"] = "FAILED" if isinstance(error, Exception) else "KILLED"
        self._tell(lambda tracker: tracker.close("FINISHED" if error is None else failed))
        self._trackers.clear()

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:  # whatever it is, a training is worth more
                logger.warning("%s was not told all of this run: %s", tracker.name, in_one_line(error))
                self._trackers.remove(tracker)


QUEUED_EVENTS = 10_000
"""Events that TensorBoard's thread may be behind before a step waits for it. With its 10 a slow disk stops a run."""


class TensorBoard:
    """Event files in a folder; a resumed run adds one, which replaces what the earlier ones say of the same steps."""

    def __init__(self, folder: Path) -> None:
        self.name = f"TensorBoard in {folder}"
        self._folder = folder
        self._parameters: Mapping[str, Any] = {}
        self._writer: Any = None

    def start(self, parameters: Mapping[str, Any]) -> None:
        """Keep the parameters until the first step, which is not always 1, is known."""
        self._parameters = parameters

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        """Add a point to each figure's curve."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._folder, max_queue=QUEUED_EVENTS, purge_step=step, flush_secs=10)
            rows = "".join(f"| {name} | {value} |\n" for name, value in self._parameters.items())
            self._writer.add_text("parameters", f"| name | value |\n|---|---|\n{rows}", step)
        from tensorboard.compat.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._writer.file_writer.add_summary(Summary(value=points), step)  # add_scalar would take three times as long

    def finish(self, version: Version) -> None:
        """Write what is not on disk yet."""
        self.close("FINISHED")

    def close(self, status: str) -> None:
        """Write what is not on disk yet."""
        if self._writer is not None:
            self._writer.close()


def require_extra(mlflow_tracking_uri: str) -> None:
    """Refuse an MLflow server that nothing could be sent to.

    Raises:
        SettingsError: this is no server's address, or MLflow's client is not installed.
    """
    if not mlflow_tracking_uri:
        return
    shown = f"MLFLOW_TRACKING_URI={redact_url(mlflow_tracking_uri)}"
    if not mlflow_tracking_uri.startswith(("http://", "https://", "databricks")):
        raise SettingsError(f"{shown} is not the address of an MLflow server, such as http://mlflow:5000.")
    require("mlflow", wanted_by=shown, product="MLflow's client", extra="trackers")


def open_trackers(
    *, log_path: Path, run_name: str, mlflow_tracking_uri: str, mlflow_experiment: str, memory: Path
) -> Trackers:
    """The trackers that are installed and wanted; nothing is written or sent before they are told something.

    Args:
        log_path: TensorBoard's files go to `tensorboard/<run_name>` in it.
        run_name: of this run, the same when it is resumed.
        mlflow_tracking_uri: MLflow's server; empty for none.
        mlflow_experiment: where the run goes there, and the name its model is registered under.
        memory: a file that MLflow's id of the run is kept in, for as long as the run may be resumed.

    Raises:
        SettingsError: MLflow is wanted and cannot be had.
    """
    require_extra(mlflow_tracking_uri)
    trackers: list[Tracker] = []
    if importlib.util.find_spec("tensorboard") is None:
        logger.info("no event files for TensorBoard: it is not installed")
    else:
        trackers.append(TensorBoard(log_path / "tensorboard" / run_name))
    if mlflow_tracking_uri:
        trackers.append(MLflowRun(mlflow_tracking_uri, mlflow_experiment, run_name, memory))
    return Trackers(trackers)
