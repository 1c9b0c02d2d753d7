"""The adapters that there are. A new one is a module in this folder, and a line here."""

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType

from tuneserve.adapters import ancestor, huggingface, multimodel, openinference, sagemaker, vertex
from tuneserve.serving.http.app import Adapter
from tuneserve.settings import Settings
from tuneserve.tasks.catalog import TASKS
from tuneserve.tasks.classification import CLASSIFICATION
from tuneserve.tasks.task import Task

NOTHING: Mapping[str, str] = MappingProxyType({})

OF_MANY: Sequence[Adapter] = [multimodel.routes]
"""Those of a server whose models come and go."""


def adapters_of(
    settings: Settings, task: Task | None = None, *, environ: Mapping[str, str] = NOTHING
) -> Sequence[Adapter]:
    """Those of a server with one model. Where two answer the same path it is the first of them that does.

    Args:
        settings: of the server.
        task: of its model; None: the settings'.
        environ: variables that a platform sets for its own adapter.
    """
    found: list[Adapter] = []
    if settings.platform == "sagemaker":
        found.append(sagemaker.Hosting.of(environ))
    if settings.aip_health_route or settings.aip_predict_route:
        found.append(partial(vertex.routes, health=settings.aip_health_route, predict=settings.aip_predict_route))
    classifies = (task or TASKS[settings.task]) is CLASSIFICATION
    if settings.inference_reply == "ancestor" and classifies:
        found.append(ancestor.routes)
    if settings.serverless_route and classifies:
        found.append(partial(ancestor.serverless_routes, path=settings.serverless_route))
    return [
        *found,
        partial(openinference.routes, name=settings.model_name),
        partial(huggingface.routes, name=settings.model_name),
    ]
