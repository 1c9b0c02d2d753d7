"""Traces: what a collector is sent of a request, and what it never is."""

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from conftest import serving
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from wire import app_of

from tuneserve.artifact import Version
from tuneserve.errors import SettingsError
from tuneserve.serving.application import Application
from tuneserve.serving.http.traces import SILENT, Traces
from tuneserve.serving.slot import Slot
from tuneserve.settings import Settings
from tuneserve.tasks.classifier import Classifier

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(BaseHTTPRequestHandler):
    """Keeps what is posted to it."""

    posts: list[tuple[str, bytes]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        self.posts.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    posts: list[tuple[str, bytes]] = []
    with serving(type("Kept", (Collector,), {"posts": posts})) as address:
        yield address, posts


def spans(posts: list[tuple[str, bytes]]) -> list[tuple[Any, dict[str, Any]]]:
    found = []
    for path, content in posts:
        assert path == "/v1/traces"
        for resource in ExportTraceServiceRequest.FromString(content).resource_spans:
            about = {one.key: one.value.string_value for one in resource.resource.attributes}
            assert about["service.name"] == "tuneserve"
            for scope in resource.scope_spans:
                for span in scope.spans:
                    values = {
                        one.key: getattr(one.value, str(one.value.WhichOneof("value"))) for one in span.attributes
                    }
                    found.append((span, values))
    return found


def test_a_request_is_a_span_with_its_stages_in_the_clients_trace_and_without_its_text(
    settings: Settings, slot: Slot, version: Version, collector: tuple[str, list[tuple[str, bytes]]]
) -> None:
    address, posts = collector
    traces = Traces(address)
    with TestClient(app_of(settings, slot, telemetry=traces.telemetry)) as client:
        parent = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        assert client.post("/inference", json={"text": "a private film"}, headers=parent).status_code == 200
        assert client.post("/inference", json={"text": ["a private film"]}).status_code == 422
        assert client.post("/inference/batch", json={"texts": ["a private film"] * 50}).status_code == 200
    traces.close()
    one, bad, batch = spans(posts)
    span, values = one
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert values["http.route"] == "/inference"
    assert values["http.response.status_code"] == 200
    assert values["tuneserve.model_version"] == version.id
    assert (values["tuneserve.texts"], values["tuneserve.tokens"]) == (1, 5)
    stages = [values[f"tuneserve.{stage}_s"] for stage in ("tokenize", "queue", "infer")]
    assert min(stages) > 0
    assert sum(stages) * 1e9 <= span.end_time_unix_nano - span.start_time_unix_nano
    assert bad[1]["http.response.status_code"] == 422
    assert (batch[1]["tuneserve.texts"], batch[1]["tuneserve.tokens"]) == (50, 250)
    assert batch[0].trace_id.hex() != TRACE
    assert all(b"private" not in content for _, content in posts)


def test_a_server_sends_them_to_the_endpoint_that_is_set(
    settings: Settings, collector: tuple[str, list[tuple[str, bytes]]]
) -> None:
    address, posts = collector
    application = Application(settings.model_copy(update={"otel_exporter_otlp_endpoint": address}), threads=1)
    with TestClient(application.asgi) as client:
        assert client.post("/inference", json={"text": "film"}).status_code == 503
    assert [values["http.response.status_code"] for _, values in spans(posts)] == [503]


def test_without_an_endpoint_there_is_nothing(settings: Settings, classifier: Classifier) -> None:
    traces = Traces("")
    assert traces.telemetry == SILENT
    traces.close()
    assert not [thread for thread in threading.enumerate() if "OtelBatch" in thread.name]


def test_a_collector_that_is_not_there_holds_up_nobody(settings: Settings, slot: Slot, unreachable: str) -> None:
    traces = Traces(unreachable)
    with TestClient(app_of(settings, slot, telemetry=traces.telemetry)) as client:
        assert client.post("/inference", json={"text": "film"}).status_code == 200
    closing = threading.Thread(target=traces.close)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()


def test_a_missing_extra_is_refused_with_what_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(SettingsError, match=r"pip install -r .*requirements-traces.txt.*EXTRAS=traces") as caught:
        Traces("http://me:secret@collector:4318")
    assert "secret" not in str(caught.value)


def test_an_endpoint_that_is_no_address_is_refused() -> None:
    with pytest.raises(SettingsError, match="not the address of a collector"):
        Traces("collector:4318")
