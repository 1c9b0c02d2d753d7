"""Versions put to the test in a process of their own: `python -m tuneserve.serving.probe < ASKED > ANSWER`.

ASKED is JSON, `{"versions": [folder], "texts": [text], "labels": [label], "settings": {}}`. ANSWER is a list with an
object for each: `error` (a sentence, null if all went well), `predicted` (a label a text), `latency_ms` (of a single
text), `bytes`; and of the first version, if the texts' labels are given, `answers`, as `Answers` has them.
The gate starts it: what a server would meet, it meets, and a version that crashes takes nobody with it.
"""

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tuneserve.artifact import read_version
from tuneserve.errors import EngineError, NotFoundError, TimeoutExceededError, TuneserveError
from tuneserve.hardware import set_threads
from tuneserve.lifecycle.answers import Answers, Words
from tuneserve.serving.model import Answer, Model
from tuneserve.settings import Settings
from tuneserve.tasks.catalog import load_model
from tuneserve.tasks.explanation import Explanation, explain

LATENCY_TEXT = "The parcel came two days late, and the box was torn, but what was in it is what I had hoped for."
ROUNDS = 40

MOST_MISTAKES = 20
"""Mistakes whose words are looked for, the most confident ones."""
WORDS_S = 20.0
"""Seconds for it; a report does without the words of the others."""
DIGITS = 6


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
            answers = await model.answer(wanted["texts"])
            found[index]["predicted"] = [_label(one) for one in answers]
            loaded[index] = model
            if index == 0 and wanted.get("labels") is not None:
                found[index]["answers"] = asdict(await look_closer(model, wanted["texts"], wanted["labels"], answers))
        except TuneserveError as error:
            found[index]["error"] = str(error)
    for index, milliseconds in zip(loaded, await time_single_text(list(loaded.values())), strict=True):
        found[index]["latency_ms"] = round(milliseconds, 3)
    return found


async def look_closer(
    model: Model, texts: Sequence[str], labels: Sequence[str], found: Sequence[Answer | TuneserveError]
) -> Answers:
    """What a report says of these answers, with the words behind the most confident mistakes."""
    certain = {}
    for index, (one, label) in enumerate(zip(found, labels, strict=True)):
        if isinstance(one, Answer) and one.verdict is not None and one.verdict[0] != label:
            certain[index] = one.verdict[1]
    words = []
    deadline = time.monotonic() + WORDS_S
    for index in sorted(certain, key=lambda index: -certain[index])[:MOST_MISTAKES]:
        with suppress(NotFoundError, TimeoutExceededError):
            [one] = await explain(model, texts[index], None, deadline)
            if isinstance(one, Explanation):
                weights = [round(weight, DIGITS) for weight in one.weights]
                words.append(Words(index, list(one.spans), weights))
    return Answers(
        scores=[
            [round(one.probabilities.get(label, 0.0), DIGITS) for label in model.labels]
            if isinstance(one, Answer)
            else []
            for one in found
        ],
        tokens=[getattr(one, "tokens", 0) for one in found],
        truncated=[isinstance(one, Answer) and one.truncated for one in found],
        words=words,
    )


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
