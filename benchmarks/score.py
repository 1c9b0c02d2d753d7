"""Accuracy of the store's champion on a labelled file it has not seen, answered as the server would answer.

MODEL_PATH=... .venv/bin/python benchmarks/score.py FILE
"""

import os
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT / "production" / "docker-res"))

from tuneserve.hardware import set_threads
from tuneserve.serving.server import champion_slot
from tuneserve.settings import Settings
from tuneserve.training import data
from tuneserve.training.rows import Columns


def main(file: str) -> None:
    settings = Settings.from_environ(os.environ)
    slot = champion_slot(settings, threads=set_threads(settings.omp_num_threads))
    slot.fill()
    columns = Columns(settings.text_column, settings.label_column)
    rows = data.read(file, columns, cache=settings.data_path)["train"].rows
    predictions = slot.classifier().predict(rows["text"][:])
    right = sum(one.label == label for one, label in zip(predictions, rows["label"], strict=True))
    print(f"{slot.classifier().version.id}: {right} of {len(rows)} right, accuracy {100 * right / len(rows):.1f}%")


if __name__ == "__main__":
    main(sys.argv[1])
