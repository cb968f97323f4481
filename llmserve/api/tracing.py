"""OpenTelemetry traces of requests, in the semantic conventions `gen_ai.*`, and W3C trace context in and out.

Reading the trace context needs no library. Spans need the extra `otel`; they are made when a request is over, from what
its context knows by then, so a token pays nothing for them.
"""

from __future__ import annotations

import re
import secrets
import time
from typing import Any

from llmserve.errors import ConfigError
from llmserve.request_context import RequestContext

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


def read_traceparent(value: str) -> tuple[str, str, int] | None:
    """(trace id, parent span id, flags) of the header `traceparent`; None if it is absent or not one."""
    match = _TRACEPARENT.fullmatch(value.strip())
    if match is None or (value.startswith("00-") and match[4]):
        return None
    return match[1], match[2], int(match[3], 16)


class Tracer:
    """Turns requests into spans of `provider`, an OpenTelemetry TracerProvider."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry import trace

        self._trace = trace
        self._tracer = provider.get_tracer("llmserve")
        self._provider = provider

    def begin(self, context: RequestContext, parent: tuple[str, str, int] | None) -> None:
        """Starts the span of a request; its id goes back to the client in `traceparent`."""
        parent_context = None
        if parent is not None:
            trace_id, span_id, flags = parent
            span_context = self._trace.SpanContext(
                int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=self._trace.TraceFlags(flags)
            )
            parent_context = self._trace.set_span_in_context(self._trace.NonRecordingSpan(span_context))
        span = self._tracer.start_span(
            context.route, context=parent_context, kind=self._trace.SpanKind.SERVER, start_time=time.time_ns()
        )
        own = span.get_span_context()
        context.trace_id = f"{own.trace_id:032x}"
        context.traceparent = f"00-{own.trace_id:032x}-{own.span_id:016x}-{own.trace_flags:02x}"
        context.span = span

    def end(self, context: RequestContext) -> None:
        """The request is over."""
        span = context.span
        if span is None:
            return
        if context.model:
            operation = "chat" if "chat" in context.route else "text_completion"
            span.update_name(f"{operation} {context.model}")
            span.set_attribute("gen_ai.operation.name", operation)
        for name, value in attributes(context).items():
            if value is not None:
                span.set_attribute(name, value)
        if context.status >= 500 or context.status == 0:
            span.set_status(self._trace.StatusCode.ERROR, context.error)
        span.end()
        context.span = None

    def shutdown(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


def attributes(context: RequestContext) -> dict[str, Any]:
    """OpenTelemetry's names for what is known; None is left out."""
    is_generation = bool(context.completion_id)
    ttft_s = None if context.queue_s is None else context.queue_s + (context.prefill_s or 0.0)
    return {
        "http.response.status_code": context.status or None,
        "url.path": context.route,
        "error.type": context.error or None,
        "enduser.id": context.tenant.name or None,
        "gen_ai.provider.name": "llmserve" if context.model else None,
        "gen_ai.request.model": context.model or None,
        "gen_ai.response.id": context.completion_id or None,
        "gen_ai.request.choice.count": context.num_sequences if context.num_sequences > 1 else None,
        "gen_ai.usage.input_tokens": context.prompt_tokens if is_generation else None,
        "gen_ai.usage.output_tokens": context.generation_tokens if is_generation else None,
        "gen_ai.usage.cache_read.input_tokens": context.cached_tokens if is_generation else None,
        "gen_ai.response.finish_reasons": [context.finish_reason] if context.finish_reason else None,
        "gen_ai.server.time_to_first_token": ttft_s,
        "gen_ai.server.time_per_output_token": context.itl_s,
        "llmserve.queue_s": context.queue_s,
        "llmserve.preemptions": context.num_preemptions or None,
        "llmserve.restarts": context.num_restarts or None,
        "llmserve.request_id": context.request_id,
    }


def pass_on(context: RequestContext, parent: tuple[str, str, int]) -> None:
    """Without spans, the trace that a request belongs to is still named in the books and in the answer."""
    trace_id, _, flags = parent
    context.trace_id = trace_id
    context.traceparent = f"00-{trace_id}-{secrets.token_hex(8)}-{flags:02x}"


def open_tracer() -> Tracer:
    """Exports over OTLP, as the environment variables OTEL_* say. Raises ConfigError without the extra `otel`."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        packages = "opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
        raise ConfigError(f"--otel needs OpenTelemetry: {error}. Run: pip install {packages}") from error
    provider = TracerProvider(resource=Resource.create({"service.name": "llmserve"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracer(provider)
