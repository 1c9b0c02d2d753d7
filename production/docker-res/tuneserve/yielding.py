"""How a training behaves beside a server: it takes what serving leaves, and does not outlive it."""

import ctypes
import os
import signal

from tuneserve.hardware import cpu_quota
from tuneserve.settings import Settings

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent dies, even by kill -9: a checkpoint is written then."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == 1 and os.getpid() != 1 and _parent_died():
        raise SystemExit(128 + signal.SIGTERM)


def _parent_died() -> bool:
    """Whether the parent had died before it could be asked; process 1 may also be the server itself, in a container."""
    with open("/proc/1/cmdline", "rb") as file:  # noqa: PTH123
        return b"run.py" not in file.read()


def yield_to_server(settings: Settings) -> Settings:
    """Lower this process's priority, and return the settings of a training that leaves room."""
    if settings.retrain_nice == "idle":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # anyone may, and threads and children inherit it
    else:
        os.nice(settings.retrain_nice)
    threads = settings.retrain_threads
    if threads == "auto":
        threads = max(1, int(cpu_quota() if settings.omp_num_threads == "auto" else settings.omp_num_threads) // 2)
    # Read by torch's allocator when it starts, in the workers of a training in several processes too.
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = f"per_process_memory_fraction:{settings.retrain_gpu_fraction}"
    return settings.model_copy(update={"omp_num_threads": threads})
