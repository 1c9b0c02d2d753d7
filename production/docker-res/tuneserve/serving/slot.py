"""The model that answers now: empty, loading, ready, or failed for a reason."""

import logging
import threading
from collections.abc import Callable
from typing import Literal

from tuneserve.errors import NoModelError, TuneserveError
from tuneserve.serving.classifier import Classifier

logger = logging.getLogger(__name__)

Phase = Literal["empty", "loading", "ready", "failed"]


class Slot:
    """Holds at most one classifier, which gets there only after it has answered a first text."""

    def __init__(self, load: Callable[[], Classifier]) -> None:
        self.phase: Phase = "empty"
        self.failure: BaseException | None = None
        self._load = load
        self._classifier: Classifier | None = None

    def classifier(self) -> Classifier:
        """The model to ask.

        Raises:
            NoModelError: there is none, or not yet.
        """
        if self._classifier is None:
            raise NoModelError(f"No model can answer yet (phase: {self.phase}).")
        return self._classifier

    def fill(self) -> None:
        """Load the model and let it answer once. What goes wrong is kept in `failure`, not raised."""
        self.phase = "loading"
        try:
            classifier = self._load()
            classifier.predict(["A first text, so that no user waits for what is set up once."])
        except NoModelError as error:
            self.phase, self.failure = "empty", error
            logger.warning("%s", error)
        except Exception as error:  # whatever it is, the server must not look healthy
            self.phase, self.failure = "failed", error
            logger.exception(
                "the model cannot be loaded", exc_info=None if isinstance(error, TuneserveError) else error
            )
        else:
            self._classifier, self.phase = classifier, "ready"
            logger.info("ready: version %s answers", classifier.version.id)

    def fill_in_background(self, then: Callable[[], None] = lambda: None) -> None:
        """Do the same on a thread of its own, and call `then` on it afterwards."""

        def work() -> None:
            self.fill()
            then()

        threading.Thread(target=work, name="load-model", daemon=True).start()
