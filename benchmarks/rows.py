"""Seconds and memory of all that a job does with its texts before and beside the model, by number of rows.

    .venv/bin/python benchmarks/rows.py [--rows 1000000] [--kinds csv json parquet] [--base-model FOLDER]

Prepares made-up rows, each kind of file in a process of its own, and prints a Markdown row a stage. "Cores" is CPU
time by wall time. Memory is the peak of RssAnon, which the kernel cannot take back as it can the pages of a mapped
file, less what libraries and tokenizer hold; a second process looks at it every 2 ms.
"""

import argparse
import csv
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "production" / "docker-res"
sys.path.insert(0, str(PACKAGE))
SPAWN = multiprocessing.get_context("spawn")
NAMES = ["text", "label"]


def blocks(rows: int, block_rows: int = 10_000) -> Iterator[list[list[str]]]:
    """Texts, two runs of the sample's words each, about 30 words in all, and labels; 2% repeat or are empty."""
    import numpy as np

    with (PACKAGE / "data" / "train.csv").open(encoding="utf-8") as file:
        words = [word for row in csv.DictReader(file) for word in row["text"].split()]
    rng = np.random.default_rng(0)
    for first in range(0, rows, block_rows):
        count = min(block_rows, rows - first)
        begins = rng.integers(0, len(words), (2, count))
        ends = begins + 1 + rng.lognormal(2.5, 0.6, (2, count)).astype(int)
        runs = zip(*begins.tolist(), *ends.tolist(), strict=True)
        texts = [" ".join(words[a:b] + words[c:d]) for a, c, b, d in runs]
        for place in range(50, count, 50):
            texts[place] = "" if place % 500 == 0 else texts[place - 50 + place % 7].upper()
        yield [texts, rng.choice(["negative", "positive"], count).tolist()]


def write(path: Path, rows: int) -> None:
    """Rows as one row group or one array, which are the hardest to read bit by bit."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        pq.write_table(pa.concat_tables(pa.table(block, names=NAMES) for block in blocks(rows)), path)
        return
    pairs = (pair for block in blocks(rows) for pair in zip(*block, strict=True))
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            csv.writer(file).writerows([NAMES, *pairs])
        else:
            records = (json.dumps({"text": text, "label": label}) for text, label in pairs)
            file.writelines([f"[{next(records)}", *(f",\n{record}" for record in records), "]"])


def prepare(path: Path, base_model: str, cache: Path) -> Iterator[str]:
    """What a job does with a file; yields the name of each stage when it is over."""
    from tuneserve.hardware import set_threads

    set_threads("auto")
    import numpy as np
    import torch

    from tuneserve.tables.rows import Columns
    from tuneserve.text import TextEncoder
    from tuneserve.training import base_model as bases
    from tuneserve.training import checks, data, evaluation
    from tuneserve.training.tokens import collate, shuffled_batches, tokenize

    cpu = torch.device("cpu")
    folder = bases.resolve(base_model or bases.PACKAGED, revision="", cache=cache).folder
    encoder = TextEncoder.from_folder(folder, max_tokens=256)
    yield "start"
    sources = data.read(str(path), Columns(), cache=cache)
    yield "read"
    splits = checks.check(sources, num_train=0, num_test=0, valid_fraction=0.1, test_fraction=0.1, seed=0)
    yield "check, split"
    for name in ("tokenize", "tokenize again"):
        train, _, test = (tokenize(one, encoder, cache=cache) for one in (splits.train, splits.valid, splits.test))
        yield name
    for rows in shuffled_batches(train.lengths, 32, np.random.default_rng(0)):
        collate(train, rows, cpu)
    yield "an epoch's batches"
    guess = torch.zeros(1, len(splits.labels))
    logits = evaluation.predict_logits(lambda _: guess, test, labels=len(splits.labels), device=cpu)
    evaluation.score(logits, test.label_ids, splits.labels)
    yield "figures of the test"


def anonymous_kib(process: int) -> int:
    return int(Path(f"/proc/{process}/status").read_text().partition("RssAnon:")[2].split()[0])


def watch(process: int, peak_kib) -> None:
    while os.getppid() == process:
        peak_kib.value = max(peak_kib.value, anonymous_kib(process))
        time.sleep(0.002)


def measure(stages: Iterator[str], kind: str) -> None:
    """Print a row for each stage; the first is only the start."""
    peak_kib = SPAWN.Value("q", 0)
    SPAWN.Process(target=watch, args=(os.getpid(), peak_kib), daemon=True).start()
    next(stages)
    before_kib = peak_kib.value = anonymous_kib(os.getpid())
    began, began_cpu = time.perf_counter(), time.process_time()
    for stage in stages:
        wall, cpu = time.perf_counter() - began, time.process_time() - began_cpu
        mib = (max(peak_kib.value, anonymous_kib(os.getpid())) - before_kib) / 1024
        print(f"| {kind} | {stage} | {wall:.1f} | {cpu / wall:.1f} | {mib:.1f} |", flush=True)
        peak_kib.value, began, began_cpu = 0, time.perf_counter(), time.process_time()


def run(path: Path, base_model: str) -> None:
    measure(prepare(path, base_model, path.parent), path.suffix[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kinds", nargs="+", default=["csv", "json", "parquet"])
    parser.add_argument("--base-model", default="")
    options = parser.parse_args()
    print("| file | stage | s | cores | peak MiB |\n|---|---|---|---|---|", flush=True)
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"rows.{kind}")
            write(path, options.rows)
            process = SPAWN.Process(target=run, args=(path, options.base_model))
            process.start()
            process.join()
        if process.exitcode:
            sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
