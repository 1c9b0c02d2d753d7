"""What the container does: `run.py [verb]`, configured by environment variables only (see config.env).

train-serve   open the port, train on DATASET in a child process, serve what passed, retrain when told to (the default)
train         train, judge, save, stop
serve         serve the champion of the store, and each later champion; or MODEL, without a store; or all of MODELS
multimodel    serve what a platform loads and unloads: nothing at the start (SageMaker's multi-model endpoints)
predict       write the champion's answers to the rows of INPUT to OUTPUT
doctor        say what would go wrong, before a training: settings, machine, store, data, servers; it changes nothing
versions      list what the store holds
report        write the report of a version anew, of the champion without one: report [<version>]
promote       make a version champion, whatever the gate decided: promote <version>
rollback      go back to the version before
import        make a version of a model that was trained elsewhere, for TASK: import <its folder or its name on the hub>
feedback      count the labels people have sent by day and origin; with `list`, `trust` or `remove` and an id, a day, an
              origin or one client of it: show them, let them be trained on, take them out
"""

import argparse
import hashlib
import importlib.util
import json
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneserve.signals import Stop, end_with_parent

if TYPE_CHECKING:
    from tuneserve.adapters.start import Start
    from tuneserve.settings import Settings


MOST_SERVED = 3
"""Models that `serve` has imported and that stay in the cache."""


