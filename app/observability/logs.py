"""Logging as text or JSON, with ids and without the contents of deliveries.

The message id of a delivery is in the endpoint's line, the worker's line and the row in health.deliveries. A worker's
lines have the task's id and, in JSON, the trace id if there is one.
"""

import logging
from collections.abc import Mapping
from contextvars import ContextVar

from pythonjsonlogger.json import JsonFormatter

from app.config.settings import Settings
from app.observability import tracing

IDS = ("aggregator", "delivery", "backfill", "task", "task_id")
_context: ContextVar[Mapping[str, str]] = ContextVar("log_context", default={})  # noqa: B039 - never changed in place


def configure(settings: Settings) -> None:
    """Configures the log of this process."""
    handler = logging.StreamHandler()
    handler.addFilter(_add_context)
    if settings.log_format == "json":
        names = {"levelname": "level", "name": "logger"}  # one object per line, in UTC
        handler.setFormatter(JsonFormatter("%(levelname)s %(name)s %(message)s", timestamp="time", rename_fields=names))
    else:
        handler.setFormatter(_Text("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    # httpx logs every URL, which contains the user's id; Celery logs the arguments of tasks.
    for name in ("celery.app.trace", "celery.worker.strategy", "kombu", "amqp", "httpx", "httpcore", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)


def bind(**ids: str) -> None:
    """Adds these ids to all further lines of this context."""
    _context.set(ids)


def _add_context(record: logging.LogRecord) -> bool:
    for name, value in _context.get().items():
        record.__dict__.setdefault(name, value)
    if trace_id := tracing.trace_id():
        record.__dict__.setdefault("trace_id", trace_id)
    return True


class _Text(logging.Formatter):
    """A line that ends with its ids."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is logging's
        ids = (f" {name}={record.__dict__[name]}" for name in IDS if name in record.__dict__)
        return super().formatMessage(record) + "".join(ids)
