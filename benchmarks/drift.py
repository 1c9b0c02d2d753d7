"""How often drift is called where there is none, and where there is: real models, real texts, windows drawn at random.

    .venv/bin/python benchmarks/drift.py --data FOLDER

`FOLDER` holds `sst2/train.csv`, `imdb/train.csv`, `banking77/train.csv`, `trec/train.csv` and `amazon_sentences.csv`
(columns `text` and `label`). Each model is trained by `run.py train`; its engine then answers, once, texts that it has
not seen and texts of other places; windows are drawn from these answers. The tables are Markdown.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
RES = PROJECT / "production" / "docker-res"
sys.path.insert(0, str(RES))

from tuneserve.hardware import set_threads

THREADS = set_threads("auto")

import numpy as np

from tuneserve.lifecycle.drift import Answers, Reference, Window, judge, read_reference
from tuneserve.lifecycle.store import Store
from tuneserve.serving.monitor import Monitor
from tuneserve.settings import Settings
from tuneserve.tasks.classifier import Classifier, Prediction, load_classifier

Row = tuple[str, str]


@dataclass(frozen=True)
class Task:
    """A model to train, and places from which its texts may suddenly come."""

    name: str
    train: int
    test: int
    unseen: int
    others: tuple[str, ...]


TASKS = (
    Task("sst2", train=3000, test=900, unseen=2500, others=("amazon_sentences", "imdb", "trec")),
    Task("imdb", train=400, test=600, unseen=2000, others=("amazon_sentences", "sst2")),
    Task("trec", train=3000, test=600, unseen=1800, others=("sst2",)),
    Task("banking77", train=3500, test=1500, unseen=4000, others=("trec",)),
)
OTHER_TEXTS = 1000
SIZES = (100, 500)
PART = 0.25
"""Share of foreign texts in the mixed windows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--draws", type=int, default=1000, help="windows drawn for each figure")
    parser.add_argument("--tasks", default=",".join(task.name for task in TASKS), help="models to train")
    options = parser.parse_args()
    print("| model, its reference | windows of | 100: called drift % | 500: called drift % | figures at 500 |")
    print("|---|---|---|---|---|")
    costs = []
    with tempfile.TemporaryDirectory() as folder:
        for task in [task for task in TASKS if task.name in options.tasks.split(",")]:
            costs.append(f"{task.name}: {measure(task, options.data, Path(folder, task.name), options.draws)}")
    print("\nThe cost of noting an answer, against the engine's time on this machine:\n")
    print("\n".join(f"- {cost}" for cost in costs))


def measure(task: Task, data: Path, folder: Path, draws: int) -> str:
    """Print the task's rows, and tell what observing costs."""
    rows = read(data, task.name)
    held = task.train + task.test
    classifier = train(rows[: task.train], rows[task.train : held], folder)
    reference = read_reference(classifier.version)
    assert reference is not None
    own, cost = answer(classifier, [text for text, _ in rows[held : held + task.unseen]])
    name = f"{task.name}, {len(reference.answers)} texts"
    report(f"{name} | {task.name}, {len(own)} unseen texts", reference, own, None, draws)
    for other in task.others:
        foreign, _ = answer(classifier, [text for text, _ in read(data, other)[:OTHER_TEXTS]])
        report(f"{name} | {other}, {len(foreign)} texts", reference, foreign, None, draws)
        report(f"{name} | {PART:.0%} {other}", reference, own, foreign, draws)
    return cost


def read(data: Path, name: str) -> list[Row]:
    """The texts and labels of a data set, each text once, in an order of chance."""
    path = data / f"{name}.csv"
    with (path if path.is_file() else data / name / "train.csv").open(newline="", encoding="utf-8") as file:
        rows = list({row["text"].strip(): row["label"] for row in csv.DictReader(file) if row["text"].strip()}.items())
    return [rows[place] for place in np.random.default_rng(0).permutation(len(rows))]


def train(rows: list[Row], test: list[Row], folder: Path) -> Classifier:
    """Train the product on these texts for an epoch, and load what it saved as a server would."""
    folder.mkdir()
    for name, part in (("train", rows), ("test", test)):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *part])
    variables = {"DATASET": folder, "N_EPOCHS": 1, "MODEL_PATH": folder / "models", "LOG_PATH": folder / "logs"}
    environ = {name: str(value) for name, value in variables.items()}
    done = subprocess.run(
        [sys.executable, RES / "run.py", "train"], env=os.environ | environ, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    settings = Settings.from_environ(environ)
    return load_classifier(Store(settings.model_path).champion(), settings, threads=THREADS)


def answer(classifier: Classifier, texts: list[str]) -> tuple[Answers, str]:
    """What a server would note of these texts, and what noting costs beside answering."""
    monitor = Monitor(classifier, Window(max_texts=len(texts)))
    began = time.perf_counter()
    predictions = classifier.predict(texts)
    answering = (time.perf_counter() - began) / len(texts) * 1e6
    observations = [
        one.observation for one in predictions if isinstance(one, Prediction) and one.observation is not None
    ]
    began = time.perf_counter()
    for observation in observations:
        monitor.observe(observation)
    noting = (time.perf_counter() - began) / len(observations) * 1e6
    words = f"{noting:.2f} µs a text, {noting / answering:.2%} of the {answering:.0f} µs that a full batch spends on it"
    return monitor.window.read()[1], words


def report(words: str, reference: Reference, answers: Answers, mixed_with: Answers | None, draws: int) -> None:
    """Print a row: how often windows of these answers are called drift, and by which figures."""
    rng = np.random.default_rng(1)
    rates, figures = [], {}
    for size in SIZES:
        called = 0
        figures = dict.fromkeys(("labels", "confidence", "length", "unknown", "truncated"), 0)
        for _ in range(draws):
            found = judge(reference, draw(rng, answers, mixed_with, size))
            called += any(one.drifted for one in found)
            for one in found:
                figures[one.name] += one.drifted
        rates.append(f"{100 * called / draws:.1f}")
    shown = ", ".join(f"{name} {100 * count / draws:.1f}" for name, count in figures.items() if count)
    print(f"| {words} | {' | '.join(rates)} | {shown or 'none'} |", flush=True)


def draw(rng: np.random.Generator, answers: Answers, mixed_with: Answers | None, size: int) -> Answers:
    """A window without repetition, a part of it foreign if there is something to mix with."""
    foreign = round(size * PART) if mixed_with is not None else 0
    own = answers.of(rng.choice(len(answers), size - foreign, replace=False))
    if mixed_with is None:
        return own
    other = mixed_with.of(rng.choice(len(mixed_with), foreign, replace=False))
    return Answers(*(np.concatenate([getattr(one, name) for one in (own, other)]) for name in Answers.__annotations__))


if __name__ == "__main__":
    main()
