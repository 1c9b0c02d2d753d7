"""Versions put to the test in a process of their own: `python -m tuneserve.serving.trial ASKED ANSWER`.

ASKED is JSON, `{"versions": [folder], "texts": [text], "settings": {}}`. ANSWER becomes a list with an object for each:
`error` (a sentence, null if all went well), `predicted` (a label a text), `latency_ms` (of a single text), `bytes`.
The gate starts it: what a server would meet, it meets, and a version that crashes takes nobody with it.
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuneserve.artifact import read_version
from tuneserve.errors import TextError, TuneserveError
from tuneserve.hardware import set_threads
from tuneserve.serving.classifier import Classifier, load_classifier
from tuneserve.settings import Settings

LATENCY_TEXT = "The parcel came two days late, and the box was torn, but what was in it is what I had hoped for."
ROUNDS = 40


def main(asked: Path, answer: Path) -> None:
    """Try each version; what goes wrong with one is part of the answer."""
    wanted = json.loads(asked.read_text(encoding="utf-8"))
    settings = Settings.model_validate(wanted["settings"])
    threads = set_threads(settings.omp_num_threads)
    found: list[dict[str, Any]] = []
    loaded: dict[int, Classifier] = {}
    for place, folder in enumerate(wanted["versions"]):
        found.append({"error": None, "predicted": [], "latency_ms": None, "bytes": 0})
        try:
            version = read_version(Path(folder))
            found[place]["bytes"] = sum((version.metadata.get("files") or {}).values())
            loaded[place] = load_classifier(version, settings, threads=threads)
            found[place]["predicted"] = [_label(one) for one in loaded[place].predict(wanted["texts"])]
        except TuneserveError as error:
            found[place]["error"] = str(error)
            loaded.pop(place, None)
    for place, milliseconds in zip(loaded, time_single_text(list(loaded.values())), strict=True):
        found[place]["latency_ms"] = round(milliseconds, 3)
    answer.write_text(json.dumps(found), encoding="utf-8")


def _label(prediction: Any) -> str | None:
    return None if isinstance(prediction, TextError) else prediction.label


def time_single_text(classifiers: Sequence[Classifier]) -> list[float]:
    """Milliseconds of one text through each, in turns, so that what else the machine does hits all alike."""
    times: list[list[float]] = [[] for _ in classifiers]
    for _ in range(ROUNDS):
        for place, classifier in enumerate(classifiers):
            began = time.perf_counter()
            classifier.predict([LATENCY_TEXT])
            times[place].append(1000 * (time.perf_counter() - began))
    return [statistics.median(one) for one in times]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
