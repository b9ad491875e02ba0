"""Lanes and task names. A lane is a queue and its workers."""

from urllib.parse import urlsplit

from app.config.settings import Settings

LANES = ("live", "download", "backfill", "maintenance")
APPLY = "headrace.apply"  # applies one message of deliveries; the only task that the endpoint sends
FETCH = "headrace.fetch"  # goes on with one backfill for a while
DOWNLOAD = "headrace.download"  # fetches one delivery that was only announced, before its URL expires
RECONCILE = "headrace.reconcile"  # goes on with comparing what there should be with what is stored
SWEEP = "headrace.sweep"  # beat's: looks for work that is due
SENT_AT = "headrace-sent-at"  # the header that says so, in unix seconds


def is_amqp(url: str) -> bool:
    """Whether the broker speaks AMQP (RabbitMQ) rather than Redis."""
    return urlsplit(url).scheme in ("amqp", "amqps")


def messaging_system(settings: Settings) -> str:
    """The broker's kind, by the name that OpenTelemetry has for it."""
    return "rabbitmq" if is_amqp(settings.need_broker()) else "redis"
