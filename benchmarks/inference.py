"""What benchmarks/serve.py knows of a version without any server: `inference.py VERB` reads JSON, prints a line of it.

reference      labels of texts by the version's weights in torch, fp32, one by one: what every server should answer
engine-alone   how fast the classifier answers in a process of its own, and what share of the machine's rate that is
"""

import asyncio
import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

PRODUCTION = Path(__file__).resolve().parents[1] / "production" / "docker-res"
sys.path.insert(0, str(PRODUCTION))

from tuneserve.hardware import set_threads

THREADS = set_threads("auto")

from tuneserve.artifact import read_version
from tuneserve.errors import TuneserveError
from tuneserve.settings import Settings
from tuneserve.tasks.catalog import load_model
from tuneserve.text import TextEncoder

Texts = dict[str, list[str]]
BATCHES = (1, 32, 256)
"""Texts in one call of the classifier."""


def reference(*, checkpoint: str, texts: Texts) -> dict[str, list[str]]:
    """The label of every text, by transformers, without batches."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()
    max_tokens = read_version(Path(checkpoint)).metadata["settings"]["num_max_positions"]

    def label(text: str) -> str:
        inputs = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")
        return str(model.config.id2label[int(model(**inputs).logits.argmax())])

    with torch.inference_mode():
        return {name: [label(text) for text in some] for name, some in texts.items()}


async def engine_alone(*, checkpoint: str, texts: Texts, body: int, flops: float, seconds: int) -> list[dict[str, Any]]:
    """How fast the model answers, tokens, queue and all, without a server around it.

    Args:
        checkpoint: the version's folder.
        texts: what is asked, by name.
        body: weights that a token is multiplied by; each is one multiplication and one addition.
        flops: the machine's measured rate of products, in operations a second.
        seconds: how long each measurement takes at least.

    Returns:
        For each kind of texts and each size of a call `texts_per_s`, `tokens_per_s` (padding left out), and
        `rate_share`, the share of `flops` that these tokens need.
    """
    version = read_version(Path(checkpoint))
    encoder = TextEncoder.from_folder(version.folder, max_tokens=version.metadata["settings"]["num_max_positions"])
    settings = Settings.from_environ({})
    model = load_model(version, settings, threads=THREADS)
    rows = []
    for name, some in texts.items():
        tokens = sum(len(one.ids) for one in encoder.encode(some)) / len(some)
        for size in BATCHES:
            await model.answer(some[:size])  # whatever is done once is done now
            began, answered = time.perf_counter(), 0
            while (taken := time.perf_counter() - began) < seconds:
                first = answered % len(some)
                answered += len(await model.answer(some[first : first + size]))
            rate = answered / taken
            needed = 2 * body * tokens * rate
            figures = {"texts_per_s": rate, "tokens_per_s": rate * tokens, "rate_share": needed / flops}
            rows.append({"texts": name, "at_once": size, **figures})
    return rows


if __name__ == "__main__":
    verb, values = sys.argv[1], json.loads(sys.stdin.read())
    try:
        with redirect_stdout(sys.stderr):  # whatever the libraries print
            answer: Any = reference(**values) if verb == "reference" else asyncio.run(engine_alone(**values))
    except TuneserveError as error:
        sys.exit(str(error))
    print(json.dumps(answer))
