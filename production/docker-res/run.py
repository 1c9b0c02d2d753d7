"""What the container does: `run.py [verb]`, configured by environment variables only (see config.env).

train-serve   train on DATASET, then serve what was trained (the default)
train         train, save, stop
serve         serve the model that the store holds
predict       write the model's answers to the rows of INPUT to OUTPUT
"""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from tuneserve.signals import Stop

if TYPE_CHECKING:
    from tuneserve.settings import Settings


def main(arguments: list[str]) -> int:
    """Run one verb; the exit code is 0, the error's own, or 128 + the signal's number."""
    stop = Stop()
    stop.listen()  # before all else: a container's first process ignores the signals that it does not listen to
    from tuneserve import logs
    from tuneserve.errors import TuneserveError
    from tuneserve.hardware import set_threads
    from tuneserve.settings import Settings

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", nargs="?", default="train-serve", choices=list(VERBS), help="what to do")
    verb = parser.parse_args(arguments).verb
    try:
        settings = Settings.from_environ(os.environ)
        leads = os.environ.get("RANK", "0") == "0"  # of several processes that train
        logs.start(settings.log_path, speaks=leads, json_lines=settings.log_format == "json")
        threads = set_threads(settings.omp_num_threads)  # the libraries that the verbs import read it once
        VERBS[verb](settings, stop, threads)
    except TuneserveError as error:
        logs.report(error)
        return error.exit_code
    return 0


def train(settings: "Settings", stop: Stop, threads: int) -> None:
    """Train a version and publish it, in this process or in several."""
    from tuneserve.training import launch

    if launch.is_asked_for(settings, os.environ):
        launch.run(settings, stop, os.environ, threads=threads)
        return
    from tuneserve.training import job

    job.train(settings, stop, threads=threads, environ=os.environ)


def serve(settings: "Settings", stop: Stop, threads: int) -> None:
    """Answer requests until a signal comes."""
    from tuneserve.serving import server

    server.serve(settings, threads=threads)


def predict(settings: "Settings", stop: Stop, threads: int) -> None:
    """Score a file, or this process's share of it; a signal ends it at once, and what is finished stays."""
    from tuneserve.serving import scoring

    scoring.score(settings, threads=threads, environ=os.environ)


def train_serve(settings: "Settings", stop: Stop, threads: int) -> None:
    """Train, then serve; what would keep it from serving is found before the training and not after it."""
    from tuneserve.serving import server, traces

    traces.require_extra(settings.otel_exporter_otlp_endpoint)
    server.listen(settings.host, settings.port).close()
    train(settings, stop, threads)
    serve(settings, stop, threads)


VERBS = {"train-serve": train_serve, "train": train, "serve": serve, "predict": predict}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
