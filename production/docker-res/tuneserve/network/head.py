"""The class of the model, by which training makes it and everything that reads a version loads it again.

The place for layers of your own behind the body: write a class that has transformers' `from_pretrained` and
`save_pretrained`, and name it in `NETWORK`. For another configuration of the usual head, see `build_model` in
`training/model.py`.
"""

from typing import Any

from transformers import AutoModelForSequenceClassification

from tuneserve.network.embedding import EmbeddingModel

NETWORK: Any = AutoModelForSequenceClassification


def network_of(task: str) -> Any:
    """The class that loads a version of this task; an empty name is classification's."""
    return EmbeddingModel if task == "feature-extraction" else NETWORK
