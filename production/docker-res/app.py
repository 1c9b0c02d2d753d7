"""The application of `run.py serve` for an ASGI server of one's own: `uvicorn app:app` in this folder."""

import os
import sys
from pathlib import Path

from tuneserve.hardware import set_threads
from tuneserve.redaction import remember
from tuneserve.serving.application import Application
from tuneserve.serving.many import ManyApplication
from tuneserve.settings import Settings, unquote

unquote(os.environ)
remember(os.environ)
settings = Settings.from_environ(os.environ)
threads = set_threads(settings.omp_num_threads)
if settings.models:
    importing = [sys.executable, str(Path(__file__).with_name("run.py").resolve()), "import"]
    app = ManyApplication(settings, threads=threads, importing=importing, environ=os.environ).asgi
else:
    app = Application(settings, threads=threads, environ=os.environ).asgi
