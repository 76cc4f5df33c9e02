"""OpenTelemetry: a span for each answer, with one inside for its time in line, for reading its prompt, and for writing.

Names are those of the semantic conventions for generative AI where there are some, ``criadero.`` else. No span holds a text, an id of a
token, or a key. It needs the extra ``otel``; nothing of it is imported before `open_telemetry`.
https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from criadero import __version__
from criadero.errors import UserError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

    from criadero.serve.run import Run

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
# what the request that a task answers said of the trace it is part of: its headers traceparent and tracestate, and our id for it
CARRIED: ContextVar[Mapping[str, str]] = ContextVar("CARRIED", default=MappingProxyType({}))
_OPERATIONS = {"/v1/completions": "text_completion", "/v1/embeddings": "embeddings"}  # the others chat


def wanted(asked: bool | None) -> bool:
    """Whether spans are sent: as the flag says, else when the environment names where to."""
    if asked is not None:
        return asked
    return any(os.environ.get(name) for name in ENDPOINTS) and os.environ.get("OTEL_SDK_DISABLED", "").lower() != "true"


def open_telemetry() -> Telemetry:
    """Spans that go by OTLP over HTTP to where the environment says, else to this machine's port 4318. UserError: no extra, or
    another protocol is asked for."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise UserError(
            f"sending traces needs {error.name}, which is not installed: pip install 'criadero[otel]', or say --no-otel"
        ) from None
    for name in PROTOCOLS:
        if os.environ.get(name, "http/protobuf") != "http/protobuf":
            raise UserError(f"{name} is {os.environ[name]!r:.40}: traces are sent by http/protobuf only")
    named = Resource({"service.name": "criadero", "service.version": __version__})
    try:
        # what OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say goes before ours
        provider = TracerProvider(resource=named.merge(OTELResourceDetector().detect()))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    except ValueError as error:
        raise UserError(f"the environment's OTEL_ settings cannot be used: {error}") from None
    return Telemetry(provider)


class Telemetry:
    """Makes the spans of answers that have ended."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("criadero", __version__)
        self._parent = TraceContextTextMapPropagator()

    def record(self, run: Run) -> None:
        """The spans of ``run``, which is over: its time is told apart as far as it came."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        now = time.monotonic()
        offset = time.time_ns() - round(now * 1e9)  # from the monotonic clock to the world's, in nanoseconds

        def at(moment: float) -> int:
            return offset + round(moment * 1e9)

        ended = run.ended or now
        operation = _OPERATIONS.get(run.endpoint, "chat")
        span = self._tracer.start_span(
            f"{operation} {run.entry.name}", self._parent.extract(run.carried), SpanKind.SERVER, attributes(run, operation),
            start_time=at(run.arrived),
        )  # fmt: skip
        if (problem := problem_of(run)) is not None:
            span.set_attribute("error.type", problem)
            if problem != "client_gone":  # which is nobody's mistake
                span.set_status(Status(StatusCode.ERROR))
        inside = set_span_in_context(span)
        moments = [("queue", run.arrived), ("prefill", run.started), ("decode", run.first)]
        reached = [(name, moment) for name, moment in moments if moment is not None]
        for (name, begin), (_, end) in itertools.pairwise([*reached, ("", ended)]):
            self._tracer.start_span(name, inside, start_time=at(begin)).end(at(end))
        span.end(at(ended))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def attributes(run: Run, operation: str) -> dict[str, Any]:
    """What is said of an answer: what was asked for and what came of it, in numbers and names."""
    params, samples = run.request.params, run.result.samples
    found: dict[str, Any] = {
        "gen_ai.operation.name": operation, "gen_ai.provider.name": "criadero", "gen_ai.request.model": run.entry.name,
        "gen_ai.response.model": run.entry.name, "gen_ai.usage.input_tokens": len(run.request.prompt),
        "gen_ai.usage.output_tokens": sum(len(sample.ids) for sample in samples),
        "gen_ai.usage.cache_read.input_tokens": run.result.usage.cached,
        "criadero.queue_ms": run.queue_ms, "criadero.dropped_messages": len(run.dropped), "url.path": run.endpoint,
    }  # fmt: skip
    for name, value in (("receipt_id", run.receipt_id), ("request_id", run.carried.get("request_id"))):
        if value:
            found[f"criadero.{name}"] = value
    if run.request.pooling:
        return found
    found |= {
        "gen_ai.response.finish_reasons": [sample.finish_reason or "cancelled" for sample in samples],
        "gen_ai.request.max_tokens": params.max_tokens, "gen_ai.request.temperature": float(params.temperature),
        "gen_ai.request.top_p": float(params.top_p), "gen_ai.request.choice.count": params.n,
        "gen_ai.request.frequency_penalty": float(params.frequency_penalty),
        "gen_ai.request.presence_penalty": float(params.presence_penalty),
    }  # fmt: skip
    if run.watch is not None:
        found["criadero.guard.stopped"] = len(run.watch.stopped)
    if params.seed is not None and params.seed < 2**63:  # OTLP's whole numbers have a sign
        found["gen_ai.request.seed"] = params.seed
    return found


def problem_of(run: Run) -> str | None:
    """Why an answer is not whole; None when it is."""
    if run.failed is not None:
        return run.failed.code
    if run.left:
        return "client_gone"
    if not run.done or any(sample.finish_reason == "cancelled" for sample in run.result.samples):
        return "cancelled"
    return None
