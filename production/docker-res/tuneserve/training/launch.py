"""Training in several processes: one a GPU, on one node or more, under PyTorch's own launcher.

`torch.distributed.run` starts the workers, which are this same program, and starts all of them again from the newest
checkpoint when one dies. An error that would only repeat itself, a TuneserveError, is no such death: the worker leaves
word of it in a file and ends with 0, which the launcher takes for success, and `run` raises it. Several nodes, and all
else that the launcher can be told, are its `PET_*` variables
(https://docs.pytorch.org/docs/stable/elastic/run.html), which Kubeflow's trainer sets.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from tuneserve.errors import TrainingError, TuneserveError, WorkerError
from tuneserve.hardware import choose_device
from tuneserve.settings import Settings
from tuneserve.signals import Stop

RESTARTS = "3"
"""Times that the workers are started again after one of them died."""
WORD = "TUNESERVE_WORD"
"""Name of the variable that tells workers the file for their last word."""
GIVEN_UP_S = 20.0
"""Seconds after a worker's last word in which the others may end by themselves."""


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


def leave_word(error: TuneserveError, environ: Mapping[str, str]) -> bool:
    """Tell the launcher's parent why this worker ends; False if it has none.

    Whoever is told exits with 0: a worker that failed would be started again.
    """
    if WORD not in environ:
        return False
    word = Path(environ[WORD])
    own = word.with_name(f"{word.name}-{os.getpid()}")
    own.write_text(json.dumps({"words": str(error), "exit_code": error.exit_code}), encoding="utf-8")
    own.replace(word)  # in one go, for several may have the same to say
    return True


def run(settings: Settings, stop: Stop, environ: Mapping[str, str], *, threads: int) -> None:
    """Train in workers; return when all have ended well.

    Raises:
        WorkerError: one of them met an error that is meant for the user.
        TrainingError: they died too often.
        SystemExit: a signal came; the workers have written a checkpoint.
    """
    count = workers(settings, environ)
    defaults = {
        "PET_NPROC_PER_NODE": str(count),
        "PET_MAX_RESTARTS": RESTARTS,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # a new meeting place for every attempt
    }
    if "PET_NNODES" not in environ:
        defaults["PET_STANDALONE"] = "1"
    local = int(environ.get("PET_NPROC_PER_NODE", count)) if environ.get("PET_NPROC_PER_NODE", "0").isdigit() else count
    environment = {**defaults, **environ, "OMP_NUM_THREADS": str(max(1, threads // max(1, local)))}
    program = Path(sys.argv[0]).resolve()
    command = [sys.executable, "-m", "torch.distributed.run", str(program), "train"]
    with stop.deferred(), tempfile.TemporaryDirectory(prefix="tuneserve-") as folder:
        word = Path(folder, "word")
        launcher = subprocess.Popen(command, env=environment | {WORD: str(word)})
        patience_s, told = GIVEN_UP_S, False
        while launcher.poll() is None:
            patience_s -= 0.1 * word.exists()
            if (stop.requested or patience_s < 0) and not told:
                launcher.terminate()
                told = True
            time.sleep(0.1)
        if word.exists() and not stop.requested:
            raise WorkerError(**json.loads(word.read_text(encoding="utf-8")))
    if launcher.returncode:
        raise TrainingError(f"The workers ended with exit code {launcher.returncode}; the lines above say why.")
