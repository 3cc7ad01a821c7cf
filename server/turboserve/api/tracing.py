"""Traces by OpenTelemetry's own library: a span for each request, with what the engine says of its answers.

Off unless OpenTelemetry's own variables name a collector, and its packages are there (`turboserve[otel]`). A caller's
`traceparent` is honoured. No span holds a prompt, an answer, a key or a path as it was typed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from turboserve import __version__
from turboserve.logs import trace_id as log_trace_id
from turboserve.messages import Event, Failed, Finished

logger = logging.getLogger("turboserve.api")

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

_current: ContextVar[RequestSpan | None] = ContextVar("request_span", default=None)


def saw(event: Event | None) -> None:
    """Notes an answer's event in the span of the request that is being handled, where there is one."""
    if (span := _current.get()) is not None and event is not None:
        span.saw(event)


class RequestSpan:
    """One request's span. Attributes have OpenTelemetry's names where it has any."""

    def __init__(self, span: Any) -> None:
        self._span = span
        self._has_begun = False
        self._output_tokens = 0
        self._reasons: list[str] = []

    def saw(self, event: Event) -> None:
        """The first piece of an answer, and the end of each; what is between them is no news."""
        if isinstance(event, Finished):
            self._finished(event)
        elif isinstance(event, Failed):
            self._span.set_attribute("error.type", event.error.code or event.error.type)
        elif not self._has_begun:
            self._has_begun = True
            self._span.add_event("first_token")

    def _finished(self, event: Finished) -> None:
        usage = event.usage
        self._output_tokens += usage.completion_tokens
        self._reasons.append(event.reason)
        self._span.set_attributes(
            {
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": self._output_tokens,
                "gen_ai.response.finish_reasons": self._reasons,
                "turboserve.cached_tokens": usage.cached_tokens,
                "turboserve.kv_format": usage.kv_format,
                "turboserve.kv_bytes": usage.kv.total,
            }
        )

    def end(self, method: str, route: str, status: int, request_id: str) -> None:
        """What is known when the reply is complete."""
        self._span.update_name(f"{method} {route}")
        attributes = {"http.request.method": method, "http.route": route, "http.response.status_code": status}
        self._span.set_attributes(attributes | {"turboserve.request_id": request_id})
        if status >= 500:
            from opentelemetry.trace import StatusCode

            self._span.set_status(StatusCode.ERROR)


class Tracing:
    """Makes spans with `provider`'s tracer."""

    def __init__(self, provider: Any) -> None:
        self._tracer = provider.get_tracer("turboserve", __version__)

    @contextmanager
    def request(self, headers: list[tuple[bytes, bytes]]) -> Iterator[RequestSpan]:
        """The span of what is done inside, below the caller's own where `headers` name one."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {key.decode("latin-1"): value.decode("latin-1") for key, value in headers if key.startswith(b"trace")}
        parent = TraceContextTextMapPropagator().extract(carrier)
        with self._tracer.start_as_current_span("request", context=parent, kind=SpanKind.SERVER) as span:
            request_span = RequestSpan(span)
            in_context = _current.set(request_span)
            in_log = log_trace_id.set(f"{span.get_span_context().trace_id:032x}")
            try:
                yield request_span
            finally:
                log_trace_id.reset(in_log)
                _current.reset(in_context)


def tracing_from_environment(environ: Mapping[str, str] = os.environ) -> Tracing | None:
    """None where no collector is named, and, with a warning, where the packages are missing."""
    if not any(environ.get(name) for name in ENDPOINTS) or environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as exc:
        logger.warning("no traces (%s): pip install 'turboserve[otel]'", exc)
        return None
    is_named = environ.get("OTEL_SERVICE_NAME") or "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    resource = Resource.create({"service.version": __version__} | ({} if is_named else {"service.name": "turboserve"}))
    provider = TracerProvider(resource=resource)  # sends what is left when the process ends
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)
