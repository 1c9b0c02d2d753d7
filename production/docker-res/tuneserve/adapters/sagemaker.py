"""SageMaker's hosting of one model, and its batch transform: `/ping`, `/invocations`, `/execution-parameters`.

Source: "Custom Inference Code with Hosting Services" and "… with Batch Transform" of the platform's documents. What is
said where the server starts (the folders, the port, the limits) is in `sagemaker_serving.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from tuneserve.adapters.invocations import PlatformRoute, answered
from tuneserve.adapters.sagemaker_serving import MAX_PAYLOAD_MB, max_payload_mb
from tuneserve.serving.http.routes import INFERENCE
from tuneserve.serving.service import Service


@dataclass(frozen=True)
class Hosting:
    """An adapter with what the platform has said of the container.

    Args:
        batch: whether it is a batch transform's: tables have no header, and each line wants one for an answer.
        accept: what is answered where `Accept` does not say; empty for JSON.
        max_payload_mb: of one request, in MiB.
    """

    batch: bool = False
    accept: str = ""
    max_payload_mb: int = MAX_PAYLOAD_MB

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Hosting":
        """What the platform's variables say."""
        return cls(
            batch=environ.get("SAGEMAKER_BATCH") == "true",
            accept=environ.get("SAGEMAKER_DEFAULT_INVOCATIONS_ACCEPT", ""),
            max_payload_mb=max_payload_mb(environ),
        )

    def __call__(self, service: Service) -> APIRouter:
        """The platform's routes over a service with one model."""
        router = APIRouter(route_class=PlatformRoute, tags=["sagemaker"])

        @router.get("/ping")
        async def ping() -> Response:
            """200 once a model can answer, 503 until then and when it has died; never a body."""
            ready = service.phase() == "ready"
            return Response(status_code=200 if ready else 503)

        @router.get("/execution-parameters")
        async def execution_parameters() -> dict[str, Any]:
            """How a batch transform should ask: lines together, one request at a time, as each keeps a model busy."""
            return {
                "MaxConcurrentTransforms": 1,
                "BatchStrategy": "MULTI_RECORD",
                "MaxPayloadInMB": self.max_payload_mb,
            }

        @router.post("/invocations", tags=[INFERENCE])
        async def invocations(request: Request) -> Response:
            """Ask in the form of Hugging Face's pipelines: `{"inputs", "parameters"}`, such lines, or CSV."""
            return await answered(service, request, batch=self.batch, accept=self.accept)

        return router
