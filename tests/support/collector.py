"""What was traced: an OpenTelemetry collector that keeps what came, and what a test asks of spans in memory."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


@dataclass(frozen=True)
class Seen:
    """A span, as whoever looks at it would see it."""

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
    """Where it listens, and what it was sent."""

    url: str = ""
    raw: list[bytes] = field(default_factory=list)

    @property
    def spans(self) -> list[Seen]:
        """Everything that has come."""
        return [one for raw in list(self.raw) for one in decoded(raw)]

    def named(self, name: str) -> list[Seen]:
        """The spans of this name."""
        return [one for one in self.spans if one.name == name]


def decoded(raw: bytes) -> Iterator[Seen]:
    """The spans of one request."""
    for resource in ExportTraceServiceRequest.FromString(raw).resource_spans:
        service = _plain(resource.resource.attributes)["service.name"]
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Seen(
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
    """One that listens for as long as the block lasts."""
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        """POST /v1/traces."""

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf":
                found.raw.append(body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()


def named(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    """The spans of this name that have ended."""
    return [one for one in exporter.get_finished_spans() if one.name == name]


def own(span: ReadableSpan) -> tuple[int, int]:
    """By what others know it."""
    assert span.context is not None
    return span.context.trace_id, span.context.span_id


def linked(span: ReadableSpan) -> list[tuple[int, int]]:
    """What it links to."""
    return sorted((link.context.trace_id, link.context.span_id) for link in span.links)


def attributes(span: ReadableSpan) -> Mapping[str, Any]:
    """Its attributes."""
    return span.attributes or {}
