"""The handler on AWS Lambda: `python -m awslambdaric function.handler` in this folder. The model is loaded at once."""

import logging
import os
from collections.abc import MutableMapping

from tuneserve.adapters.lambda_function import Function, bare_paths
from tuneserve.hardware import set_threads
from tuneserve.logs import let_pass
from tuneserve.redaction import remember
from tuneserve.settings import Settings, unquote


def load(environ: MutableMapping[str, str]) -> Function:
    """The handler over the champion of the store that MODEL_PATH names.

    Raises:
        TuneserveError: a variable cannot be used, or there is no model that answers.
    """
    unquote(environ)
    remember(environ)
    settings = Settings.from_environ(environ)
    threads = set_threads(settings.omp_num_threads)
    from tuneserve.serving.fixed import FixedApplication

    logging.getLogger("tuneserve").setLevel(logging.INFO)
    for one in logging.getLogger().handlers:  # the runtime's, which writes to the platform's log
        one.addFilter(let_pass)
    application = FixedApplication(settings, threads=threads)
    bare = bare_paths(application.task, settings.serverless_route)
    return Function(application.asgi, bare=bare, key=settings.api_key.get_secret_value())


handler = load(os.environ)
