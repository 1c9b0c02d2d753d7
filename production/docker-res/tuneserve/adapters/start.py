"""What a platform may change about a verb: before it runs, and after it has ended."""

from collections.abc import Mapping
from pathlib import Path

SAGEMAKER = "/opt/ml"
"""Where SageMaker has everything; SAGEMAKER_BASE_DIR replaces it."""


class Start:
    """The start of a verb on no platform: nothing is changed."""

    leads = False
    """Whether this process is to hand over what was made: one of several machines, and no worker on it."""
    folder: Path | None = None
    """A folder whose model is served, whatever it is; None for what MODEL, MODELS or the store say."""

    def variables(self) -> Mapping[str, str]:
        """Environment variables that the platform's own files and variables come to.

        Raises:
            TuneserveError: these cannot be used.
        """
        return {}

    def prepare(self) -> None:
        """Wait for what must be there before the verb runs."""

    def hand_over(self, version: Path) -> None:
        """Put a version where the platform looks for it."""

    def fail(self, words: str) -> None:
        """Say why the verb has failed where the platform looks for it."""
