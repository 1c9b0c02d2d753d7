"""The tasks that there are. A new one is a module in this folder, and a line here."""

from tuneserve.artifact import Version
from tuneserve.errors import StoreError
from tuneserve.serving.model import Model
from tuneserve.settings import Settings
from tuneserve.tasks.classification import CLASSIFICATION
from tuneserve.tasks.embedding import FEATURE_EXTRACTION
from tuneserve.tasks.generation import TEXT_GENERATION
from tuneserve.tasks.summarization import SUMMARIZATION
from tuneserve.tasks.task import Task

TASKS = {task.name: task for task in [CLASSIFICATION, FEATURE_EXTRACTION, SUMMARIZATION, TEXT_GENERATION]}


def task_of(version: Version) -> Task:
    """The task that a version's metadata names; classification if it names none.

    Raises:
        StoreError: there is no such task here.
    """
    name = version.metadata.get("task", CLASSIFICATION.name)
    if name not in TASKS:
        raise StoreError(f"version {version.id} is for the task {name!r}; this server knows {', '.join(TASKS)}.")
    return TASKS[name]


def load_model(version: Version, settings: Settings, *, threads: int) -> Model:
    """A version of the store, loaded by its task.

    Raises:
        StoreError: the version's files are damaged, or it does not answer as it did when it was saved; or there is no
            such task here.
        DeviceError: the device asked for cannot be had.
    """
    return task_of(version).load(version, settings, threads=threads)
