"""Versions put to the test in a process of their own: `python -m tuneserve.serving.probe < ASKED > ANSWER`.

ASKED is JSON, `{"versions": [folder], "texts": [text], "settings": {}}`. ANSWER is a list with an object for each:
`error` (a sentence, null if all went well), `predicted` (a label a text), `latency_ms` (of a single text), `bytes`.
The gate starts it: what a server would meet, it meets, and a version that crashes takes nobody with it.
"""

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuneserve.artifact import read_version
from tuneserve.errors import EngineError, TuneserveError
from tuneserve.hardware import set_threads
from tuneserve.serving.model import Answer, Model
from tuneserve.settings import Settings
from tuneserve.tasks.catalog import load_model

LATENCY_TEXT = "The parcel came two days late, and the box was torn, but what was in it is what I had hoped for."
ROUNDS = 40


async def probe(wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """Try each version; what goes wrong with one is part of the answer."""
    settings = Settings.model_validate(wanted["settings"])
    threads = set_threads(settings.omp_num_threads)
    found: list[dict[str, Any]] = []
    loaded: dict[int, Model] = {}
    for index, folder in enumerate(wanted["versions"]):
        found.append({"error": None, "predicted": [], "latency_ms": None, "bytes": 0})
        try:
            version = read_version(Path(folder))
            found[index]["bytes"] = sum((version.metadata.get("files") or {}).values())
            model = load_model(version, settings, threads=threads)
            found[index]["predicted"] = [_label(one) for one in await model.answer(wanted["texts"])]
            loaded[index] = model
        except TuneserveError as error:
            found[index]["error"] = str(error)
    for index, milliseconds in zip(loaded, await time_single_text(list(loaded.values())), strict=True):
        found[index]["latency_ms"] = round(milliseconds, 3)
    return found


def _label(answer: Answer | TuneserveError) -> str | None:
    if isinstance(answer, EngineError):
        raise answer
    return answer.verdict[0] if isinstance(answer, Answer) and answer.verdict is not None else None


async def time_single_text(models: Sequence[Model]) -> list[float]:
    """Milliseconds of one text through each, in turns, so that what else the machine does hits all alike."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(ROUNDS):
        for index, model in enumerate(models):
            began = time.perf_counter()
            await model.answer([LATENCY_TEXT])
            times[index].append(1000 * (time.perf_counter() - began))
    return [statistics.median(one) for one in times]


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)  # what libraries print is no part of the answer
        json.dump(asyncio.run(probe(json.load(sys.stdin))), answer)
