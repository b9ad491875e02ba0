"""OpenTelemetry spans, exported by OTLP over HTTP. Only this module imports the SDK; only `tracing` imports it."""

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import (
    Link,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceState,
    format_trace_id,
    get_current_span,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from app.config.settings import process_environment

EXPORT_SECONDS = 2.0  # per batch, unless OTEL_EXPORTER_OTLP_TIMEOUT is set; the SDK's 10 s exceed STOP_SECONDS
STOP_SECONDS = 3.0  # to export the remaining spans when a process stops
QUIET_SECONDS = 60.0  # between two log lines about an unavailable collector
ROOT = Context()  # no parent: neither the sender's span nor the current one
_headers = TraceContextTextMapPropagator()


class LinkedParentBasedSampler(Sampler):
    """Samples a span if its parent or a linked span is sampled; a span without either, as OTEL_TRACES_SAMPLER says.

    A request, its message and the work on that message are three linked traces. If each were sampled independently, all
    three of a delivery would rarely be sampled.
    """

    def __init__(self, otherwise: Sampler) -> None:
        self._otherwise = otherwise

    def should_sample(  # noqa: PLR0917 - the SDK's
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Any = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        parent = get_current_span(parent_context).get_span_context()
        if before := [parent] if parent.is_valid else [link.context for link in links or ()]:
            sampled = any(one.trace_flags.sampled for one in before)
            return SamplingResult(Decision.RECORD_AND_SAMPLE if sampled else Decision.DROP, attributes)
        return self._otherwise.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

    def get_description(self) -> str:
        return f"LinkedParentBased({self._otherwise.get_description()})"


class ServerSpan:
    __slots__ = ("_span",)

    def __init__(self, span: Span) -> None:
        self._span = span

    @property
    def context(self) -> SpanContext:
        """The target of links from other spans."""
        return self._span.get_span_context()

    @property
    def trace_id(self) -> str:
        return format_trace_id(self.context.trace_id)

    def end(self, status: int, delivery: str = "") -> None:
        """Ends the span with the answer's status and the id of the verified delivery."""
        if delivery:
            self._span.set_attribute("headrace.delivery", delivery)
        self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


class Spans:
    """Makes the spans of one process."""

    def __init__(self, provider: TracerProvider, system: str) -> None:
        self._provider, self._system = provider, system
        provider.sampler = LinkedParentBasedSampler(provider.sampler)
        self._tracer = provider.get_tracer("headrace")

    def stop(self) -> None:
        """Exports the remaining spans, in a thread: the SDK waits without limit for a collector that hangs."""
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        thread.join(STOP_SECONDS)

    def server_span(self, aggregator: str) -> ServerSpan:
        """Starts a trace. The sender's `traceparent` is ignored, because no signature covers it."""
        route = f"/webhooks/{aggregator}"
        about = {"http.request.method": "POST", "http.route": route, "headrace.aggregator": aggregator}
        return ServerSpan(self._tracer.start_span(f"POST {route}", ROOT, SpanKind.SERVER, about))

    def producer_span(self, lane: str, requests: Iterable[ServerSpan | None]) -> AbstractContextManager[object]:
        """The span of a publish, linked to the requests of its deliveries (None: a request without a span)."""
        links = [Link(one.context) for one in requests if one is not None]
        about = self._message("send", "publish", lane) | {"messaging.batch.message_count": len(links)}
        return self._open(f"publish {lane}", SpanKind.PRODUCER, about, links, ROOT)

    def consumer_span(
        self, task: str, lane: str, message_id: str, carriers: Iterable[Mapping[str, Any]]
    ) -> AbstractContextManager[object]:
        """A span linked to its publishes, not a child: the task may run hours later, repeatedly, for many requests."""
        links = [Link(sent) for sent in map(_span_context, carriers) if sent.is_valid]
        about = self._message("process", task, lane) | {"headrace.task": task}
        if message_id:
            about |= {"messaging.message.id": message_id, "headrace.task_id": message_id}
        return self._open(f"{task} {lane}", SpanKind.CONSUMER, about, links, ROOT)

    def inject(self) -> dict[str, str]:
        """The W3C headers of the current span, if there is one."""
        headers: dict[str, str] = {}
        _headers.inject(headers)
        return headers

    def set_batch_size(self, count: int) -> None:
        get_current_span().set_attribute("messaging.batch.message_count", count)

    def client_span(self, method: str, about: Mapping[str, str | int]) -> AbstractContextManager[object]:
        """The span of a request, without its URL, which contains a user id or a signature."""
        return self._open(method, SpanKind.CLIENT, {"http.request.method": method} | _attributes(about))

    def set_status(self, status: int) -> None:
        """Sets the HTTP status on the current span; 0: no response."""
        span = get_current_span()
        if status:
            span.set_attribute("http.response.status_code", status)
        if not 100 <= status < 400:
            span.set_attribute("error.type", str(status) if status else "no_answer")
            span.set_status(StatusCode.ERROR)

    def span(self, name: str, about: Mapping[str, str | int]) -> AbstractContextManager[object]:
        return self._open(name, SpanKind.INTERNAL, _attributes(about))

    def set_attributes(self, about: Mapping[str, str | int]) -> None:
        get_current_span().set_attributes(_attributes(about))

    def record_error(self, error: Exception) -> None:
        _record_error(get_current_span(), error)

    def trace_id(self) -> str:
        context = get_current_span().get_span_context()
        return format_trace_id(context.trace_id) if context.is_valid else ""

    def _message(self, kind: str, operation: str, lane: str) -> dict[str, Any]:
        return {
            "messaging.system": self._system,
            "messaging.destination.name": lane,
            "messaging.operation.type": kind,
            "messaging.operation.name": operation,
        }

    @contextmanager
    def _open(
        self,
        name: str,
        kind: SpanKind,
        about: Mapping[str, Any],
        links: Sequence[Link] = (),
        parent: Context | None = None,
    ) -> Iterator[None]:
        # The SDK would record the text and the stack of an exception, which may contain values.
        with self._tracer.start_as_current_span(
            name, parent, kind, about, links, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield
            except Exception as error:
                _record_error(span, error)
                raise


def _span_context(headers: Mapping[str, Any]) -> SpanContext:
    carrier = {"traceparent": str(headers.get("traceparent"))}
    return get_current_span(_headers.extract(carrier, ROOT)).get_span_context()


def _attributes(about: Mapping[str, str | int]) -> dict[str, str | int]:
    return {f"headrace.{name}": value for name, value in about.items()}


def _record_error(span: Span, error: Exception) -> None:
    span.set_attribute("error.type", type(error).__name__)
    span.set_status(StatusCode.ERROR)


class _RateLimitFilter(logging.Filter):
    """Logs at most one error per minute."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if record.levelno < logging.ERROR or now < self._next:
            return False
        self._next = now + QUIET_SECONDS
        return True


def _without_token(record: logging.LogRecord) -> bool:
    """Replaces the library's message about headers that it cannot parse, which quotes the collector's token."""
    record.msg, record.args = "OTEL_EXPORTER_OTLP_HEADERS: not usable; it should be name=value, comma-separated", ()
    return True


def _resource(service: str) -> Resource:
    """The resource from the environment, with a service name if that has none."""
    found = Resource.create()
    if str(found.attributes[SERVICE_NAME]).startswith("unknown_service"):
        return found.merge(Resource({SERVICE_NAME: service}))
    return found


def exporting(service: str, system: str) -> Spans:
    """Spans with a background exporter, configured by OTEL_EXPORTER_OTLP_... and OTEL_BSP_...

    Spans that exceed its queue or its timeout are dropped: tracing must not delay the work.
    """
    logging.getLogger("opentelemetry.util.re").addFilter(_without_token)
    given = process_environment().keys() & {"OTEL_EXPORTER_OTLP_TIMEOUT", "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT"}
    exporter = OTLPSpanExporter(timeout=None if given else EXPORT_SECONDS)
    rate_limit = _RateLimitFilter()
    for name in (OTLPSpanExporter.__module__, "opentelemetry.sdk._shared_internal"):
        logging.getLogger(name).addFilter(rate_limit)
    provider = TracerProvider(resource=_resource(service), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Spans(provider, system)
