"""Lanes and task names. A lane is a queue and its workers."""

from urllib.parse import urlsplit

from app.config.settings import Settings

LANES = ("live", "download", "backfill", "maintenance")
APPLY = "headrace.apply"  # applies one message of deliveries; the only task that the endpoint sends
FETCH = "headrace.fetch"  # runs one backfill for a time slice
DOWNLOAD = "headrace.download"  # downloads one delivery that contains only a URL, before the URL expires
RECONCILE = "headrace.reconcile"  # compares for a time slice the aggregator's data with the stored data
SWEEP = "headrace.sweep"  # sent by beat: starts work that is due
SENT_AT = "headrace-sent-at"  # header: when the task was sent, in unix seconds


def is_amqp(url: str) -> bool:
    """Whether the broker speaks AMQP (RabbitMQ) rather than Redis."""
    return urlsplit(url).scheme in ("amqp", "amqps")


def messaging_system(settings: Settings) -> str:
    """OpenTelemetry's name of the broker."""
    return "rabbitmq" if is_amqp(settings.need_broker()) else "redis"
