"""The engines, in the order in which they are tried. A new one is a module in this folder, and a line here."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from tuneserve.artifact import GOLDEN, GOLDEN_INT8, Version
from tuneserve.errors import DeviceError
from tuneserve.serving.engines.engine import Engine
from tuneserve.serving.engines.openvino import load_graph_engine, load_int8_engine
from tuneserve.settings import Settings


@dataclass(frozen=True)
class Choice:
    """An engine that may serve a version.

    `load(version, settings, threads=...)` makes it, or None where it is not for this machine, version or setting.
    It is held to the golden answers in the file `golden`. If it fails it gives way to the next, and the log calls it
    `optional`; one without that word is the version's only hope. With `states=True`, which those without `optional`
    know, it gives what the head reads of each text, float32 [texts, channels], and not its logits.
    """

    load: Callable[..., Engine | None]
    golden: str = GOLDEN
    optional: str = ""


def load_torch_engine(version: Version, settings: Settings, *, threads: int, states: bool = False) -> Engine:
    """Torch, which runs every version everywhere, and is not loaded where another engine does.

    Raises:
        StoreError: the version's files are damaged.
        DeviceError: the device asked for cannot be had.
    """
    require_torch(version)
    from tuneserve.serving.engines.torch_engine import load

    return load(version, settings, threads=threads, states=states)


def require_torch(version: Version) -> None:
    """Say what is missing before torch is imported for a version that nothing else can run.

    Raises:
        DeviceError: it is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise DeviceError(
            f"Only torch runs version {version.id} with these settings, and torch is not installed here. Serve it from "
            "the image of the job, or train or import it again, on a CPU, for a graph."
        )


ENGINES = [
    Choice(load_int8_engine, golden=GOLDEN_INT8, optional="the int8 graph"),
    Choice(load_graph_engine),
    Choice(load_torch_engine),
]
