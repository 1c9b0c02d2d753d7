"""Whether the job can be put on a base image, and what of the base it keeps. The Dockerfile runs this in the base.

    python3 base_image.py fit REQUIREMENTS      before anything is installed: the base's Python, and its torch if it has
                                                one, whose folder is printed
    python base_image.py facts REQUIREMENTS     afterwards: whether what was wanted is what is imported, and whether it
                                                fits the base's CUDA and driver; prints the versions as JSON

A refusal is one line, which build.py repeats, and exit code 1. This is the standard library alone, in a Python that
Ubuntu 20.04 can read, so that it can refuse one that is too old.
"""

from __future__ import annotations

import json
import os
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import NoReturn

OLDEST, NEWEST = (3, 11), (3, 13)
VENV = Path("/opt/venv")
"""Where the Dockerfile puts the job's libraries."""
USER = 1000
"""Who runs the job."""
DRIVERS = {11: 450, 12: 525, 13: 580}
"""The oldest driver that runs a major version of CUDA (NVIDIA's "CUDA Compatibility", minor version compatibility)."""
LIBRARIES = (
    "/usr/lib",
    "/usr/lib64",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/local/nvidia/lib64",
)


def refuse(reason: str) -> NoReturn:
    """Say why, and end."""
    print(f"REFUSED: {reason}", file=sys.stderr)
    sys.exit(1)


def read_pin(requirements: Path, name: str) -> str:
    """The version that the requirements want of a library."""
    found = re.search(rf"^{name}==(\S+)$", requirements.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else refuse(f"requirements.txt does not pin {name}")


def public(version: str) -> str:
    """A version without what a build says of itself: 2.13.0 of 2.13.0+cpu."""
    return version.partition("+")[0]


def find_torch(wanted: str) -> str:
    """The folder that has the base's torch, to be searched after the job's own; empty when the base has none."""
    python = sys.version_info[:2]
    if not OLDEST <= python <= NEWEST:
        refuse(
            f"the base's python3 is {python[0]}.{python[1]}, and the job needs 3.11, 3.12 or 3.13: "
            "take a base that has one of them on its PATH"
        )
    if VENV.exists():
        refuse(f"the base has a {VENV}, where the job's libraries go: take a base that has its Python elsewhere")
    try:
        found = metadata.distribution("torch")
    except metadata.PackageNotFoundError:
        return ""
    if public(found.version) != public(wanted):
        refuse(
            f"the base brings torch {found.version}, and the job is made for {wanted}: take a base with that one or "
            f"with none, or say --torch {public(found.version)} to keep the base's"
        )
    return str(Path(str(found.locate_file(""))).resolve())


def read_base_cuda() -> str:
    """The version of CUDA that the base declares, as 13.0; empty when it has none."""
    declared = os.environ.get("CUDA_VERSION", "")
    if not declared:
        try:
            declared = json.loads(Path("/usr/local/cuda/version.json").read_text(encoding="utf-8"))["cuda"]["version"]
        except (OSError, ValueError, KeyError):
            return ""
    return ".".join(declared.split(".")[:2])


def read_driver() -> int:
    """The major version of the driver's library where programs find it, in the base or mounted; 0 for none."""
    names = [file.name for folder in LIBRARIES for file in Path(folder).glob("libcuda.so.*.*")]
    return max((int(name.split(".")[2]) for name in names if name.split(".")[2].isdigit()), default=0)


def check_cuda(cuda: str, base: str, driver: int) -> None:
    """Refuse a torch made with `cuda` on a base with CUDA `base` and a `driver`; empty or 0 is none, which fits."""
    if not cuda:
        return
    made, has = ([int(part) for part in version.split(".")] for version in (cuda, base or cuda))
    if made[0] != has[0] or has < made:
        refuse(
            f"torch is made with CUDA {cuda}, and the base's CUDA is {base}, which programs would find first: "
            f"take a base with CUDA {cuda} or a later {made[0]}, or with none"
        )
    needed = DRIVERS.get(made[0], 0)
    if 0 < driver < needed:
        refuse(f"torch is made with CUDA {cuda}, which needs driver {needed} or later, and the driver here is {driver}")


def read_facts(torch_wanted: str, transformers_wanted: str) -> dict[str, str]:
    """The versions of what is imported, by the user who runs the job."""
    os.setgid(0)
    os.setuid(USER)
    try:
        import torch
        import transformers
    except Exception as error:  # whatever the base's libraries raise
        refuse(f"user {USER} cannot import torch and transformers: {type(error).__name__}: {error}"[:500])
    for name, has, wanted in (
        ("torch", torch.__version__, torch_wanted),
        ("transformers", transformers.__version__, transformers_wanted),
    ):
        if public(has) != public(wanted):
            refuse(f"{name} {wanted} was installed, and {has} is imported: does the base set PYTHONPATH?")
    cuda = torch.version.cuda or ""
    own = VENV in Path(torch.__file__).parents
    check_cuda(cuda, read_base_cuda() if own else "", read_driver())  # its own torch the base was made for
    return {
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": cuda,
        "driver": str(DRIVERS.get(int(cuda.partition(".")[0]), "")) if cuda else "",
    }


if __name__ == "__main__":
    what, file = sys.argv[1], Path(sys.argv[2])
    if what == "fit":
        print(find_torch(read_pin(file, "torch")))
    else:
        print(json.dumps(read_facts(read_pin(file, "torch"), read_pin(file, "transformers"))))
