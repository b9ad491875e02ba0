"""Lanes, task names and the brokers of BROKER_URL. A lane is a queue and its workers."""

import time
from urllib.parse import urlsplit

from app.config.settings import Settings

LANES = ("live", "download", "backfill", "maintenance", "notify", "derive")
APPLY = "headrace.apply"  # applies one message of deliveries; the only task that the endpoint sends
FETCH = "headrace.fetch"  # runs one backfill for a time slice
DOWNLOAD = "headrace.download"  # applies one delivery that is large, or whose event has to be downloaded from a URL
RECONCILE = "headrace.reconcile"  # compares for a time slice the aggregator's data with the stored data
SWEEP = "headrace.sweep"  # sent by beat: starts work that is due
NOTIFY = "headrace.notify"  # sends notifications for a time slice
DERIVE = "headrace.derive"  # computes days that have changed, for a time slice
PROBE = "headrace.probe"  # on RabbitMQ: shows that the lane accepts messages; workers ignore it
# Headers of a task: when it was sent (unix seconds), and of a retried one, how many tries PostgreSQL did not execute
# (RetryAlone), how many lost their connection, when the first try failed (unix seconds), and why the last one did.
SENT_AT, FAILURES, LOST = "headrace-sent-at", "headrace-failures", "headrace-lost"
FAILING_SINCE, RETRY_REASON = "headrace-failing-since", "headrace-retry-reason"
RECEIVED_AT = "headrace-received-at"  # header, on Redis: when a worker received the message (unix seconds)
# Suffixes of a lane's lists on Redis: messages between the lane and "unacked", and bytes that are not a message.
PROCESSING, INVALID = ":processing", ":invalid"


def is_amqp(url: str) -> bool:
    return urlsplit(url).scheme in ("amqp", "amqps")


def messaging_system(settings: Settings) -> str:
    """OpenTelemetry's name of the broker."""
    return "rabbitmq" if is_amqp(settings.need_broker()) else "redis"


_failures: dict[str, float] = {}  # by URL: when it last failed (monotonic seconds); shared by the whole process


def in_order(url: str) -> list[str]:
    """The RabbitMQ nodes of BROKER_URL in the order in which to try them: failed ones last, in the order of failure.

    Any other URL names one broker.
    """
    return sorted(url.split(";"), key=lambda one: _failures.get(one, 0.0)) if is_amqp(url) else [url]


def mark_failed(broker: str) -> None:
    """Moves a broker to the end of the order."""
    _failures[broker] = time.monotonic()
