"""The Hugging Face hub, which may be out of reach: found out once, in seconds, before its libraries try for minutes."""

import logging

logger = logging.getLogger(__name__)

PATIENCE_S = 5.0


def connect() -> bool:
    """Whether the hub answers; when it does not, its libraries are told to use what they have on disk."""
    import datasets.config
    import huggingface_hub.constants as hub
    from huggingface_hub import get_session

    if not hub.HF_HUB_OFFLINE:
        try:
            get_session().head(hub.ENDPOINT, timeout=PATIENCE_S)
        except Exception as error:  # the HTTP library underneath has exceptions of its own, and changes
            logger.warning("the hub (%s) cannot be reached: %s", hub.ENDPOINT, error)
            hub.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = hub.HF_HUB_OFFLINE
    return not hub.HF_HUB_OFFLINE
