"""SageMaker's hosting: its folder and variables as this job's; `sagemaker.py` has the routes.

Everything lies below /opt/ml, or SAGEMAKER_BASE_DIR; `model/` is the unpacked archive, which may be read only.
Source: "How Amazon SageMaker AI Runs Your Inference Image", and the variables of Hugging Face's toolkit.
"""

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import get_args

from tuneserve.adapters.start import SAGEMAKER, Start
from tuneserve.archives import find_program
from tuneserve.errors import SettingsError
from tuneserve.settings import Settings

logger = logging.getLogger(__name__)

PORT = "8080"
MAX_PAYLOAD_MB, MOST_PAYLOAD_MB = 6, 100
"""MiB of a request to an endpoint, and the most that a batch transform may ask for."""
REQUEST_S, BATCH_S = "60", "600"
"""Seconds that the platform waits for an answer: of an endpoint, and of a batch transform if it is not told."""


class Serving(Start):
    """`serve`: the model's folder, or HF_MODEL_ID, at the platform's port."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._model = Path(environ.get("SAGEMAKER_BASE_DIR") or SAGEMAKER) / "model"
        self._many = environ.get("SAGEMAKER_MULTI_MODEL") == "true"
        self._batch = environ.get("SAGEMAKER_BATCH") == "true"
        with suppress(OSError):
            if not self._many and any(self._model.iterdir()):
                self.folder = self._model

    def variables(self) -> Mapping[str, str]:
        """See `Start`.

        Raises:
            SettingsError: there is no model, or a key that the platform's clients cannot show.
        """
        environ = self._environ
        if environ.get("API_KEY"):
            raise SettingsError(
                "API_KEY cannot be used on SageMaker, whose clients send no such header: IAM says who may ask."
            )
        found = {
            "PORT": environ.get("SAGEMAKER_BIND_TO_PORT") or PORT,
            "MAX_BODY_KB": environ.get("MAX_BODY_KB") or str(max_payload_mb(environ) * 1024),
            "REQUEST_TIMEOUT_S": environ.get("REQUEST_TIMEOUT_S")
            or environ.get("SAGEMAKER_MODEL_SERVER_TIMEOUT_SECONDS")
            or environ.get("SAGEMAKER_MODEL_SERVER_TIMEOUT")
            or (BATCH_S if self._batch else REQUEST_S),
        }
        if self.folder is not None:
            program = find_program(self.folder, environ.get("SAGEMAKER_PROGRAM") or "inference.py")
            if program is not None and environ.get("HF_TASK") not in get_args(Settings.model_fields["task"].annotation):
                found["HF_TASK"] = ""  # the code may be for a task that nothing here answers
            if program is not None and (program.parent / "requirements.txt").is_file():
                logger.warning("%s/requirements.txt is not installed here: put it into the image", program.parent)
        elif name := environ.get("HF_MODEL_ID"):
            found |= {"MODEL": name, "MODEL_REVISION": environ.get("HF_MODEL_REVISION", "")}
            if token := environ.get("HF_API_TOKEN"):
                found["HF_TOKEN"] = token
        elif not (self._many or environ.get("MODEL") or environ.get("MODELS") or _has_champion(environ)):
            raise SettingsError(
                f"There is no model: {self._model} is empty, and neither "
                "HF_MODEL_ID nor MODEL is set. Name the archive in ModelDataUrl, or a model on the hub in HF_MODEL_ID."
            )
        return found


def max_payload_mb(environ: Mapping[str, str]) -> int:
    """MiB of one request; a batch transform with 0 has no bound of its own."""
    asked = environ.get("SAGEMAKER_MAX_PAYLOAD_IN_MB", "")
    return (min(int(asked), MOST_PAYLOAD_MB) or MOST_PAYLOAD_MB) if asked.isdecimal() else MAX_PAYLOAD_MB


def _has_champion(environ: Mapping[str, str]) -> bool:
    folder = environ.get("MODEL_PATH") or Settings.model_fields["model_path"].default
    return (Path(folder) / "champion").is_file()
