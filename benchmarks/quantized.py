"""What PRECISION=int8 brings: one version's two graphs, in turns, without a server. Train it with PRECISION=int8 first.

    .venv/bin/python benchmarks/quantized.py VERSION_FOLDER --short short.csv --long long.csv

The files have columns `text` and `label`. Speed is of `Classifier.predict`, tokens and all, 256 texts in one call and
one alone: the median of all rounds and how far they lie apart. Accuracy is of all the texts of a file.
"""

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT / "production" / "docker-res"))

from tuneserve.hardware import set_threads

THREADS = set_threads("auto")

from tuneserve.artifact import read_version
from tuneserve.settings import Settings
from tuneserve.tasks.classifier import Classifier, load_classifier

SIZES = (1, 256)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    version = read_version(options.version)
    loaded = {
        precision: load_classifier(version, Settings.from_environ({"PRECISION": precision}), threads=THREADS)
        for precision in ("auto", "int8")
    }
    print("| texts | in one call | graph | texts/s | rounds | accuracy % |\n|---|---|---|---|---|---|")
    for kind in ("short", "long"):
        rows = read(getattr(options, kind))
        right = {name: accuracy(one, rows) for name, one in loaded.items()}
        for size in SIZES:
            rates: dict[str, list[float]] = {name: [] for name in loaded}
            for turn in range(options.rounds):
                for name in list(loaded)[:: 1 if turn % 2 else -1]:
                    rates[name].append(rate(loaded[name], [text for text, _ in rows], size, options.seconds))
            for name, found in rates.items():
                spread = f"{min(found):.0f} to {max(found):.0f}"
                print(f"| {kind} | {size} | {name} | {statistics.median(found):.0f} | {spread} | {right[name]:.2f} |")


def parse(arguments: list[str]) -> Any:
    parser = argparse.ArgumentParser(description="One version's graphs, with int8 products and without.")
    parser.add_argument("version", type=Path)
    parser.add_argument("--short", type=Path, required=True)
    parser.add_argument("--long", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    return parser.parse_args(arguments)


def read(path: Path) -> list[tuple[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


def accuracy(classifier: Classifier, rows: list[tuple[str, str]]) -> float:
    found = classifier.predict([text for text, _ in rows])
    right = [getattr(one, "label", None) == label for one, (_, label) in zip(found, rows, strict=True)]
    return 100 * sum(right) / len(right)


def rate(classifier: Classifier, texts: list[str], size: int, seconds: float) -> float:
    """Texts a second, of calls of this size."""
    answered, began = 0, time.perf_counter()
    while (taken := time.perf_counter() - began) < seconds:
        first = answered % max(1, len(texts) - size + 1)
        answered += len(classifier.predict(texts[first : first + size]))
    return answered / taken


if __name__ == "__main__":
    main(sys.argv[1:])
