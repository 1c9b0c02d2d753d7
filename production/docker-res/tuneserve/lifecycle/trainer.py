"""Training as a child process of the server, one at a time; its output goes to the container's log.

MODEL_PATH/jobs/<id>.json   each training that a server started, and how it ended
"""

import logging
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Literal
from uuid import uuid4

from pydantic import TypeAdapter

from tuneserve.errors import BusyError, RefusedError, TuneserveError
from tuneserve.files import read_record, write_json
from tuneserve.lifecycle.status import read_status
from tuneserve.lifecycle.store import Store

logger = logging.getLogger(__name__)

KEEP_JOBS = 100
SAVE_S = 20.0
"""Seconds that a training gets to write its checkpoint after SIGTERM."""

State = Literal["running", "finished", "refused", "failed", "interrupted"]


@dataclass(frozen=True)
class Job:
    """One training: why it was started, and its state or outcome."""

    id: str
    why: str
    state: State
    started_at: str
    ended_at: str | None = None
    exit_code: int | None = None
    version: str | None = None
    said: str | None = None


SHAPE = TypeAdapter(Job)


class Trainer:
    """Starts trainings and keeps a record of each.

    Args:
        command: that trains; `--background` is added when a model answers meanwhile.
        store: that it trains for.
        serves: whether a model answers now.
        on_end: called with each job that ended, on a thread of its own.
        environ: environment variables of a training; None for those of this process.
    """

    def __init__(
        self,
        command: Sequence[str],
        store: Store,
        *,
        serves: Callable[[], bool],
        on_end: Callable[[Job], None] = lambda job: None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.on_end = on_end
        self._command = list(command)
        self._store = store
        self._serves = serves
        self._environ = environ
        self._folder = store.root / "jobs"
        self._lock = threading.RLock()  # a signal's handler may come upon its own thread in `start`
        self._child: subprocess.Popen[bytes] | None = None
        self._job: Job | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._told_s: float | None = None

    def start(self, why: str) -> Job:
        """Start a training.

        Raises:
            BusyError: one is running, or the server is about to end.
        """
        with self._lock:
            if self._closed or (self._job is not None and self._job.state == "running"):
                raise BusyError("A training is running already." if not self._closed else "The server is about to end.")
            now = datetime.now(UTC)
            # Names are in the order of time, within a second too.
            name = f"{now:%Y%m%dT%H%M%SZ}-{now.microsecond:05x}{uuid4().hex[:1]}"
            job = Job(name, why, "running", _timestamp(now))
            with suppress(OSError):
                self._store.status_file.unlink(missing_ok=True)  # it is of the training before
            self._job = job
            self._keep(job)
            self._thread = threading.Thread(target=self._run, args=[job], name="training", daemon=True)
            self._thread.start()
        return job

    @property
    def running(self) -> Job | None:
        """The job that runs now."""
        job = self._job
        return job if job is not None and job.state == "running" else None

    def progress(self) -> dict[str, object]:
        """How far the running job is: `phase`, and while it trains `epoch`, `progress`, `loss`, `eta_s`."""
        if self.running is None:
            return {}
        status = read_status(self._store.status_file)
        if "phase" not in status:
            return {"phase": "preparing"}
        if status["phase"] in ("finished", "failed"):  # its process is about to end
            return {"phase": "judging"}
        return {name: value for name, value in status.items() if name not in ("pid", "course")}

    def course(self) -> dict[str, object]:
        """How the running job, or else the last, has gone: its losses, and what was found in its data; see `Course`."""
        return {} if self._job is None else read_status(self._store.status_file).get("course", {})

    @property
    def last(self) -> Job | None:
        """The job that this server has started last, which may be running."""
        return self._job

    def jobs(self) -> list[Job]:
        """All jobs on record and this server's latest, which a full disk may have no record of; newest first."""
        names = {path.stem for path in self._folder.glob("*.json")}
        if self._job is not None:
            names.add(self._job.id)
        return [job for name in sorted(names, reverse=True) if (job := self.job(name)) is not None]

    def job(self, name: str) -> Job | None:
        """One job by its id. One that another server left running when it died counts as interrupted."""
        current = self._job
        if current is not None and current.id == name:
            return current
        if not name.replace("-", "").isalnum():
            return None
        try:
            job = read_record(self._folder / f"{name}.json", SHAPE)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("job %s cannot be read: %s", name, error)
            return None
        return replace(job, state="interrupted") if job.state == "running" else job

    def interrupt(self) -> None:
        """Let the running training write its checkpoint and end, and start no other. It is told once only."""
        with self._lock:
            self._closed = True
            if self._told_s is None and self._child is not None and self._child.poll() is None:
                self._told_s = time.monotonic()
                self._child.terminate()

    def kill(self) -> None:
        """End the running training without its checkpoint, and start no other."""
        with self._lock:
            self._closed = True
            if self._child is not None and self._child.poll() is None:
                self._child.kill()

    def close(self) -> None:
        """Interrupt the training, wait for its end, and kill it SAVE_S after it was told, or when a signal comes."""
        self.interrupt()
        try:
            if self._thread is not None:
                told_s = time.monotonic() if self._told_s is None else self._told_s
                self._thread.join(max(0.0, told_s + SAVE_S - time.monotonic()))
        finally:
            self.kill()

    def _run(self, job: Job) -> None:
        # The kernel ends the child when the thread that started it ends, so this thread waits.
        background = ["--background"] if self._serves() else []
        try:
            if background and self._store.is_lost:  # a training would find no champion to be compared with
                raise FileNotFoundError(self._store.lost)
            with self._lock:
                self._child = None
                if not self._closed:
                    self._child = subprocess.Popen([*self._command, *background], env=self._environ)
            code = self._child.wait() if self._child is not None else 128 + signal.SIGTERM
            job = self._ended(job, code)
        except OSError as error:
            job = replace(
                job, state="failed", ended_at=_timestamp(datetime.now(UTC)), said=f"could not be started: {error}"
            )
        self._job = job
        self._keep(job)
        logger.log(
            logging.INFO if job.state == "finished" else logging.WARNING,
            "training %s (%s): %s%s",
            job.id,
            job.why,
            job.state,
            f": {job.said}" if job.said else "",
        )
        self.on_end(job)

    def _ended(self, job: Job, code: int) -> Job:
        status = read_status(self._store.status_file)
        said = status.get("decision") or status.get("reason")
        state: State = "failed"
        if code == 0:
            state = "finished"
        elif code == RefusedError.exit_code:
            state = "refused"
        elif code == BusyError.exit_code:
            said = "another process is training for this store"
        elif code in (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGINT):
            state, said = "interrupted", "a signal came; the same training goes on from its checkpoint"
        elif code < 0:
            said = f"killed by signal {-code}"
        elif said is None and self._store.is_lost:
            said = self._store.lost
        return replace(
            job,
            state=state,
            ended_at=_timestamp(datetime.now(UTC)),
            exit_code=code if code >= 0 else 128 - code,
            version=status.get("version"),
            said=said,
        )

    def _keep(self, job: Job) -> None:
        try:
            self._folder.mkdir(exist_ok=True)
            write_json(self._folder / f"{job.id}.json", asdict(job))
            for old in sorted(self._folder.glob("*.json"))[:-KEEP_JOBS]:
                old.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("job %s cannot be recorded: %s", job.id, error)


def _timestamp(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")


class FailedTrainingError(TuneserveError):
    """The first training ended without a model, and there is none to serve; the exit code is the training's."""

    def __init__(self, job: Job) -> None:
        super().__init__(f"The training ended with exit code {job.exit_code} and there is nothing to serve: {job.said}")
        self.exit_code = job.exit_code or 1
