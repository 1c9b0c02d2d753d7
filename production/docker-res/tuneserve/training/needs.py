"""What a training takes of memory and disk: very roughly, and told before it begins, from the base model's size."""

from dataclasses import dataclass
from pathlib import Path

from tuneserve.errors import BaseModelError
from tuneserve.files import read_json
from tuneserve.settings import Settings
from tuneserve.training.base_model import count_weights, find_weights, locate, locate_download

LIBRARIES_BYTES = 1 << 30
"""In memory before there is a model."""
DISK_BYTES = 32
"""For each weight: a version and its graph, and two checkpoints with the optimizer's state."""
STATE_BYTES = {True: 18, False: 4}
"""For each weight, by TRAIN_BODY: with its gradient, two moments and a bf16 copy, or the weight alone."""
STEP_BYTES = {True: 100, False: 10}
"""For each token, layer and hidden unit of what goes through the model at once, by TRAIN_BODY."""
PART_TOKENS = 4096
"""Most tokens that do so on a CPU; `loop.py` takes fewer of large models."""


@dataclass(frozen=True)
class Needs:
    """Bytes."""

    state: int
    """Of memory for the model and what belongs to its weights."""
    step: int
    """Of memory for a part of a step on a CPU, which is made smaller where there is not so much."""
    disk: int
    """Of MODEL_PATH."""


def estimate(settings: Settings) -> Needs | None:
    """What a training with these settings takes; None if its base model is not here, or cannot be read."""
    try:
        local = locate(settings.base_model, revision=settings.base_model_revision)
        folder: Path | None = local[0] if local else fetched(settings)
        if folder is None:
            return None
        weights = count_weights(find_weights(folder))
        config = read_json(folder / "config.json")
        layers = config.get("num_hidden_layers") or config["n_layers"]
        units = layers * (config.get("hidden_size") or config["dim"])
    except (BaseModelError, OSError, ValueError, LookupError, AttributeError):  # the training itself says why
        return None
    body, tokens = settings.train_body, min(settings.batch_size * settings.num_max_positions, PART_TOKENS)
    return Needs(weights * STATE_BYTES[body], STEP_BYTES[body] * tokens * units, weights * DISK_BYTES)


def fetched(settings: Settings) -> Path | None:
    """The base model's folder if it was fetched from the hub before; see `locate_download`."""
    return locate_download(settings.base_model, revision=settings.base_model_revision, cache=settings.data_path)
