"""A trained version in Python: `from tuneserve import load`, then `load("models").predict(["..."])`."""

from collections.abc import Sequence

from tuneserve.artifact import Version
from tuneserve.errors import TextError
from tuneserve.hardware import set_threads
from tuneserve.serving.classifier import Prediction, load_classifier
from tuneserve.settings import Settings


class Model:
    """A version that answers on the calling thread, with the engine that a server would take here.

    Args:
        version: in a store, or by itself.
        settings: of the engine: `device`, `precision`, `long_text`, `max_batch_tokens`, `omp_num_threads`.

    Raises:
        StoreError: its files are damaged, or it does not answer as it did when it was saved.
        DeviceError: the device asked for cannot be had.
    """

    def __init__(self, version: Version, settings: Settings) -> None:
        self._classifier = load_classifier(version, settings, threads=set_threads(settings.omp_num_threads))

    @property
    def version(self) -> str:
        """The version's id."""
        return self._classifier.version.id

    @property
    def labels(self) -> list[str]:
        """The label names, by id."""
        return self._classifier.version.labels

    def predict(self, texts: Sequence[str]) -> list[Prediction | TextError]:
        """The answer to each text, in order; a text that cannot be read has its error in that place.

        Raises:
            EngineError: the engine gave a figure that is not a number.
        """
        return self._classifier.predict(texts)
