"""The log: a line for what happens, as text or JSON, with the ids of what it is about. Never what that holds.

A delivery goes by its message id from the endpoint's line to the worker's and its row in health.deliveries; what a
worker says while it is at a task has the task's id beside it, and in JSON the id of its trace, if there is one.
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
    """Makes this process log as the operator wants it."""
    handler = logging.StreamHandler()
    handler.addFilter(_add_context)
    handler.setFormatter(_Json() if settings.log_format == "json" else _Text())
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    # httpx would tell every URL, and with it whose history is fetched; Celery quotes the arguments of tasks.
    for name in ("celery.app.trace", "celery.worker.strategy", "kombu", "amqp", "httpx", "httpcore", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)


def bind(**ids: str) -> None:
    """Everything that is said from here on is about this."""
    _context.set(ids)


def _add_context(record: logging.LogRecord) -> bool:
    for name, value in _context.get().items():
        record.__dict__.setdefault(name, value)
    if trace_id := tracing.trace_id():
        record.__dict__.setdefault("trace_id", trace_id)
    return True


class _Text(logging.Formatter):
    """A line for a terminal, with the ids at its end."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is logging's
        ids = (f" {name}={record.__dict__[name]}" for name in IDS if name in record.__dict__)
        return super().formatMessage(record) + "".join(ids)


class _Json(JsonFormatter):
    """An object a line, its time in UTC."""

    def __init__(self) -> None:
        names = {"levelname": "level", "name": "logger"}
        super().__init__("%(levelname)s %(name)s %(message)s", timestamp="time", rename_fields=names)