def main(arguments: list[str]) -> int:
    """Run one verb; the exit code is 0, the error's own, or 128 + the signal's number."""
    stop = Stop()
    stop.listen()  # first: a container's process 1 ignores signals without a handler
    from tuneserve import logs
    from tuneserve.adapters.platforms import start_of
    from tuneserve.errors import TuneserveError
    from tuneserve.hardware import run_in_background, set_threads
    from tuneserve.redaction import redact, remember
    from tuneserve.settings import Settings, unquote

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "verb", nargs="?", default="train-serve", choices=[*VERBS, *STORE_VERBS, "doctor"], help="what to do"
    )
    parser.add_argument(
        "arguments", nargs="*", help="promote, report: a version; import: a model; feedback: [list|trust|remove] which"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # of a server; ends when it does
    parser.add_argument("--background", action="store_true", help=argparse.SUPPRESS)  # a model answers meanwhile
    wanted = parser.parse_args(arguments)
    check_arguments(parser, wanted.verb, wanted.arguments)
    stop.once = wanted.child or "TORCHELASTIC_RUN_ID" in os.environ
    quoted = unquote(os.environ)
    remember(os.environ)
    start = start_of("" if wanted.child else wanted.verb, os.environ)
    try:
        os.environ.update(start.variables())
        remember(os.environ)
        if wanted.verb == "doctor":  # before the settings are read, whose faults are a finding
            say_taken(quoted, wanted.verb)
            return doctor()
        settings = Settings.from_environ(os.environ)
        if wanted.verb in STORE_VERBS:
            logging.basicConfig(format="%(levelname)s %(message)s", force=True)
            say_taken(quoted, wanted.verb)
            STORE_VERBS[wanted.verb](settings, *wanted.arguments)
            return 0
        if stop.once:
            end_with_parent()
        if wanted.background:
            settings = run_in_background(settings)
        leads = os.environ.get("RANK", "0") == "0"  # of several processes that train
        logs.start(settings.log_path, speaks=leads, json_lines=settings.log_format == "json")
        say_taken(quoted, wanted.verb)
        if wanted.background and settings.retrain_nice == "idle":
            logging.getLogger(__name__).info("RETRAIN_NICE=idle: no progress is made while all cores are busy")
        threads = set_threads(settings.omp_num_threads)  # the libraries that the verbs import read it once
        require_libraries(wanted.verb)
        start.prepare()
        if (
            "RANK" not in os.environ
            and not stop.once
            and wanted.verb in SUMMARIZED
            and not (settings.model or settings.models)
        ):
            say_summary(settings, wanted.verb, threads)
        if wanted.verb == "serve" and start.folder is not None:
            serve_folder(settings, start.folder, threads)
            return 0
        VERBS[wanted.verb](settings, stop, threads, *wanted.arguments)
        if wanted.verb == "train" and start.leads:
            hand_over(settings, start)
    except SystemExit as end:
        if stop.signal is not None:
            name = signal.Signals(stop.signal).name
            logging.getLogger(__name__).info("%s: ended with exit code %s; what is saved stays", name, end.code)
        raise
    except TuneserveError as error:
        from tuneserve.training import launch

        if launch.write_error_file(error, os.environ):
            return 0
        logs.report(error)
        start.fail(str(error))
        return error.exit_code
    except Exception:  # that nobody foresaw; a library's words may repeat a URL with its password
        print(redact(traceback.format_exc()), file=sys.stderr)
        start.fail(redact(traceback.format_exc(limit=0)).strip())
        return 1
    return 0


NEEDS = {"train-serve": "torch", "train": "torch", "import": "torch", "predict": "pyarrow", "report": "matplotlib"}
"""What the image without torch lacks, by the verbs that want it."""


SUMMARIZED = ("train-serve", "train", "serve")


def say_summary(settings: "Settings", verb: str, threads: int) -> None:
    """Log what is about to be done."""
    from tuneserve.summary import summarize

    for line in summarize(settings, verb, threads=threads):
        logging.getLogger(__name__).info("%s", line)


def require_libraries(verb: str) -> None:
    """Refuse a verb where its libraries are not installed.

    Raises:
        SettingsError: one is not.
    """
    from tuneserve.errors import SettingsError

    library = NEEDS.get(verb)
    if library and importlib.util.find_spec(library) is None:
        raise SettingsError(f"{verb} needs {library}, which is not installed: this place can serve, and not {verb}.")


def say_taken(quoted: list[str], verb: str) -> None:
    """Say what was made of values that look odd: those in quotes, and for servers a key that is none."""
    logger = logging.getLogger(__name__)
    if quoted:
        logger.warning("taken without the quotes around their values: %s", ", ".join(quoted))
    if verb.endswith("serve") and not os.environ.get("API_KEY", "a key").strip():
        logger.warning("API_KEY is in the environment but empty: that is the same as no key")


def train(settings: "Settings", stop: Stop, threads: int) -> None:
    """Train a version and publish it, in this process or in several."""
    from tuneserve.training import launch

    require_trainable(settings)
    if launch.is_asked_for(settings, os.environ):
        launch.run(settings, stop, os.environ, threads=threads)
        return
    from tuneserve.training import job

    job.train(settings, stop, threads=threads, environ=os.environ)


def serve(settings: "Settings", stop: Stop, threads: int) -> None:
    """Answer requests until a signal arrives, with the champion of the store, or with MODEL, imported in a child."""
    from tuneserve.files import in_use, mark_used
    from tuneserve.serving.http import server

    if settings.models or os.environ.get("SAGEMAKER_MULTI_MODEL") == "true":
        multimodel(settings, stop, threads)
        return
    if not settings.model:
        server.serve(settings, threads=threads, environ=os.environ)
        return
    named = json.dumps([settings.task, settings.model, settings.model_revision])
    served = settings.data_path / "served"
    folder = served / hashlib.sha256(named.encode()).hexdigest()[:16]
    settings = settings.model_copy(update={"model_path": folder})
    mark_used(folder)
    with in_use(served, ".", most=MOST_SERVED):
        server.serve(settings, threads=threads, **child(settings, "import", settings.model))


def serve_folder(settings: "Settings", folder: Path, threads: int) -> None:
    """Serve what a platform has put into a folder until a signal arrives."""
    from tuneserve.adapters.catalog import adapters_of
    from tuneserve.serving.http import server

    made = child(settings, "import")
    server.serve_folder(
        settings,
        folder,
        threads=threads,
        importing=made["training"][:-1],
        environ=made["environ"],
        adapters=adapters_of(settings, environ=os.environ),
    )


def hand_over(settings: "Settings", start: "Start") -> None:
    """Put the champion where the platform looks for it."""
    from tuneserve.lifecycle.store import Store

    start.hand_over(Store(settings.model_path).champion().folder)


def multimodel(settings: "Settings", stop: Stop, threads: int) -> None:
    """Serve models that come and go until a signal arrives."""
    from tuneserve.serving.http import server

    made = child(settings, "import")
    server.serve_many(settings, threads=threads, importing=made["training"][:-1], environ=made["environ"])


def child(settings: "Settings", *arguments: str) -> dict[str, Any]:
    """What makes a server's versions: this program with other arguments, and its environment."""
    environ = {
        **os.environ,
        "MODEL_PATH": str(settings.model_path),
        # As the user set it (`auto`): set_threads has put a number into the same variable.
        "OMP_NUM_THREADS": str(settings.omp_num_threads),
    }
    return {"training": [sys.executable, str(Path(__file__).resolve()), *arguments, "--child"], "environ": environ}


def require_trainable(settings: "Settings") -> None:
    """Refuse to train what is only served.

    Raises:
        SettingsError: TASK is not classification, or MODEL is set, which is served as it is.
    """
    from tuneserve.errors import SettingsError

    if settings.task != "text-classification":
        raise SettingsError(f"TASK={settings.task} is not trained here: name a model in MODEL, and `serve` it.")
    if settings.model:
        raise SettingsError("MODEL is what `serve` answers with as it is; a model to fine-tune is named in BASE_MODEL.")


def predict(settings: "Settings", stop: Stop, threads: int) -> None:
    """Score a file, or this process's share of it; a signal ends it at once, and finished parts stay."""
    from tuneserve.scoring import job

    job.score(settings, threads=threads, environ=os.environ)


def bring_in(settings: "Settings", stop: Stop, threads: int, model: str) -> None:
    """Make a version of a model that was trained elsewhere."""
    from tuneserve.training import imported

    imported.bring_in(model, settings, threads=threads)


def check_arguments(parser: argparse.ArgumentParser, verb: str, arguments: list[str]) -> None:
    """End with usage if these are not the verb's arguments."""
    fits = {
        "promote": len(arguments) == 1,
        "import": len(arguments) == 1,
        "report": len(arguments) <= 1,
        "feedback": re.fullmatch(r"|list( \S+)?|(trust|remove) \S+", " ".join(arguments)) is not None,
    }
    if not fits.get(verb, not arguments):
        parser.error(f"{verb} takes {TAKES.get(verb, 'no argument: it is configured by the environment')}")


def train_serve(settings: "Settings", stop: Stop, threads: int) -> None:
    """Serve the champion at once, train in a child process, and serve what passes the gate."""
    from tuneserve.serving.http import server

    if settings.models or (settings.model and settings.task != "text-classification"):  # there is nothing to train
        serve(settings, stop, threads)
        return
    require_trainable(settings)
    server.serve(settings, threads=threads, **child(settings, "train"))


def doctor() -> int:
    """Print what would go wrong; 2 if something would, else 0."""
    from tuneserve.doctor import report

    return report(os.environ, sys.stdout)


def versions(settings: "Settings") -> None:
    """Print a table of the store's versions."""
    from tuneserve.lifecycle.store import Store

    print(Store(settings.model_path).table())


def report(settings: "Settings", version: str = "") -> None:
    """Write a version's report, and say where it is."""
    from tuneserve.lifecycle.store import Store
    from tuneserve.report.writing import write_report

    require_libraries("report")
    store = Store(settings.model_path)
    print(write_report(store, store.version(version) if version else store.champion(), settings))


def promote(settings: "Settings", version: str) -> None:
    """Move the champion's pointer to a version."""
    from tuneserve.lifecycle.store import Store

    chosen = Store(settings.model_path).promote(version)
    print(f"{chosen.id} is the champion; servers change over when they have loaded it")


def feedback(settings: "Settings", act: str = "", which: str = "") -> None:
    """Count the labels that people have sent, or list them, trust them or remove them."""
    from tuneserve.lifecycle import feedback_database as database

    path = settings.model_path / database.FILE
    if not act:
        print(database.counts_table(path))
    elif act == "list":
        print(database.labels_table(path, which))
    elif act == "trust":
        print(f"{database.trust(path, which)} labels count as yours: the next training uses them")
    else:
        print(f"{database.remove(path, which)} labels removed")


def rollback(settings: "Settings") -> None:
    """Move the champion's pointer back."""
    from tuneserve.lifecycle.store import Store

    now, withdrawn = Store(settings.model_path).rollback()
    print(f"{now.id} is the champion again, {withdrawn} is withdrawn; servers that still hold it change over at once")


VERBS: dict[str, Callable[..., None]] = {
    "train-serve": train_serve,
    "train": train,
    "serve": serve,
    "multimodel": multimodel,
    "predict": predict,
    "import": bring_in,
}
STORE_VERBS: dict[str, Callable[..., None]] = {
    "versions": versions,
    "report": report,
    "promote": promote,
    "rollback": rollback,
    "feedback": feedback,
}

TAKES = {
    "report": "a version's id, or nothing for the champion",
    "promote": "a version's id; `versions` lists them",
    "import": "a model's Hugging Face folder, or its name on the hub",
    "feedback": "nothing, or list, trust or remove, and which labels: an id, a day, an origin or one client of it",
}
"""The arguments of the verbs that have some."""

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
