"""The tasks that there are. A new one is a module in this folder, and a line here."""

from tuneserve.artifact import Version
from tuneserve.serving.model import Model
from tuneserve.settings import Settings
from tuneserve.tasks.classification import CLASSIFICATION

TASKS = {task.name: task for task in [CLASSIFICATION]}


def load_model(version: Version, settings: Settings, *, threads: int) -> Model:
    """A version of the store, loaded by its task.

    Raises:
        StoreError: the version's files are damaged, or it does not answer as it did when it was saved.
        DeviceError: the device asked for cannot be had.
    """
    return TASKS[version.metadata.get("task", CLASSIFICATION.name)].load(version, settings, threads=threads)
