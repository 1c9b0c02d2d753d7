"""Compare initializations of the pooler, learning rates and dropouts on a data set's validation texts.

    .venv/bin/python benchmarks/recipes.py DATASET [--epochs 1] [--seeds 3] [--max-tokens 256]

Prints a Markdown row a recipe: accuracy by seed, mean, and texts/s of the loop. docs/decisions/0002 has its results.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT / "production" / "docker-res"))

from tuneserve.hardware import choose_precision, set_threads

THREADS = set_threads("auto")

import numpy as np
import torch
import transformers
from torch import nn

from tuneserve.tables.rows import Columns
from tuneserve.text import TextEncoder
from tuneserve.training import base_model, checks, data
from tuneserve.training.checkpoint import NoCheckpoints
from tuneserve.training.loop import Recipe, Run, fit_model
from tuneserve.training.model import build_model, load_tokenizer
from tuneserve.training.tokens import tokenize


def keep(pooler: nn.Linear) -> None:
    """The checkpoint's pooler."""


def draw(pooler: nn.Linear) -> None:
    """A new pooler, drawn as BERT draws."""
    nn.init.normal_(pooler.weight, std=0.02)
    nn.init.zeros_(pooler.bias)


def pass_through(pooler: nn.Linear) -> None:
    """A pooler that at first only passes the first token's state through its tanh."""
    nn.init.eye_(pooler.weight)
    nn.init.zeros_(pooler.bias)


RECIPES: list[tuple[Callable[[nn.Linear], None], float, float]] = [
    (keep, 5e-5, 0.0),
    (keep, 1e-4, 0.0),
    (keep, 2e-4, 0.0),
    (keep, 5e-5, 0.1),
    (keep, 1e-4, 0.1),
    (draw, 1e-4, 0.0),
    (pass_through, 1e-4, 0.0),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=256)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    cache = PROJECT / "data"
    device = torch.device("cpu")
    precision = choose_precision("auto", device)
    base = base_model.resolve(base_model.PACKAGED, revision="", cache=cache)
    tokenizer = load_tokenizer(base.folder, max_tokens=options.max_tokens)
    encoder = TextEncoder.from_json(tokenizer.backend_tokenizer.to_str(), max_tokens=options.max_tokens)
    splits = checks.check(
        data.read(options.dataset, Columns(), cache=cache),
        num_train=0,
        num_test=0,
        valid_fraction=0.1,
        test_fraction=0.1,
        seed=0,
    )
    train, valid = tokenize(splits.train, encoder, cache=cache), tokenize(splits.valid, encoder, cache=cache)
    print(
        f"{options.dataset}: {len(train)} texts, {options.epochs} epoch(s), accuracy on {len(valid)} texts, {precision}"
    )
    print("| pooler | LR | dropout | accuracy by seed | mean | texts/s |\n|---|---|---|---|---|---|")
    for start, rate, dropout in RECIPES:
        accuracies, speeds = [], []
        for seed in range(options.seeds):
            model = build_model(base.folder, splits.labels, dropout=dropout, seed=seed, device=device)
            start(model.base_model.pooler.dense)
            recipe = Recipe(epochs=options.epochs, batch_size=32, learning_rate=rate, max_norm=1.0, seed=seed)
            tokens, run = {"train": train, "valid": valid}, Run(NoCheckpoints())
            seen = fit_model(model, tokens, splits.labels, recipe, run, precision=precision)
            accuracies.append(100 * seen.history[-1]["validation_accuracy"])
            speeds.append(seen.texts / seen.fit_s)
        shown = " ".join(f"{accuracy:.1f}" for accuracy in accuracies)
        mean, speed = np.mean(accuracies), np.median(speeds)
        print(f"| {start.__name__} | {rate:g} | {dropout:g} | {shown} | {mean:.1f} | {speed:.0f} |", flush=True)


if __name__ == "__main__":
    main()
