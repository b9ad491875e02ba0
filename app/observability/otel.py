"""Spans by OpenTelemetry's SDK, sent by OTLP over HTTP. Only this module imports the SDK; only `tracing` loads it."""

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

EXPORT_SECONDS = 2.0  # for a batch, unless OTEL_EXPORTER_OTLP_TIMEOUT says otherwise; the SDK's own 10 s outlast a stop
STOP_SECONDS = 3.0  # for all that is left when a process ends
QUIET_SECONDS = 60.0  # between two lines about a collector that takes nothing
ROOT = Context()  # without a parent: neither of the sender's, nor of what happens to be at hand
_headers = TraceContextTextMapPropagator()


class LinkedParentBasedSampler(Sampler):
    """Samples what belongs to something sampled; what belongs to nothing, as OTEL_TRACES_SAMPLER says.

    Each request, each message and the work on it is a trace of its own, so a share of each, drawn by itself, would
    hardly ever hold all three of one delivery.
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
        """The decision for a span that begins."""
        parent = get_current_span(parent_context).get_span_context()
        if before := [parent] if parent.is_valid else [link.context for link in links or ()]:
            sampled = any(one.trace_flags.sampled for one in before)
            return SamplingResult(Decision.RECORD_AND_SAMPLE if sampled else Decision.DROP, attributes)
        return self._otherwise.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

    def get_description(self) -> str:
        """For whoever prints it."""
        return f"Follower({self._otherwise.get_description()})"


class RequestSpan:
    """The span of a webhook."""

    __slots__ = ("_span",)

    def __init__(self, span: Span) -> None:
        self._span = span

    @property
    def context(self) -> SpanContext:
        """By which other spans link to it."""
        return self._span.get_span_context()

    @property
    def trace_id(self) -> str:
        """For the log."""
        return format_trace_id(self.context.trace_id)

    def answered(self, status: int, delivery: str = "") -> None:
        """Ends it. The delivery goes by its id, once that was verified."""
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
        """In a thread, because the SDK waits for a collector that hangs as long as it likes."""
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        thread.join(STOP_SECONDS)

    def server_span(self, aggregator: str) -> RequestSpan:
        """A trace begins here: no `traceparent` of the sender's is looked at, because no signature covers it."""
        route = f"/webhooks/{aggregator}"
        about = {"http.request.method": "POST", "http.route": route, "headrace.aggregator": aggregator}
        return RequestSpan(self._tracer.start_span(f"POST {route}", ROOT, SpanKind.SERVER, about))

    def producer_span(self, lane: str, requests: Iterable[Any]) -> AbstractContextManager[object]:
        """A message, linked to the requests (None: without a span) that brought what it holds."""
        links = [Link(one.context) for one in requests if one is not None]
        about = self._message("send", "publish", lane) | {"messaging.batch.message_count": len(links)}
        return self._open(f"publish {lane}", SpanKind.PRODUCER, about, links, ROOT)

    def consumer_span(
        self, task: str, lane: str, message_id: str, carriers: Iterable[Mapping[str, Any]]
    ) -> AbstractContextManager[object]:
        """Linked, and not the child: it may come hours later, and again, and holds what many requests brought."""
        links = [Link(sent) for sent in map(_sent, carriers) if sent.is_valid]
        about = self._message("process", task, lane) | {"headrace.task": task}
        if message_id:
            about |= {"messaging.message.id": message_id, "headrace.task_id": message_id}
        return self._open(f"{task} {lane}", SpanKind.CONSUMER, about, links, ROOT)

    def inject(self) -> dict[str, str]:
        """W3C's headers of the span that is now, if there is one."""
        headers: dict[str, str] = {}
        _headers.inject(headers)
        return headers

    def set_batch_size(self, count: int) -> None:
        """Of the message at hand."""
        get_current_span().set_attribute("messaging.batch.message_count", count)

    def client_span(self, method: str, about: Mapping[str, str | int]) -> AbstractContextManager[object]:
        """Without its URL, in which a user stands, or a signature."""
        return self._open(method, SpanKind.CLIENT, {"http.request.method": method} | _attributes(about))

    def answered(self, status: int) -> None:
        """Of the request at hand."""
        span = get_current_span()
        if status:
            span.set_attribute("http.response.status_code", status)
        if not 100 <= status < 400:
            span.set_attribute("error.type", str(status) if status else "no_answer")
            span.set_status(StatusCode.ERROR)

    def span(self, name: str, about: Mapping[str, str | int]) -> AbstractContextManager[object]:
        """A part of the span at hand."""
        return self._open(name, SpanKind.INTERNAL, _attributes(about))

    def set_attributes(self, about: Mapping[str, str | int]) -> None:
        """More about the span at hand."""
        get_current_span().set_attributes(_attributes(about))

    def record_error(self, error: Exception) -> None:
        """Of the span at hand."""
        _record_error(get_current_span(), error)

    def trace_id(self) -> str:
        """Of the span at hand."""
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
        # The SDK would record an exception with its text and its stack, in which values may stand.
        with self._tracer.start_as_current_span(
            name, parent, kind, about, links, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield
            except Exception as error:
                _record_error(span, error)
                raise


def _sent(headers: Mapping[str, Any]) -> SpanContext:
    carrier = {"traceparent": str(headers.get("traceparent"))}
    return get_current_span(_headers.extract(carrier, ROOT)).get_span_context()


def _attributes(about: Mapping[str, str | int]) -> dict[str, str | int]:
    return {f"headrace.{name}": value for name, value in about.items()}


def _record_error(span: Span, error: Exception) -> None:
    span.set_attribute("error.type", type(error).__name__)
    span.set_status(StatusCode.ERROR)


class _RateLimitFilter(logging.Filter):
    """Lets one line through, and the next one a minute later."""

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
    """The library quotes a header that it cannot read, and in it stands the collector's token."""
    record.msg, record.args = "OTEL_EXPORTER_OTLP_HEADERS: not usable; it should be name=value, comma-separated", ()
    return True


def _resource(service: str) -> Resource:
    """What the environment says of this process, and its name if that has none."""
    found = Resource.create()
    if str(found.attributes[SERVICE_NAME]).startswith("unknown_service"):
        return found.merge(Resource({SERVICE_NAME: service}))
    return found


def exporting(service: str, system: str) -> Spans:
    """Spans that go where the environment says (OTEL_EXPORTER_OTLP_..., OTEL_BSP_...), from a thread and a short queue.

    What does not fit into the queue, or is not taken in time, is dropped: it is about the work, and not the work.
    """
    logging.getLogger("opentelemetry.util.re").addFilter(_without_token)
    given = process_environment().keys() & {"OTEL_EXPORTER_OTLP_TIMEOUT", "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT"}
    exporter = OTLPSpanExporter(timeout=None if given else EXPORT_SECONDS)
    seldom = _RateLimitFilter()
    for name in (OTLPSpanExporter.__module__, "opentelemetry.sdk._shared_internal"):
        logging.getLogger(name).addFilter(seldom)
    provider = TracerProvider(resource=_resource(service), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Spans(provider, system)
