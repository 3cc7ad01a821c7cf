"""Traces as a collector gets them: real spans over HTTP from OpenTelemetry's own exporter, one for each request."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from tests.turboserve.api.conftest import running
from tests.turboserve.api.scripted import WAIT_S

from turboserve.api.tracing import tracing_from_environment

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@dataclass
class Collector:
    """What an OTLP collector is sent."""

    url: str
    bodies: list[bytes] = field(default_factory=list)

    def spans(self, num_expected: int, timeout_s: float = WAIT_S) -> list[Any]:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        deadline = time.monotonic() + timeout_s
        while True:
            sent = [ExportTraceServiceRequest.FromString(body) for body in list(self.bodies)]
            resources = [spans for request in sent for spans in request.resource_spans]
            found = [span for group in resources for scope in group.scope_spans for span in scope.spans]
            if len(found) >= num_expected:
                assert all(plain(group.resource.attributes)["service.name"] == "turboserve" for group in resources)
                return found
            assert time.monotonic() < deadline, f"{len(found)} spans came"
            time.sleep(0.05)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    bodies: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")  # milliseconds
        yield Collector(url, bodies)
        server.shutdown()
        thread.join()


def plain(attributes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for pair in attributes:
        kind = pair.value.WhichOneof("value")
        value = getattr(pair.value, kind)
        values[pair.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return values


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_below_its_callers(collector: Collector, stream: bool) -> None:
    with running() as service:
        reply = httpx.post(
            service.url + "/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "do not trace this text"}], "stream": stream},
            headers={"traceparent": f"00-{TRACE}-{PARENT}-01"},
            timeout=WAIT_S,
        )
        missing = httpx.get(service.url + "/v1/models/a-secret-name", timeout=WAIT_S)
        assert (reply.status_code, missing.status_code) == (200, 404)
        spans = {span.name: span for span in collector.spans(2)}
    span = spans["POST /v1/chat/completions"]
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    noted = plain(span.attributes)
    assert noted["turboserve.request_id"] == reply.headers["x-request-id"]
    assert noted["http.response.status_code"] == 200 and noted["gen_ai.usage.output_tokens"] > 0
    assert noted["gen_ai.response.finish_reasons"] == ["stop"]
    assert [event.name for event in span.events] == ["first_token"]
    (other,) = [span for name, span in spans.items() if name.startswith("GET /v1/models/{")]
    assert plain(other.attributes)["http.response.status_code"] == 404
    everything = b"".join(collector.bodies)
    assert not [text for text in (b"do not trace", b"Hello, world", b"a-secret-name") if text in everything]


def test_without_a_collector_there_are_no_traces() -> None:
    assert tracing_from_environment({}) is None
    off = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"}
    assert tracing_from_environment(off) is None
