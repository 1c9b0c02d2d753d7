"""What all contenders of benchmarks/train.py share: `conditions.py VERB JSON` prints one line of JSON.

prepare   write the texts that every contender reads
survey    find a base model, count its weights, and time how fast this machine multiplies matrices
"""

import csv
import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT / "production" / "docker-res"))

from tuneserve.hardware import choose_device, choose_precision, set_threads

THREADS = set_threads("auto")

import torch
import transformers

from tuneserve.errors import BaseModelError, TuneserveError
from tuneserve.network.forward import NUMBER_FORMAT
from tuneserve.tables.rows import Columns
from tuneserve.text import plain
from tuneserve.training import base_model, checks
from tuneserve.training.data import read

CACHE = PROJECT / "data"
HUB = {"sst2": "stanfordnlp/sst2", "imdb": "stanfordnlp/imdb"}
RANDOM_BERT = "google-bert/bert-base-uncased"
"""Where this one cannot be had, weights drawn by chance take its place: just as fast, and without knowledge."""

VALID_FRACTION, TEST_FRACTION = 0.1, 0.2
SQUARE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices whose product is timed: enough to fill the device."""

PRODUCTS = 20


def prepare(*, texts: str, data: str, folder: str, num_train: int, num_test: int) -> dict[str, int]:
    """Write `train.csv`, `valid.csv` and `test.csv`, mended as the job mends them and without HTML line breaks.

    They come from the folder `data/texts`, which may hold what DATASET may hold, or else from the hub. Without a test
    file the validation file is the test; what is still missing is split off the training texts.

    Returns:
        How many texts `train`, `valid` and `test` hold.
    """
    local = Path(data, texts)
    sources = read(str(local) if local.is_dir() else HUB[texts], Columns(), cache=CACHE)
    if "test" not in sources and "valid" in sources:
        sources["test"] = sources.pop("valid")
    splits = checks.check(
        sources,
        num_train=num_train,
        num_test=num_test,
        valid_fraction=VALID_FRACTION,
        test_fraction=TEST_FRACTION,
        seed=0,
    )
    parts = {"train": splits.train, "valid": splits.valid, "test": splits.test}
    Path(folder).mkdir()
    for name, split in parts.items():
        labels = [splits.labels[place] for place in split.label_ids]
        with Path(folder, f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            rows = zip(map(plain, split.texts["text"]), labels, strict=True)
            csv.writer(file).writerows([("text", "label"), *rows])
    return {name: len(split) for name, split in parts.items()}


def survey(*, name: str, folder: str, device: str) -> dict[str, Any]:
    """Find a base model, and measure what its training could at best reach here.

    Returns:
        `folder` of the model; `pretrained`, whether its weights were learned; `body`, the number of its weights outside
        embeddings and pooler; `rates`, the best rate of products in fp32 and `precision`, in operations a second;
        `precision`, the one that the device computes in, and its rate, `flops`; `threads`.
    """
    chosen, _ = choose_device(device)  # refuses a GPU that is not there
    torch.set_num_threads(THREADS)
    transformers.logging.set_verbosity_error()
    try:
        found, pretrained = base_model.resolve(name, revision="", cache=CACHE).folder, True
    except BaseModelError:
        if name != RANDOM_BERT:
            raise
        found, pretrained = draw_bert(Path(folder)), False
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(found))
    body = sum(one.numel() for key, one in model.named_parameters() if "embeddings" not in key and "pooler" not in key)
    precision = choose_precision("auto", chosen)
    # Where the device has no bf16, it is emulated: minutes for one product.
    rates = {name: measure_products(device, NUMBER_FORMAT[name]) for name in dict.fromkeys(("fp32", precision))}
    return {
        "folder": str(found),
        "pretrained": pretrained,
        "body": body,
        "precision": precision,
        "flops": rates[precision],
        "rates": rates,
        "threads": THREADS,
    }


def draw_bert(folder: Path) -> Path:
    """BERT-base with random weights; its vocabulary is the default base model's, which is the same."""
    packaged = base_model.resolve(base_model.PACKAGED, revision="", cache=CACHE)
    transformers.AutoTokenizer.from_pretrained(packaged.folder).save_pretrained(folder)
    torch.manual_seed(0)
    transformers.AutoModel.from_config(transformers.BertConfig()).save_pretrained(folder)
    return folder


def measure_products(device: str, dtype: torch.dtype) -> float:
    """The best of several products of square matrices, in multiplications and additions a second."""
    size = SQUARE[device]
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    seconds = []
    for _ in range(PRODUCTS):
        began = time.perf_counter()
        torch.mm(left, right)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


if __name__ == "__main__":
    verb, values = sys.argv[1:]
    try:
        with redirect_stdout(sys.stderr):  # whatever the libraries print
            answer = {"prepare": prepare, "survey": survey}[verb](**json.loads(values))
    except TuneserveError as error:
        sys.exit(str(error))
    print(json.dumps(answer))
