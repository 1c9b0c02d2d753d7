"""Accuracy of the store's champion on a labelled file it has not seen, answered as the server would answer.

MODEL_PATH=... .venv/bin/python benchmarks/score.py FILE
"""

import os
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT / "production" / "docker-res"))

from tuneserve.hardware import set_threads
from tuneserve.lifecycle.store import Store
from tuneserve.settings import Settings
from tuneserve.tables.rows import Columns
from tuneserve.tasks.classifier import Prediction, load_classifier
from tuneserve.training import data


def main(file: str) -> None:
    settings = Settings.from_environ(os.environ)
    version = Store(settings.model_path).champion()
    classifier = load_classifier(version, settings, threads=set_threads(settings.omp_num_threads))
    columns = Columns(settings.text_column, settings.label_column)
    rows = data.read(file, columns, cache=settings.data_path)["train"].rows
    pairs = zip(classifier.predict(rows["text"][:]), rows["label"], strict=True)
    right = sum(isinstance(one, Prediction) and one.label == label for one, label in pairs)
    print(f"{version.id}: {right} of {len(rows)} right, accuracy {100 * right / len(rows):.1f}%")


if __name__ == "__main__":
    main(sys.argv[1])
