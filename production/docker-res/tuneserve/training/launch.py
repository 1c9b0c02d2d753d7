"""Training in several processes: one a GPU, on one node or more, under PyTorch's own launcher.

`torch.distributed.run` starts the workers, which are this same program, and starts all of them again from the newest
checkpoint when one dies. An error that would only repeat itself, a TuneserveError, is no such death: the worker writes
it to a file and ends with 0, which the launcher takes for success, and `run` raises it. Several nodes, and all
else that the launcher can be told, are its `PET_*` variables
(https://docs.pytorch.org/docs/stable/elastic/run.html), which Kubeflow's trainer sets.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from tuneserve.errors import StoreError, TrainingError, TuneserveError, WorkerError
from tuneserve.files import CACHE_PARTS, in_use, replace_file
from tuneserve.hardware import choose_device
from tuneserve.settings import Settings
from tuneserve.signals import Stop

RESTARTS = "3"
"""Times that the workers are started again after one of them died."""
ERROR_FILE = "TUNESERVE_ERROR_FILE"
"""Name of the variable that tells workers where to write the error that ends them."""
LAUNCHER = """\
import sys
sys.path.insert(0, {!r})
from tuneserve.signals import end_with_parent
end_with_parent()
from torch.distributed.run import main
main()
"""
"""PyTorch's launcher, which ends with the process that started it, as its workers end with it."""
GIVEN_UP_S = 20.0
"""Seconds after a worker's error in which the others may end by themselves."""


def workers(settings: Settings, environ: Mapping[str, str]) -> int:
    """Processes that this node is to train with; 1 is this one itself, also if it is such a worker."""
    if "TORCHELASTIC_RUN_ID" in environ:
        return 1
    if settings.processes != "auto":
        return settings.processes
    import torch

    device, _ = choose_device(settings.device)
    return torch.cuda.device_count() if device.type == "cuda" else 1


def is_asked_for(settings: Settings, environ: Mapping[str, str]) -> bool:
    """Whether this process should start workers and wait for them."""
    if "TORCHELASTIC_RUN_ID" in environ or not settings.train_body:
        return False
    return workers(settings, environ) > 1 or any(name in environ for name in ("PET_NNODES", "PET_NPROC_PER_NODE"))


def write_error_file(error: TuneserveError, environ: Mapping[str, str]) -> bool:
    """Tell the launcher's parent why this worker ends; False if it has none.

    After True the worker exits with 0: one that failed would be started again.
    """
    if ERROR_FILE not in environ:
        return False
    content = json.dumps({"words": str(error), "exit_code": error.exit_code}).encode()
    replace_file(Path(environ[ERROR_FILE]), content, durable=False)  # atomic, for several may write the same
    return True


def run(settings: Settings, stop: Stop, environ: Mapping[str, str], *, threads: int) -> None:
    """Train in workers; return when all have ended well.

    Raises:
        WorkerError: one of them met an error that is meant for the user.
        TrainingError: they died too often.
        StoreError: DATA_PATH cannot be written to.
        SystemExit: a signal came; the workers have written a checkpoint.
    """
    count = workers(settings, environ)
    defaults = {
        "PET_NPROC_PER_NODE": str(count),
        "PET_MAX_RESTARTS": RESTARTS,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # a new store for every attempt
    }
    if "PET_NNODES" not in environ:
        defaults["PET_STANDALONE"] = "1"
    local = int(environ.get("PET_NPROC_PER_NODE", count)) if environ.get("PET_NPROC_PER_NODE", "0").isdigit() else count
    environment = {**defaults, **environ, "OMP_NUM_THREADS": str(max(1, threads // max(1, local)))}
    program = Path(sys.argv[0]).resolve()
    command = [sys.executable, "-c", LAUNCHER.format(str(program.parent)), str(program), "train"]
    cache = settings.data_path
    with stop.deferred(), in_use(cache, *CACHE_PARTS), _own_folder(cache / "launch") as folder:
        error_file = folder / "error.json"
        # In a group of its own: a second signal, of the terminal's, would make it leave its workers.
        launcher = subprocess.Popen(command, env=environment | {ERROR_FILE: str(error_file)}, process_group=0)
        patience_s, told = GIVEN_UP_S, False
        try:
            while launcher.poll() is None:
                patience_s -= 0.1 * error_file.exists()
                if (stop.requested or patience_s < 0) and not told:
                    launcher.terminate()
                    told = True
                time.sleep(0.1)
        finally:
            launcher.kill()  # if a second signal came; its end is the workers' first
        if error_file.exists() and not stop.requested:
            raise WorkerError(**json.loads(error_file.read_text(encoding="utf-8")))
    if launcher.returncode:
        raise TrainingError(f"The workers ended with exit code {launcher.returncode}; the lines above say why.")


@contextmanager
def _own_folder(parent: Path) -> Iterator[Path]:
    """A folder for the block; one that a killed process left is removed when the next training uses the cache."""
    folder = parent / f".{uuid4().hex}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise StoreError(f"DATA_PATH={parent.parent} cannot be written to: {error}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
