"""Few texts: the job with its defaults against a logistic regression and a word count, on draws from larger data sets.

    .venv/bin/python benchmarks/few.py --data FOLDER [--cells sst2:100,trec:500] [--draws 3] [--tests 500]

FOLDER holds `sst2/`, `banking77/`, `trec/` as DATASET may hold them; `bank8` are eight of banking77's intents. A cell
draws so many training texts, two of each label at least, and tests on others. Prints a Markdown row a draw.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT / "production" / "docker-res"))

from tuneserve.hardware import set_threads

THREADS = set_threads("auto")

import numpy as np
import torch
import transformers
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from tuneserve.settings import Settings
from tuneserve.tables.rows import Columns
from tuneserve.text import TextEncoder
from tuneserve.training import base_model
from tuneserve.training.data import read
from tuneserve.training.few import choose_start, draw_folds, read_features
from tuneserve.training.model import build_model, load_tokenizer
from tuneserve.training.tokens import TokenizedSplit

RUN = PROJECT / "production" / "docker-res" / "run.py"
CELLS = "sst2:100,sst2:500,bank8:50,bank8:100,bank8:200,banking77:600,trec:100,trec:500"
INTENTS = 8
MAX_TOKENS = 256
Rows = list[tuple[str, str]]


def draw(data: Path, name: str, count: int, tests: int, seed: int) -> tuple[Rows, Rows]:
    """Training texts, two of each label at least, and test texts, with their labels."""
    folder = data / ("banking77" if name == "bank8" else name)
    sources = {
        split: list(zip(one.rows["text"], one.rows["label"], strict=True))
        for split, one in read(str(folder), Columns(), cache=PROJECT / "data").items()
    }
    rng = np.random.default_rng(seed)
    rows = sources["train"]
    if name == "bank8":
        chosen = set(rng.choice(sorted({label for _, label in rows}), INTENTS, replace=False))
        rows = [row for row in rows if row[1] in chosen]
    rows = [rows[index] for index in rng.permutation(len(rows))]
    seen: dict[str, int] = {}
    first, rest = [], []
    for row in rows:
        seen[row[1]] = seen.get(row[1], 0) + 1
        (first if seen[row[1]] <= 2 else rest).append(row)
    cut = count - len(first)
    others = sources.get("test") or sources.get("valid") or rest[cut:]
    held = [others[index] for index in np.random.default_rng(0).permutation(len(others))[:tests]]
    return first + rest[:cut], held


def by_job(train: Rows, test: Rows) -> dict[str, Any]:
    """The job with its defaults, as a user starts it."""
    own = {name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields}
    with tempfile.TemporaryDirectory() as folder:
        for split, rows in (("train", train), ("test", test)):
            with Path(folder, f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("text", "label"), *rows])
        paths = {f"{name}_PATH": str(Path(folder, name)) for name in ("MODEL", "DATA", "LOG")}
        command = [sys.executable, str(RUN), "train"]
        subprocess.run(command, env=own | paths | {"DATASET": folder, "REPORT": "0"}, check=True, capture_output=True)
        store = Path(paths["MODEL_PATH"])
        version = store / "versions" / (store / "champion").read_text(encoding="utf-8").strip()
        found: dict[str, Any] = json.loads((version / "metadata.json").read_text(encoding="utf-8"))
        return found


def by_regression(train: Rows, test: Rows) -> float:
    """A logistic regression on what the base model says of the texts, its strength chosen by cross-validation."""
    labels = sorted({label for _, label in train})
    base = base_model.resolve(base_model.PACKAGED, revision="", cache=PROJECT / "data")
    tokenizer = load_tokenizer(base.folder, max_tokens=MAX_TOKENS)
    encoder = TextEncoder.from_json(tokenizer.backend_tokenizer.to_str(), max_tokens=MAX_TOKENS)
    model = build_model(base.folder, labels, dropout=0.0, seed=0, device=torch.device("cpu"), reads_mean=True)
    splits = [_tokenize(rows, encoder, labels) for rows in (train, test)]
    features = [read_features(model, split) for split in splits]
    assert features[0] is not None
    assert features[1] is not None
    label_ids = splits[0].label_ids
    start = choose_start(features[0], label_ids, len(labels), draw_folds(label_ids, 0), None)
    weights, bias = start.fit(np.arange(len(train)))
    return float(((features[1] @ weights.T + bias).argmax(1) == splits[1].label_ids).mean())


def by_words(train: Rows, test: Rows) -> float:
    """TF-IDF of words and pairs of words, and a logistic regression."""
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=500)
    )
    model.fit(*zip(*train, strict=True))
    return float(model.score(*zip(*test, strict=True)))


def _tokenize(rows: Rows, encoder: TextEncoder, labels: list[str]) -> TokenizedSplit:
    found = encoder.encode([text for text, _ in rows])
    return TokenizedSplit(
        ids=np.concatenate([np.array(one.ids, dtype=np.int32) for one in found]),
        starts=np.r_[0, np.cumsum([len(one.ids) for one in found])],
        label_ids=np.array([labels.index(label) for _, label in rows]),
        truncated=np.array([one.truncated for one in found]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cells", default=CELLS)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--tests", type=int, default=500)
    options = parser.parse_args()
    torch.set_num_threads(int(THREADS))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print("| texts | draw | job % | ECE % | fine-tuned % | job s | regression % | words % |\n" + "|---" * 8 + "|")
    for cell in options.cells.split(","):
        name, count = cell.split(":")
        for seed in range(options.draws):
            train, test = draw(options.data, name, int(count), options.tests, seed)
            job = by_job(train, test)
            tested, share = job["metrics"]["test"], job.get("cross_validation", {}).get("share_of_fine_tuning", 1.0)
            print(
                f"| {name}, {count} | {seed} | {100 * tested['accuracy']:.1f} | {100 * tested['ece']:.1f} "
                f"| {100 * share:.0f} | {job['duration_s']:.0f} | {100 * by_regression(train, test):.1f} "
                f"| {100 * by_words(train, test):.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
