"""OpenTelemetry: a span for every request, which FastAPI makes, and what only this server knows of it.

Without an endpoint there is no provider, and a request costs one look at a variable more. No span has the text.
"""

from typing import Any

from fastapi.telemetry import TelemetryConfig

import tuneserve
from tuneserve.errors import SettingsError
from tuneserve.extras import require
from tuneserve.redaction import redact_url

SILENT: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
"""FastAPI's own telemetry would look for listeners at every request, and its logs would repeat what was sent."""

CLOSE_MS = 3000
"""Milliseconds that a collector gets for a post, and for the last spans when the server ends."""


def require_extra(endpoint: str) -> None:
    """Refuse an endpoint that nothing could be sent to.

    Raises:
        SettingsError: this is no address, or OpenTelemetry's SDK is not installed.
    """
    if not endpoint:
        return
    shown = f"OTEL_EXPORTER_OTLP_ENDPOINT={redact_url(endpoint)}"
    if not endpoint.startswith(("http://", "https://")):
        raise SettingsError(f"{shown} is not the address of a collector, such as http://collector:4318.")
    for module in ("opentelemetry.sdk.trace.export", "opentelemetry.exporter.otlp.proto.http.trace_exporter"):
        require(module, wanted_by=shown, product="OpenTelemetry's SDK", extra="traces")


class Traces:
    """Where spans go; nowhere without an endpoint.

    Raises:
        SettingsError: as `require_extra`.
    """

    def __init__(self, endpoint: str) -> None:
        require_extra(endpoint)
        self._provider: Any = None
        if not endpoint:
            return
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create()  # which reads OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
        if str(resource.attributes["service.name"]).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "tuneserve", "service.version": tuneserve.__version__}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=CLOSE_MS / 1000)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))

    @property
    def telemetry(self) -> TelemetryConfig:
        """What FastAPI is told: spans of requests, and nothing else, which could repeat what was sent."""
        if self._provider is None:
            return SILENT
        return {**SILENT, "tracing": True, "operation_spans": False, "tracer_provider": self._provider}

    def close(self) -> None:
        """Send what waits, but not for ever."""
        if self._provider is not None:
            self._provider.force_flush(CLOSE_MS)
            self._provider.shutdown()
