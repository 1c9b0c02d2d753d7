"""The application of `run.py serve` for an ASGI server of one's own: `uvicorn app:app` in this folder."""

import os

from tuneserve.hardware import set_threads
from tuneserve.redaction import remember
from tuneserve.serving.application import Application
from tuneserve.settings import Settings, unquote

unquote(os.environ)
remember(os.environ)
settings = Settings.from_environ(os.environ)
app = Application(settings, threads=set_threads(settings.omp_num_threads)).asgi
