"""What packing brings to the torch engine: texts end to end against padded rows, the same model and texts, in turns.

    .venv/bin/python benchmarks/packed.py --short short.csv --long long.csv [--device cuda --precision bf16]

The files have a column `text`. The model is the packaged base model with a new head, whose answers mean nothing and
take as long as any. Speed is of the engine alone, without tokenizing: the median of all rounds and how far they lie
apart. Texts go in calls of so many, in their order, each call in batches of like length as the classifier makes
them; "mixed" are both files' texts in turns.
"""

import argparse
import csv
import statistics
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "production" / "docker-res"))

from tuneserve.hardware import set_threads

THREADS = set_threads("auto")

import torch

from tuneserve.network.forward import Padded
from tuneserve.serving.engines.engine import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS, infer
from tuneserve.serving.engines.torch_engine import TorchEngine
from tuneserve.settings import Settings
from tuneserve.text import TextEncoder, split_by_tokens
from tuneserve.training import base_model, model

Ids = list[list[int]]
MAX_TOKENS = 256


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        base = base_model.resolve(base_model.PACKAGED, revision="", cache=Path(folder)).folder
        cpu = torch.device("cpu")
        model.build_model(base, ["bad", "good"], dropout=0.0, seed=0, device=cpu).save_pretrained(folder)
        engines = {layout: load(Path(folder), layout, options) for layout in ("packed", "padded")}
    encoder = TextEncoder.from_folder(base, max_tokens=MAX_TOKENS)
    texts = {kind: read(getattr(options, kind), encoder, options.texts) for kind in ("short", "long")}
    texts["mixed"] = list(chain.from_iterable(zip(texts["short"], texts["long"], strict=False)))
    print("| texts | in one call | layout | texts/s | rounds | tokens/s | padding % |\n|---|---|---|---|---|---|---|")
    for kind, ids in texts.items():
        tokens = sum(map(len, ids)) / len(ids)
        for size in options.sizes:
            rates: dict[str, list[float]] = {layout: [] for layout in engines}
            for turn in range(options.rounds):
                for layout in list(engines)[:: 1 if turn % 2 else -1]:
                    rates[layout].append(rate(engines[layout], ids, size, options.seconds))
            for layout, found in rates.items():
                middle, spread = statistics.median(found), f"{min(found):.0f} to {max(found):.0f}"
                padding = 100 * padding_share(engines[layout], ids, size)
                figures = f"{middle:.0f} | {spread} | {middle * tokens:.0f} | {padding:.0f}"
                print(f"| {kind} | {size} | {layout} | {figures} |", flush=True)


def parse(arguments: list[str]) -> Any:
    parser = argparse.ArgumentParser(description="The torch engine with packed texts and with padded ones.")
    parser.add_argument("--short", type=Path, required=True)
    parser.add_argument("--long", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=512, help="of each file")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3)
    return parser.parse_args(arguments)


def load(folder: Path, layout: str, options: Any) -> TorchEngine:
    engine = TorchEngine(
        folder,
        Settings.from_environ({"DEVICE": options.device, "PRECISION": options.precision}),
        threads=THREADS,
        max_tokens=MAX_TOKENS,
        max_batch_tokens=CPU_BATCH_TOKENS if options.device == "cpu" else GPU_BATCH_TOKENS,
    )
    if layout == "padded":
        engine._forward.remove()
        engine._forward = Padded(engine._forward.model)
    engine.warm_up()
    return engine


def read(path: Path, encoder: TextEncoder, texts: int) -> Ids:
    with path.open(newline="", encoding="utf-8") as file:
        some = [row["text"] for _, row in zip(range(texts), csv.DictReader(file), strict=False)]
    return [one.ids for one in encoder.encode(some)]


def batches(engine: TorchEngine, ids: Ids, first: int, size: int) -> list[Ids]:
    texts = sorted(ids[first : first + size], key=len)
    return [texts[part] for part in split_by_tokens([*map(len, texts)], engine.max_batch_tokens)]


def padding_share(engine: TorchEngine, ids: Ids, size: int) -> float:
    all_of_them = [batch for first in range(0, len(ids), size) for batch in batches(engine, ids, first, size)]
    return 1 - sum(map(len, ids)) / sum(engine.prepare(batch).padded_tokens for batch in all_of_them)


def rate(engine: TorchEngine, ids: Ids, size: int, seconds: float) -> float:
    """Texts a second, of calls of this size."""
    answered, began = 0, time.perf_counter()
    while (taken := time.perf_counter() - began) < seconds:
        first = answered % max(1, len(ids) - size + 1)
        for batch in batches(engine, ids, first, size):
            answered += len(infer(engine, batch))
    return answered / taken


if __name__ == "__main__":
    main(sys.argv[1:])
