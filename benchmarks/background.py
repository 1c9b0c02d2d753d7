"""What a training in the background costs a server: p99 and requests/s alone and beside each kind of training.

    python benchmarks/background.py
    python benchmarks/background.py --clients 32 --pause-ms 0     cores that are full: does a training still get on?

One `run.py serve` under clients that ask short texts. Each kind of training runs as the server would start it
(`run.py train --background`), in a store of its own, stopped by SIGSTOP while it is not its turn. The table has medians
of the rounds; a training's texts/s come from its own progress.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from loop import RUN, SAMPLE, Load, Service, free_port, read_rows

KINDS = {
    "idle": {"RETRAIN_NICE": "idle"},
    "idle, 2 threads": {"RETRAIN_NICE": "idle", "RETRAIN_THREADS": "2"},
    "nice 19": {"RETRAIN_NICE": "19"},
    "nice 0, 2 threads": {"RETRAIN_NICE": "0", "RETRAIN_THREADS": "2"},
}
EPOCHS = 500
SETTLE_S = 1.0


class Training:
    """A training of one kind that lasts long enough, and moves only when it is told to."""

    def __init__(self, kind: dict[str, str], environment: dict[str, str], folder: Path) -> None:
        self.status = folder / "training.json"
        self.process = subprocess.Popen(
            [sys.executable, str(RUN), "train", "--background"],
            env=os.environ | environment | kind | {"MODEL_PATH": str(folder), "N_EPOCHS": str(EPOCHS)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not self.progress():
            if self.process.poll() is not None:
                raise RuntimeError(f"the training ended with exit code {self.process.returncode}")
            time.sleep(0.1)
        self.process.send_signal(signal.SIGSTOP)

    def progress(self) -> float:
        """The share of all epochs that is done."""
        try:
            return float(json.loads(self.status.read_text(encoding="utf-8")).get("progress", 0))
        except (OSError, ValueError):
            return 0.0


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--pause-ms", type=float, default=10, help="of a client between two requests (default: 10)")
    parser.add_argument("--seconds", type=float, default=6, help="of a cell (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--kinds", default=";".join(KINDS), help="of training (default: %(default)s)")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="beside-"))
    try:
        measure(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(options: argparse.Namespace, folder: Path) -> None:
    """One server, and each kind of training in turns."""
    environment = {
        "PORT": str(free_port()),
        "HOST": "127.0.0.1",
        **{f"{name}_PATH": str(folder / name.lower()) for name in ("MODEL", "DATA", "LOG")},
    }
    first = {"N_EPOCHS": "1", "NUM_TRAIN": "200", "NUM_TEST": "200"}  # how fast it answers does not depend on them
    subprocess.run([sys.executable, str(RUN), "train"], env=os.environ | environment | first, check=True)
    service = Service(environment, folder / "out.log", verb="serve")
    trainings: dict[str, Training] = {}
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    texts = read_rows(SAMPLE / "train.csv")
    seen = EPOCHS * len(texts) * 0.9  # the rest is held out for validation
    try:
        service.start()
        service.wait("/readyz", lambda body: body["phase"] == "ready")
        for name in options.kinds.split(";"):
            trainings[name] = Training(KINDS[name], environment, folder / f"store-{len(trainings)}")
        with Load(
            int(environment["PORT"]),
            [text for text, _ in texts],
            clients=options.clients,
            pause_s=options.pause_ms / 1000,
        ) as load:
            time.sleep(2)
            for number in range(options.rounds):
                for name in ["alone", *trainings][:: 1 if number % 2 else -1]:
                    training = trainings.get(name)
                    if training is not None:
                        training.process.send_signal(signal.SIGCONT)
                    time.sleep(SETTLE_S)
                    mark, before, began = load.mark(), training.progress() if training else 0, time.monotonic()
                    time.sleep(options.seconds)
                    seconds = time.monotonic() - began
                    done = (training.progress() - before) * seen / seconds if training else 0
                    found[name].append((load.p99(mark), (load.mark() - mark) / seconds, done))
                    if training is not None:
                        training.process.send_signal(signal.SIGSTOP)
                    print(name, *(f"{one:.1f}" for one in found[name][-1]), flush=True)
        if set(load.statuses) != {"200"}:
            raise RuntimeError(f"requests failed: {load.statuses}")
    finally:
        for training in trainings.values():
            training.process.kill()
            training.process.wait()
        service.end()
    alone = statistics.median(p99 for p99, _, _ in found["alone"])
    print("\n| beside | p99 ms | of the one alone | requests/s | texts/s trained |\n|---|---|---|---|---|")
    for name, cells in found.items():
        p99, rate, done = (statistics.median(column) for column in zip(*cells, strict=True))
        spread = f"{p99:.1f} ({min(cells)[0]:.1f} to {max(cells)[0]:.1f})"
        print(f"| {name} | {spread} | {p99 / alone:.2f} | {rate:.0f} | {done:.0f} |")


if __name__ == "__main__":
    main()
