"""Spans of requests for OpenTelemetry, where --otlp-endpoint names a collector: one a request, no text in it.

A request goes on in the trace that its `traceparent` header names (W3C Trace Context). Spans leave on a thread of the
SDK's, in batches; what the collector does not take in time is dropped, and nobody waits for it.
"""

import threading
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from sessile.errors import StartupError

HEADERS = ("traceparent", "tracestate")
EXPORT_TIMEOUT_S = 2.0
"""How long a collector may take for a batch; the last one is waited for as long when the server ends."""

trace_headers: ContextVar[Mapping[str, str] | None] = ContextVar("trace_headers", default=None)
"""The trace context of the HTTP request that is being answered, as it was sent."""


class Span(Protocol):
    """One request, from its begin to its end."""

    def end(self, fields: Mapping[str, Any]) -> None:
        """It is over; fields: what the log says of it."""
        ...


class NoSpan:
    """Where nobody traces."""

    def end(self, fields: Mapping[str, Any]) -> None:
        """See Span."""


class Tracing:
    """Begins spans. Owns the exporter; `close` sends what is left."""

    def __init__(self, endpoint: str | None, *, version: str) -> None:
        """endpoint: URL of a collector that takes OTLP over HTTP; None: nothing is traced. Raises StartupError."""
        self._provider: Any = None
        if endpoint is None:
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise StartupError(f"--otlp-endpoint needs more packages: pip install 'sessile[otel]' ({error})") from error
        resource = Resource.create({"service.name": "sessile", "service.version": version})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("sessile")

    def begin(self, name: str) -> Span:
        """A span that begins now, in the trace of the HTTP request that is being answered."""
        if self._provider is None:
            return NoSpan()
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract(trace_headers.get() or {})
        return _OpenSpan(self._tracer.start_span(name, context=context, kind=SpanKind.SERVER))

    def close(self) -> None:
        """Send what is left, but not for long: a collector that is gone does not keep the server from ending."""
        if self._provider is not None:
            last = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
            last.start()
            last.join(EXPORT_TIMEOUT_S)


class _OpenSpan:
    def __init__(self, span: Any) -> None:
        self._span = span

    def end(self, fields: Mapping[str, Any]) -> None:
        from opentelemetry.trace import Status, StatusCode

        for name, value in fields.items():
            if value is not None:
                self._span.set_attribute(f"sessile.{name}", value)
        if fields.get("error"):
            self._span.set_status(Status(StatusCode.ERROR, fields["error"]))
        self._span.end()


class TraceContext:
    """ASGI middleware that keeps the trace context of each request for whoever begins a span meanwhile."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        token = trace_headers.set({name: headers[name] for name in HEADERS if name in headers})
        try:
            await self._app(scope, receive, send)
        finally:
            trace_headers.reset(token)
