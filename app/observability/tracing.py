"""Tracing: what a process is at, as spans for OpenTelemetry. Off unless an endpoint for them is set.

`headrace[tracing]` installs the SDK. `otel`, the only module that imports it, is loaded only where tracing is on. Off,
each function here is a comparison with None. A span names deliveries, backfills and tasks as the log does
(`headrace.delivery` ...), and never a person, a URL, or anything of a body, an answer or the text of an error.
"""

import contextlib
import logging
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from app.config.settings import Settings

if TYPE_CHECKING:
    from app.observability.otel import Spans

MERGED_HEADERS = "headrace-others"  # a header: what the messages carried that were joined to this one
log = logging.getLogger(__name__)
_spans: "Spans | None" = None
_nothing = contextlib.nullcontext()


class ServerSpan(Protocol):
    """The span of a request, which ends with its answer."""

    @property
    def context(self) -> Any:
        """By which the message with what it brought links to it."""

    @property
    def trace_id(self) -> str:
        """For the log."""

    def answered(self, status: int, delivery: str = "") -> None:
        """Ends it. The delivery goes by its id, which is named once it is verified."""


def start(settings: Settings, process: str, system: str) -> None:
    """Begins to trace in this process, whose messages go through this system. Nothing ends because that cannot be."""
    if settings.traces:
        try:
            use(import_module("app.observability.otel").exporting(f"headrace-{process}", system))
        except ModuleNotFoundError as missing:
            log.warning("nothing is traced: %s is not installed; pip install 'headrace[tracing]'", missing.name)


def use(spans: "Spans | None") -> None:
    """What spans are made with from here on; None: they are not."""
    global _spans  # noqa: PLW0603 - a process traces or does not, as it logs
    _spans = spans


def stop() -> None:
    """Sends what has not been sent yet, for seconds at most."""
    if _spans is not None:
        _spans.stop()


def server_span(aggregator: str) -> ServerSpan | None:
    """A webhook that has come in. Whoever answers it says so to what this returns."""
    return None if _spans is None else _spans.server_span(aggregator)


def producer_span(lane: str, requests: Iterable[ServerSpan | None]) -> AbstractContextManager[object]:
    """The publishing of one message, with what these requests brought."""
    return _nothing if _spans is None else _spans.producer_span(lane, requests)


def inject() -> Mapping[str, str]:
    """What a message carries, so that whoever takes it knows of the span that is now."""
    return {} if _spans is None else _spans.inject()


def consumer_span(
    task: str, lane: str, message_id: str, headers: Mapping[str, Any] | None
) -> AbstractContextManager[object]:
    """The work on a message, linked to where it was sent."""
    if _spans is None:
        return _nothing
    known = headers or {}
    return _spans.consumer_span(task, lane, message_id, [known, *known.get(MERGED_HEADERS, ())])


def set_batch_size(count: int) -> None:
    """How many deliveries the message holds that is worked on."""
    if _spans is not None:
        _spans.set_batch_size(count)


def client_span(method: str, **about: str | int) -> AbstractContextManager[object]:
    """A request to somebody else."""
    return _nothing if _spans is None else _spans.client_span(method, about)


def set_status(status: int) -> None:
    """What came back; 0: nothing."""
    if _spans is not None:
        _spans.answered(status)


def span(name: str, **about: str | int) -> AbstractContextManager[object]:
    """A stage of the work."""
    return _nothing if _spans is None else _spans.span(name, about)


def set_attributes(**about: str | int) -> None:
    """More about what is at hand."""
    if _spans is not None:
        _spans.set_attributes(about)


def record_error(error: Exception) -> None:
    """It did not end well; told by its kind, because its text may quote a value."""
    if _spans is not None:
        _spans.record_error(error)


def trace_id() -> str:
    """Of the trace that is at hand, for the log; empty if there is none."""
    return "" if _spans is None else _spans.trace_id()
