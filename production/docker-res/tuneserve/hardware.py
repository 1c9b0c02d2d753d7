"""What this process may compute with: CPU threads, priority, device, number format."""

import ctypes
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tuneserve.errors import DeviceError

if TYPE_CHECKING:
    import torch

    from tuneserve.settings import Settings

Precision = Literal["fp32", "bf16"]

SPIN_COUNT = "1000"
"""Iterations that an OpenMP thread spins before it sleeps. The library's default, 300,000, is no faster alone, and with
another process on the same cores training nearly stops (docs/decisions/0002-training-defaults.md)."""


def cpu_quota(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> float:
    """CPUs this process may use: the smaller of its affinity and its cgroup's quota (version 1 and 2).

    Every enclosing group of the process counts, since the tightest one binds. Source: the kernel's documents
    `cgroup-v2` (cpu.max) and `sched-bwc` (cpu.cfs_quota_us).
    """
    available = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for folder in _cgroup_folders(proc, cgroups):
        try:
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text()
                period = (folder / "cpu.cfs_period_us").read_text()
            if quota.strip() not in ("max", "-1"):
                available = min(available, int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):  # no limit here
            continue
    return available


def _cgroup_folders(proc: Path, cgroups: Path, controller: str = "cpu") -> list[Path]:
    """Folders that may hold a limit of this process: its group's and all those above, in both hierarchies."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        lines = []
    roots = [cgroups, cgroups / controller, *([cgroups / "cpu,cpuacct"] if controller == "cpu" else [])]
    groups = [line.split(":", 2)[2] for line in lines if re.match(rf"\d+:(|([^:]*,)?{controller}(,[^:]*)?):", line)]
    folders = dict.fromkeys(roots)  # a dict keeps the order
    for group in groups:
        path = Path(group.strip("/"))
        folders |= {root / part: None for root in roots for part in [path, *path.parents]}
    return list(folders)


def memory_limit(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that this process may use: the smallest of its cgroups' limits and the machine's memory.

    Source: the kernel's documents `cgroup-v2` (memory.max) and `cgroup-v1/memory` (memory.limit_in_bytes).
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder in _cgroup_folders(proc, cgroups, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # no limit here, or `max`
                limits.append(int((folder / name).read_text()))
    return min(limits)


def memory_free(proc: Path = Path("/proc")) -> int:
    """Bytes of memory that nobody uses, by the kernel's guess (`MemAvailable`), within this process's limit."""
    with suppress(OSError):
        if found := re.search(r"MemAvailable: *(\d+) kB", (proc / "meminfo").read_text()):
            return min(memory_limit(proc), int(found[1]) << 10)
    return memory_limit(proc)


def memory_used(proc: Path = Path("/proc"), pid: int | None = None) -> int:
    """Bytes of this process, and of all that it has started, that are in memory; shared ones count for each.

    A child that is not yet another program than its parent shares its memory, as its size tells, and is not counted.
    """
    family = [pid or os.getpid()]
    if (proc / f"{family[0]}/task/{family[0]}/children").exists():
        for member in family:  # grows while it is walked
            family += _children(proc / str(member))
        stats = {one: _stat(proc / str(one)) for one in family}
    else:  # this kernel lists no children
        stats = {int(one.name): _stat(one) for one in proc.iterdir() if one.name.isdigit()}
        for member in family:
            family += [one for one, (parent, _, _) in stats.items() if parent == member]
    own = [one for one in family if one in stats and stats[one][1] != stats.get(stats[one][0], NOTHING)[1]]
    return sum(stats[one][2] for one in own) * os.sysconf("SC_PAGE_SIZE")


NOTHING = (0, 0, 0)


def _stat(folder: Path) -> tuple[int, int, int]:
    """The parent of a process, its size in bytes, and its pages in memory; NOTHING if it has ended."""
    try:
        found = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
        return int(found[1]), int(found[20]), int(found[21])
    except OSError:
        return NOTHING


def _children(folder: Path) -> list[int]:
    """What the threads of a process have started."""
    found: list[int] = []
    with suppress(OSError):  # it has ended
        for thread in (folder / "task").iterdir():
            with suppress(OSError):
                found += map(int, (thread / "children").read_text().split())
    return found


def give_memory_back() -> None:
    """Let the C library return freed memory to the system, which it would keep for as long; glibc's alone can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def count_threads(setting: int | Literal["auto"]) -> int:
    """CPU threads to compute with."""
    return max(1, math.floor(cpu_quota())) if setting == "auto" else setting


def set_threads(setting: int | Literal["auto"]) -> int:
    """Choose the number of CPU threads and set it for all libraries; call it before torch or NumPy is imported."""
    threads = count_threads(setting)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's products are small: threads that wait for busy cores cost more
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    return threads


BESIDE = "TUNESERVE_BESIDE"
"""A variable of a training beside a server, and of its workers: its store is there, or is gone."""


def run_in_background(settings: "Settings") -> "Settings":
    """Lower this process's priority, and return the settings of a training that leaves room for a server."""
    os.environ[BESIDE] = "1"
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


def choose_device(setting: Literal["auto", "cpu", "cuda"]) -> tuple["torch.device", str]:
    """The device to compute on, and a message why.

    Raises:
        DeviceError: `cuda` is asked for and cannot be used; the message says why.
    """
    import torch

    if setting == "cpu":
        return torch.device("cpu"), "asked for by DEVICE=cpu"
    obstacle = _cuda_obstacle()
    if obstacle is None:
        return torch.device("cuda"), torch.cuda.get_device_name()
    if setting == "cuda":
        raise DeviceError(f"DEVICE=cuda, but no GPU can be used: {obstacle}.")
    return torch.device("cpu"), f"no GPU can be used: {obstacle}"


def gpu_may_be_there(devices: Path = Path("/dev")) -> bool:
    """Whether the system shows an NVIDIA device (WSL's is `dxg`): if not, torch need not be loaded to ask."""
    return any(devices.glob("nvidia[0-9]*")) or (devices / "dxg").exists()


def ask_driver(environ: Mapping[str, str], *, timeout_s: float) -> str:
    """Names and driver versions of the GPUs that `nvidia-smi` shows; empty if it shows none, or is not there."""
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if program is None:
        return ""
    command = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "; ".join(done.stdout.splitlines()) if done.returncode == 0 else ""


def ask_torch(*, timeout_s: float) -> dict[str, Any]:
    """What torch says of the GPU, asked in a process of its own, since a driver may hang or end it.

    Returns:
        Its `name`, bytes that are `free` and whether it computes in `bf16`; or the `obstacle` if it cannot be used.

    Raises:
        TimeoutError: torch was not loaded, or the driver did not answer, within so many seconds.
    """
    if importlib.util.find_spec("torch") is None:
        return {"obstacle": "it is not installed"}
    command = [sys.executable, "-m", "tuneserve.hardware"]
    program = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(command, cwd=program, capture_output=True, text=True, timeout=timeout_s)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"torch did not answer within {timeout_s:g} s, and may if it is asked again") from None
    except (ValueError, IndexError):
        said = " ".join(done.stderr.split())[-200:]
        return {"obstacle": f"its process ended with code {done.returncode}{said and f': {said}'}"}
    return found


