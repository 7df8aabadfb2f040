"""Traces of requests for OpenTelemetry. Imported only where traces are asked for.

The server's code tells `RequestContext.timed` of its parts; each is a span below the request's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import Scope

from server.api.request_log import Answer
from server.request_context import RequestContext, Timing

_PATH = "/v1/traces"
_SERVICE = "prefixserve"
_FAILED = 500


class OpenTelemetry:
    """Sends a trace of each request to a collector, by OTLP over HTTP. Close it at the end.

    Everything else about it (headers, sampling, resource) is set by OpenTelemetry's own
    environment variables, `OTEL_*`.
    """

    def __init__(self, endpoint: str | None, exporter: SpanExporter | None = None) -> None:
        """
        Args:
            endpoint: the collector's address; None for the one that `OTEL_*` name.
            exporter: in place of the one to that address.
        """
        # What is given here would come before OTEL_SERVICE_NAME.
        named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": _SERVICE}
        self._provider = TracerProvider(resource=Resource.create(named))
        exporter = exporter or OTLPSpanExporter(endpoint=_traces_url(endpoint))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(_SERVICE, version(_SERVICE))
        self._propagator = TraceContextTextMapPropagator()

    def close(self) -> None:
        """Send what is left; may wait for the collector for some seconds."""
        self._provider.shutdown()

    @contextmanager
    def request(
        self, request: RequestContext, scope: Scope, headers: Headers, answer: Answer
    ) -> Iterator[None]:
        """See `Tracing.request`: a span of the caller's trace, if it names one (W3C)."""
        parent = self._propagator.extract(headers)
        method = str(scope["method"])
        span = self._tracer.start_span(method, parent, SpanKind.SERVER)
        request.timings = []
        request.facts["trace_id"] = f"{span.get_span_context().trace_id:032x}"
        try:
            yield
        finally:
            route = getattr(scope.get("route"), "path", None)
            if route is not None:
                span.update_name(f"{method} {route}")
                span.set_attribute("http.route", route)
            span.set_attribute("http.request.method", method)
            span.set_attribute("http.response.status_code", answer.status)
            for name, value in request.facts.items():
                if isinstance(value, str | int | float):
                    span.set_attribute(f"prefixserve.{name}", value)
            if answer.status >= _FAILED:
                span.set_status(Status(StatusCode.ERROR))
            self._tell_parts(span, request.timings)
            span.end(time.time_ns())

    def _tell_parts(self, span: Span, timings: list[Timing]) -> None:
        context: Context = set_span_in_context(span)
        for timing in timings:
            part = self._tracer.start_span(
                timing.name,
                context,
                attributes=dict(timing.attributes),
                start_time=timing.start_ns,
            )
            part.end(timing.end_ns)


def _traces_url(endpoint: str | None) -> str | None:
    """The address that takes traces: the path is the protocol's own unless one is given."""
    if endpoint is None or urlsplit(endpoint).path.strip("/"):
        return endpoint
    return endpoint.rstrip("/") + _PATH
