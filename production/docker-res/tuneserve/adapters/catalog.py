"""The adapters that there are. A new one is a module in this folder, and a line here."""

from collections.abc import Sequence

from tuneserve.adapters import multimodel
from tuneserve.serving.http.app import Adapter

ADAPTERS: Sequence[Adapter] = []

OF_MANY: Sequence[Adapter] = [multimodel.routes]
"""Those of a server whose models come and go."""
