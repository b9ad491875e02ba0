"""Tracing with OpenTelemetry; off unless an OTLP endpoint is configured.

`headrace[tracing]` installs the SDK. Only `otel` imports it, and is itself imported only if tracing is on. Otherwise
each function here costs a comparison with None. Spans have the ids of deliveries, backfills and tasks like the log
(`headrace.delivery` ...), but no user, URL, body, answer or error text.
"""

import contextlib
import logging
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias

from app.config.settings import Settings

if TYPE_CHECKING:
    from app.observability import otel

ServerSpan: TypeAlias = "otel.ServerSpan"
MERGED_HEADERS = "headrace-others"  # header: the tracing headers of the messages that were merged into this one
log = logging.getLogger(__name__)
_spans: "otel.Spans | None" = None
_nothing = contextlib.nullcontext()


def start(settings: Settings, process: str, system: str) -> None:
    """Starts tracing. `system` is the broker's OpenTelemetry name. If the package is missing, it logs a warning."""
    if settings.traces:
        try:
            use(import_module("app.observability.otel").exporting(f"headrace-{process}", system))
        except ModuleNotFoundError as missing:
            log.warning("tracing is off: %s is not installed; pip install 'headrace[tracing]'", missing.name)


def use(spans: "otel.Spans | None") -> None:
    """Sets the spans of this process; None turns tracing off."""
    global _spans  # noqa: PLW0603 - per process, like logging
    _spans = spans


def stop() -> None:
    """Exports the remaining spans, for a few seconds at most."""
    if _spans is not None:
        _spans.stop()


def server_span(aggregator: str) -> "ServerSpan | None":
    """Starts the span of a webhook request; the caller ends it. None if tracing is off."""
    return None if _spans is None else _spans.server_span(aggregator)


def producer_span(lane: str, requests: Iterable["ServerSpan | None"]) -> AbstractContextManager[object]:
    """The span of a publish, linked to the requests of its deliveries."""
    return _nothing if _spans is None else _spans.producer_span(lane, requests)


def inject() -> Mapping[str, str]:
    """The message headers that link the consumer's span to the current one."""
    return {} if _spans is None else _spans.inject()


def consumer_span(
    task: str, lane: str, message_id: str, headers: Mapping[str, Any] | None
) -> AbstractContextManager[object]:
    """The span of a task, linked to the publishes of its message."""
    if _spans is None:
        return _nothing
    known = headers or {}
    return _spans.consumer_span(task, lane, message_id, [known, *known.get(MERGED_HEADERS, ())])


def set_batch_size(count: int) -> None:
    if _spans is not None:
        _spans.set_batch_size(count)


def client_span(method: str, **about: str | int) -> AbstractContextManager[object]:
    return _nothing if _spans is None else _spans.client_span(method, about)


def set_status(status: int) -> None:
    """Sets the HTTP status of the current request; 0: no response."""
    if _spans is not None:
        _spans.set_status(status)


def span(name: str, **about: str | int) -> AbstractContextManager[object]:
    return _nothing if _spans is None else _spans.span(name, about)


def set_attributes(**about: str | int) -> None:
    if _spans is not None:
        _spans.set_attributes(about)


def record_error(error: Exception) -> None:
    """Marks the current span as failed, with the type of the error: its text may contain a value."""
    if _spans is not None:
        _spans.record_error(error)


def trace_id() -> str:
    """The id of the current trace, or ''."""
    return "" if _spans is None else _spans.trace_id()
