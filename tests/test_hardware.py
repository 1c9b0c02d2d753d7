"""What a process may compute with, on machines made of files and on this one."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuneserve import hardware
from tuneserve.hardware import cpu_quota, set_threads

Python = Callable[..., "subprocess.CompletedProcess[str]"]


def affinity() -> float:
    return len(os.sched_getaffinity(0))


def v1(folder: str, quota: int) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": "100000\n"}


# Each: the process's groups, the files of /sys/fs/cgroup, and the CPUs they grant (none: as many as its affinity).
MACHINES: dict[str, tuple[str | None, dict[str, str], float | None]] = {
    "version 2, seen from inside the container": ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
    "version 2, no limit": ("0::/\n", {"cpu.max": "max 100000\n"}, None),
    "version 2, a period of its own": ("0::/\n", {"cpu.max": "5000 20000\n"}, 0.25),
    "version 2, seen from the host": ("0::/docker/a\n", {"docker/a/cpu.max": "50000 100000\n"}, 0.5),
    "version 2, the enclosing group is tighter": (
        "0::/pods/one/app\n",
        {"pods/one/app/cpu.max": "90000 100000\n", "pods/one/cpu.max": "25000 100000\n", "pods/cpu.max": "max 100000"},
        0.25,
    ),
    "version 2, the enclosing group is wider": (
        "0::/pods/one\n",
        {"pods/one/cpu.max": "25000 100000\n", "pods/cpu.max": "75000 100000\n"},
        0.25,
    ),
    "version 2, the limit is another group's": ("0::/mine\n", {"other/cpu.max": "25000 100000\n"}, None),
    "version 1": ("4:cpu,cpuacct:/docker/a\n", v1("cpu,cpuacct/docker/a", 50000), 0.5),
    "version 1, seen from inside the container": ("4:cpu:/docker/a\n", v1("cpu", 50000), 0.5),
    "version 1, controllers in the other order": ("4:cpuacct,cpu:/docker/a\n", v1("cpu/docker/a", 50000), 0.5),
    "version 1, no limit": ("4:cpu,cpuacct:/docker/a\n", v1("cpu,cpuacct/docker/a", -1), None),
    "version 1, the enclosing group is tighter": (
        "3:cpu:/pods/one\n",
        v1("cpu/pods/one", 90000) | v1("cpu/pods", 25000),
        0.25,
    ),
    "version 1, the group is another controller's": ("4:cpuset:/docker/a\n", v1("cpu/docker/a", 50000), None),
    "both versions mounted": ("4:cpu,cpuacct:/a\n1:name=systemd:/b\n0::/b\n", v1("cpu,cpuacct/a", 25000), 0.25),
    "more than there is": ("0::/\n", {"cpu.max": "409600000 100000\n"}, None),
    "no groups at all": (None, {}, None),
    "groups but no list of them": (None, {"cpu.max": "50000 100000\n"}, 0.5),
    "a file without the figures": ("0::/\n", {"cpu.max": "\n"}, None),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_tightest_quota_counts(machine: str, tmp_path: Path) -> None:
    groups, files, granted = MACHINES[machine]
    for name, content in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(content)
    (tmp_path / "proc" / "self").mkdir(parents=True)
    if groups is not None:
        (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    found = cpu_quota(tmp_path / "proc", tmp_path / "cgroup")
    assert found == (affinity() if granted is None else granted)


def test_affinity_limits_a_real_process_and_torch_keeps_to_it(python: Python) -> None:
    done = python(
        "-c",
        "import os; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])\n"
        "from tuneserve.hardware import cpu_quota, set_threads\n"
        "assert cpu_quota() <= 1; assert set_threads('auto') == 1\n"
        "os.sched_setaffinity(0, range(os.cpu_count()))\n"  # now only the variables hold torch back
        "import torch; print(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'], os.environ['RAYON_NUM_THREADS'])",
    )
    assert done.stdout.split() == ["1", "1", "1"], done.stderr


@pytest.mark.parametrize(("quota", "threads"), [(0.25, 1), (1.0, 1), (2.9, 2), (16.0, 16)])
def test_auto_takes_whole_cpus_and_one_at_least(quota: float, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM", "GOMP_SPINCOUNT")
    for name in names:
        monkeypatch.setenv(name, "before")  # so that it is put back afterwards
    monkeypatch.setattr(hardware, "cpu_quota", lambda: quota)
    assert set_threads("auto") == threads
    assert os.environ["OMP_NUM_THREADS"] == os.environ["RAYON_NUM_THREADS"] == str(threads)
    assert os.environ["OPENBLAS_NUM_THREADS"] == "1"
    assert set_threads(7) == 7
    assert os.environ["OMP_NUM_THREADS"] == os.environ["RAYON_NUM_THREADS"] == "7"


def test_without_a_gpu_cuda_is_refused_and_auto_says_why_it_took_the_cpu(python: Python) -> None:
    done = python(
        "-c",
        "from tuneserve.errors import DeviceError\n"
        "from tuneserve.hardware import choose_device\n"
        "for setting in ('cpu', 'auto', 'cuda'):\n"
        "    try: print(*choose_device(setting), sep='|')\n"
        "    except DeviceError as error: print(error)",
        CUDA_VISIBLE_DEVICES="",
    )
    cpu, auto, cuda = done.stdout.splitlines()
    assert cpu == "cpu|asked for by DEVICE=cpu"
    reason = auto.removeprefix("cpu|no GPU can be used: ")
    assert len(reason) > 10
    assert reason != auto
    assert cuda == f"DEVICE=cuda, but no GPU can be used: {reason}."


@pytest.mark.gpu
def test_a_gpu_that_is_there_is_taken() -> None:
    torch: Any = pytest.importorskip("torch")
    for setting in ("auto", "cuda"):
        device, name = hardware.choose_device(setting)
        assert device.type == "cuda"
        assert name == torch.cuda.get_device_name()


@pytest.mark.parametrize("asked", ["fp32", "bf16"])
def test_the_precision_asked_for_on_a_cpu_is_what_one_gets(asked: Any) -> None:
    import torch

    assert hardware.choose_precision(asked, torch.device("cpu")) == asked


def test_auto_takes_bf16_where_the_processor_multiplies_in_it() -> None:
    import torch

    try:
        native = torch.cpu._is_avx512_bf16_supported()
    except AttributeError:
        pytest.skip("this torch does not tell")
    if torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2", "AVX512"):
        pytest.skip("torch tells of x86 processors only")
    assert hardware.choose_precision("auto", torch.device("cpu")) == ("bf16" if native else "fp32")


@pytest.mark.parametrize(
    ("groups", "files", "granted"),
    [
        ("0::/\n", {"memory.max": "1048576\n"}, 1 << 20),
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("0::/pods/one\n", {"pods/one/memory.max": "max\n", "pods/memory.max": "4096\n"}, 4096),
        ("9:memory:/docker/a\n", {"memory/docker/a/memory.limit_in_bytes": "4096\n"}, 4096),
        ("9:memory:/docker/a\n", {"memory/docker/a/memory.limit_in_bytes": f"{1 << 62}\n"}, None),
        ("0::/mine\n", {"other/memory.max": "4096\n"}, None),
    ],
)
def test_the_tightest_group_limits_memory(
    tmp_path: Path, groups: str, files: dict[str, str], granted: int | None
) -> None:
    found = {"proc/self/cgroup": groups} | {f"cgroup/{name}": content for name, content in files.items()}
    for name, content in found.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert hardware.memory_limit(tmp_path / "proc", tmp_path / "cgroup") == (granted or whole)


@pytest.mark.parametrize("lists", [True, False])
def test_memory_is_that_of_a_process_and_all_its_descendants(tmp_path: Path, lists: bool) -> None:
    if lists:  # as most kernels do, for each thread
        for pid, thread, children in [(7, 7, "11 "), (7, 70, "8 "), (8, 8, "9 999 "), (9, 9, "")]:
            (tmp_path / f"{pid}/task/{thread}").mkdir(parents=True)
            (tmp_path / f"{pid}/task/{thread}/children").write_text(children)
    # Process 11 has the size of 7, its parent: it is about to become another program.
    for pid, parent, size, pages in [
        (1, 0, 9, 1),
        (7, 1, 5, 10),
        (8, 7, 6, 100),
        (9, 8, 7, 1000),
        (10, 1, 8, 10000),
        (11, 7, 5, 9),
    ]:
        (tmp_path / str(pid)).mkdir(exist_ok=True)
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a ) b) S {parent} {' '.join('0' * 18)} {size} {pages} 0\n")
    assert hardware.memory_used(tmp_path, 7) == 1110 * os.sysconf("SC_PAGE_SIZE")
    before = hardware.memory_used()
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    child = subprocess.Popen(["python3", "-c", "x = bytes(b'a') * (64 << 20); print(flush=True); input()"], **pipes)
    assert child.stdout is not None
    child.stdout.readline()
    assert hardware.memory_used() - before > 64 << 20
    child.communicate(b"\n")
