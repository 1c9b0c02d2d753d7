"""Optional packages, checked before the work that needs them begins."""

import importlib.util

from tuneserve.errors import SettingsError


def require(module: str, *, wanted_by: str, product: str, extra: str) -> None:
    """Refuse a setting whose optional package is missing.

    Args:
        module: to be found; only the packages that contain it are imported.
        wanted_by: the setting as messages may show it, `NAME=value`.
        product: what people know the package as.
        extra: of build.py's EXTRAS, and of `requirements-<extra>.txt`.

    Raises:
        SettingsError: it is not installed; the message says how to install it.
    """
    try:
        found = importlib.util.find_spec(module) is not None
    except ImportError:
        found = False
    if not found:
        raise SettingsError(
            f"{wanted_by} needs {product}, which is not installed: "
            f"pip install -r production/docker-res/requirements-{extra}.txt, or build.py --build-arg EXTRAS={extra}."
        )