def _describe_gpu() -> dict[str, Any]:
    device, reason = choose_device("auto")
    if device.type == "cpu":
        return {"obstacle": reason.removeprefix("no GPU can be used: ").rstrip(".")}
    import torch

    bf16 = choose_precision("auto", device) == "bf16"
    return {"name": reason, "free": torch.cuda.mem_get_info()[0], "bf16": bf16}


def _cuda_obstacle() -> str | None:
    import torch

    if torch.version.cuda is None:
        return f"this build of torch ({torch.__version__}) has no CUDA"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            try:
                torch.zeros(1, device="cuda")
            except RuntimeError as error:
                return str(error).splitlines()[0]
            return None
    if caught:  # an old driver, for one, only shows up as a warning
        return str(caught[-1].message).splitlines()[0]
    return "no NVIDIA device is visible (start the container with --gpus all or --runtime=nvidia)"


def choose_precision(setting: str, device: "torch.device") -> Precision:
    """The number format of torch's matrix products; `auto` takes bf16 only where the device computes in it natively.

    Any other setting is `auto` here: it asks for an export of what was trained, and torch does not run that.

    Raises:
        DeviceError: `bf16` is asked for on a GPU that lacks it.
    """
    import torch

    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        if setting == "bf16" and not native:
            raise DeviceError("PRECISION=bf16, but this GPU does not compute in bf16; use PRECISION=fp32.")
    else:
        native = cpu_has_bf16()
    return "bf16" if setting == "bf16" or (native and setting != "fp32") else "fp32"


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware (AVX512_BF16, AMX; BF16 on Arm)."""
    try:
        flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text(encoding="utf-8")))
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


if __name__ == "__main__":
    print(json.dumps(_describe_gpu()))
