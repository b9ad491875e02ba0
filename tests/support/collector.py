"""An OpenTelemetry collector that records the spans it receives, and functions that read spans in memory."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.support.http_servers import Handler, serving


@dataclass(frozen=True)
class ReceivedSpan:
    """A received span, with ids in hexadecimal."""

    service: str
    name: str
    kind: str
    trace: str
    id: str
    parent: str
    links: tuple[str, ...]  # the spans that it links to
    attributes: dict[str, Any] = field(hash=False)
    is_error: bool = False


@dataclass
class Collector:
    """The URL of the collector, and the bodies of the requests that it received."""

    url: str = ""
    raw: list[bytes] = field(default_factory=list)

    @property
    def spans(self) -> list[ReceivedSpan]:
        """All received spans."""
        return [one for raw in list(self.raw) for one in decoded(raw)]

    def named(self, name: str) -> list[ReceivedSpan]:
        """The received spans with this name."""
        return [one for one in self.spans if one.name == name]


def decoded(raw: bytes) -> Iterator[ReceivedSpan]:
    """The spans of one request."""
    for resource in ExportTraceServiceRequest.FromString(raw).resource_spans:
        service = _plain(resource.resource.attributes)["service.name"]
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield ReceivedSpan(
                    service=service,
                    name=span.name,
                    kind=Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
                    trace=span.trace_id.hex(),
                    id=span.span_id.hex(),
                    parent=span.parent_span_id.hex(),
                    links=tuple(link.span_id.hex() for link in span.links),
                    attributes=_plain(span.attributes),
                    is_error=span.status.code == span.status.STATUS_CODE_ERROR,
                )


def _plain(pairs: Any) -> dict[str, Any]:
    def value(pair: KeyValue) -> Any:
        kind = pair.value.WhichOneof("value")
        return getattr(pair.value, kind) if kind else None

    return {pair.key: value(pair) for pair in pairs}


@contextlib.contextmanager
def collector() -> Iterator[Collector]:
    """Runs a collector until the block ends."""
    found = Collector()

    class Traces(Handler):
        """POST /v1/traces."""

        def do_POST(self) -> None:  # noqa: N802 - the name of http.server
            body = self.read_body()
            if self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf":
                found.raw.append(body)
            self.answer(200)

    with serving(Traces) as found.url:
        yield found


def named(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    """The ended spans with this name."""
    return [one for one in exporter.get_finished_spans() if one.name == name]


def span_ids(span: ReadableSpan) -> tuple[int, int]:
    """The trace id and span id."""
    assert span.context is not None
    return span.context.trace_id, span.context.span_id


def linked(span: ReadableSpan) -> list[tuple[int, int]]:
    """The trace id and span id of each link, sorted."""
    return sorted((link.context.trace_id, link.context.span_id) for link in span.links)


def attributes(span: ReadableSpan) -> Mapping[str, Any]:
    """The attributes of a span."""
    return span.attributes or {}
