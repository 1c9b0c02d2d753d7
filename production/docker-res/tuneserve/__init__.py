"""tuneserve: fine-tune a text classifier, prove it, save it, serve it; one job, one container.

`run.py` beside this package lists what the container can do; `settings.py` lists every variable.
Two wings, `training` and `serving`, stand on `lifecycle`, `artifact`, `text`, `network`, `hardware`, `errors` and
`settings`; they never import each other: what passes between them is a folder.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuneserve.artifact import Version
    from tuneserve.serving.model import Model

__version__ = "0.1.0"


def load(folder: str | os.PathLike[str], **settings: object) -> "Model":
    """A trained model from disk, for notebooks and scripts: `load("models").predict(["..."])`.

    Args:
        folder: a store (`MODEL_PATH`), of which the champion is loaded, or the folder of one version.
        settings: variables of the job in lower case, such as `device="cpu"` or `long_text="window"`, where their
            defaults are not right; the environment is not read.

    Returns:
        The model. Its `predict` gives an answer for each text or, in its place, the error that says why not.

    Raises:
        NoModelError: the store has no champion.
        StoreError: there is no such version, or it is damaged.
        DeviceError: the device asked for cannot be had.
    """
    from tuneserve.hardware import set_threads
    from tuneserve.settings import Settings
    from tuneserve.tasks.catalog import load_model

    version = find_version(folder)
    chosen = Settings.model_validate(settings)
    return load_model(version, chosen, threads=set_threads(chosen.omp_num_threads))


def find_version(folder: str | os.PathLike[str]) -> "Version":
    """What `load` would load: the champion of a store, or the version whose folder this is.

    Raises:
        NoModelError: the store has no champion.
        StoreError: there is no such version, or it is damaged.
    """
    from pathlib import Path

    from tuneserve.artifact import METADATA, read_version
    from tuneserve.lifecycle.store import Store

    path = Path(folder).expanduser()
    return read_version(path) if (path / METADATA).exists() else Store(path).champion()
