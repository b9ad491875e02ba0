"""The Prometheus metrics of all processes. No label identifies a user.

With PROMETHEUS_MULTIPROC_DIR set, each process of a machine exposes the sum of all of them. Gauges in a `live...` mode
drop the values of dead processes.
"""

import logging
from collections import Counter as Counted
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
    multiprocess,
    start_http_server,
    values,
)
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from app.commands import process_alive
from app.config.settings import process_environment

log = logging.getLogger(__name__)
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
ANSWER_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
TASK_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


def _live_gauge(name: str, documentation: str, *labels: str) -> Gauge:
    """A gauge that only one process sets."""
    return Gauge(name, documentation, labels, multiprocess_mode="livemostrecent")


# The endpoint.
ANSWERS = Counter(
    "headrace_answers_total",
    "Webhooks answered, by status; a 413 or 503 only with a valid signature",
    ["aggregator", "status"],
)
# Counted separately, because anyone without a secret can cause these answers: alerts do not use them.
UNVERIFIED = Counter(
    "headrace_unverified_total",
    "Webhook requests answered before their signature could be checked (400, 408, 413, 503), by status",
    ["aggregator", "status"],
)
REJECTED = Counter("headrace_refused_total", "Webhooks with an invalid signature, by reason", ["aggregator", "reason"])
ANSWER_SECONDS = Histogram(
    "headrace_answer_seconds",
    "Time from the complete body of a webhook to its answer",
    ["aggregator"],
    buckets=ANSWER_BUCKETS,
)
MESSAGE_DELIVERIES = Histogram(
    "headrace_message_deliveries", "Deliveries per published message", buckets=(1, 2, 5, 10, 20, 50, 100, 200)
)
PUBLISH_SECONDS = Histogram(
    "headrace_publish_seconds",
    "Time until the broker confirmed a message or the publish failed",
    ["result"],
    buckets=ANSWER_BUCKETS,
)
LAST_PUBLISH = Gauge(
    "headrace_last_publish_timestamp_seconds",
    "When the broker last confirmed a message with a delivery",
    ["aggregator"],
    multiprocess_mode="max",
)
CIRCUIT_OPEN = Gauge(
    "headrace_circuit_open", "Web processes whose last publishes have failed in a row", multiprocess_mode="livesum"
)

# Workers.
TASK_SECONDS = Histogram(
    "headrace_task_seconds", "Run time of a task; of headrace.apply: one message", ["task"], buckets=TASK_BUCKETS
)
TASKS = Counter("headrace_tasks_total", "Finished tasks by state: SUCCESS, RETRY ...", ["task", "state"])
RETRIES = Counter("headrace_retries_total", "Failed tries of tasks that are repeated, by cause", ["task", "reason"])
PUBLISHED = Counter("headrace_published_total", "Tasks sent by workers and beat", ["task"])
REDELIVERED = Counter("headrace_redelivered_total", "Messages redelivered after a worker died or lost its connection")
OUTCOMES = Counter("headrace_outcomes_total", "Deliveries processed by workers, by outcome", ["aggregator", "outcome"])
DELIVERY_SECONDS = Histogram(
    "headrace_delivery_seconds",
    "Time from the receipt of a delivery to its commit",
    ["aggregator"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200, 43200),
)
ROWS = Counter(
    "headrace_rows_total", "Rows changed, by kind (record, sample, connection, grant) and origin", ["kind", "origin"]
)
DUPLICATE_SAMPLES = Counter(
    "headrace_duplicate_samples_total", "Samples that shared their key with a different sample of the same delivery", []
)
SAMPLES_WITHOUT_TIMESTAMP = Counter(
    "headrace_samples_without_timestamp_total", "Values skipped because they have no timestamp", []
)
REFUSED_ITEMS = Counter(
    "headrace_refused_items_total", "Items refused while the rest of their delivery or page was stored", ["origin"]
)

# Requests to the aggregators.
REQUESTS = Counter("headrace_requests_total", "Requests to aggregators, by class of status", ["aggregator", "status"])
REQUEST_SECONDS = Histogram(
    "headrace_request_seconds", "Time of a request to an aggregator", ["aggregator"], buckets=REQUEST_BUCKETS
)
UNREAD_ENTRIES = Counter(
    "headrace_unread_entries_total", "Entries of an aggregator's own listings that could not be read", ["aggregator"]
)
THROTTLED = Counter("headrace_throttled_total", "Requests delayed by the rate limit or a pause", ["aggregator"])

# The change feed.
CHANGES = Counter("headrace_changes_total", "Changes added to the change feed", [])

CONSUMER_LAG = _live_gauge(
    "headrace_feed_consumer_lag", "Changes that a consumer of the change feed has not read", "consumer"
)
CONSUMER_EXPIRES = _live_gauge(
    "headrace_feed_consumer_expires_seconds",
    "Time until a change is dropped that a consumer has not read; HEADRACE_FEED_DAYS if it has read all",
    "consumer",
)
UNNUMBERED = _live_gauge("headrace_feed_unnumbered", "Changes that are not in the change feed yet")

# Notifications.
NOTIFICATIONS = Counter(
    "headrace_notifications_total", "Attempts of notifications, by outcome: sent, failed (retried), dead", ["outcome"]
)

# Values per day.
DAYS_COMPUTED = Counter(
    "headrace_days_computed_total", "Days computed by workers of the lane derive, each of one person and resource", []
)

# Set by the sweep, in the maintenance worker.
LAST_SWEEP = _live_gauge("headrace_last_sweep_timestamp_seconds", "When the sweep last ran")
LANE_MESSAGES = _live_gauge("headrace_lane_messages", "Messages queued in a lane", "lane")
LANE_OLDEST = _live_gauge(
    "headrace_lane_oldest_seconds", "Age of the next message of a lane; not available on RabbitMQ", "lane"
)
LANE_UNACKED = _live_gauge(
    "headrace_lane_unacked",
    "Messages of a lane that a worker has received and not acknowledged; NaN if unknown (RabbitMQ)",
    "lane",
)
LANE_UNACKED_SECONDS = _live_gauge(
    "headrace_lane_unacked_seconds",
    "Time since a worker received the oldest unacknowledged message that is not delayed; on RabbitMQ, as long as the "
    "sweep has seen such messages and no acknowledgement",
    "lane",
)
LANE_RETRYING = _live_gauge("headrace_lane_retrying", "Messages of a lane whose last try failed", "lane")
BACKFILLS = _live_gauge("headrace_backfills", "Backfills by status", "status")
GAPS = _live_gauge("headrace_gaps", "Gaps by responsible party", "whose")
DEAD_LETTERS = _live_gauge("headrace_dead_letters", "Stored dead letters", "aggregator")
CONNECTIONS = _live_gauge("headrace_connections", "Connections by status", "status")
CRASHED_DELIVERIES = _live_gauge(
    "headrace_crashed_deliveries", "Deliveries that crashed a worker and are not yet applied"
)
LOST_DELIVERIES = _live_gauge(
    "headrace_lost_deliveries", "Deliveries that Junction gave up, and that no reconciliation has followed yet"
)
PAUSED = _live_gauge("headrace_account_paused_seconds", "Remaining pause of an account", "aggregator")
TERRA_TOKEN_EXPIRES = _live_gauge(
    "headrace_terra_admin_token_expires_timestamp_seconds",
    "When the token of Terra's Admin API expires; 0: unknown or never",
)
NOTIFICATIONS_PENDING = _live_gauge(
    "headrace_notifications_pending", "Notifications that are not sent yet", "subscription"
)
NOTIFICATIONS_OLDEST = _live_gauge(
    "headrace_notifications_oldest_seconds",
    "Age of the oldest notification of an active subscription that is due or failed",
    "subscription",
)
SUBSCRIPTIONS = _live_gauge("headrace_subscriptions", "Subscriptions by status", "status")
DAYS_PENDING = _live_gauge("headrace_days_pending", "Days in the queue to be computed, each of one person and resource")
DAYS_OLDEST = _live_gauge(
    "headrace_days_oldest_seconds",
    "Time that the oldest dates have been queued since their last turn, or that a change has not been read",
)
DAYS_FAILED = _live_gauge(
    "headrace_days_failed", "Pairs of person and resource whose days could not be computed several times in a row"
)
for _counter, _labels in (
    (REFUSED_ITEMS, ("webhook", "backfill", "reconcile", "replay")),
    (UNREAD_ENTRIES, ("junction", "terra")),
    (NOTIFICATIONS, ("sent", "failed", "dead")),
):
    for _label in _labels:
        _counter.labels(_label)  # starts at 0: Prometheus' increase() does not count a series' first value
_shown: dict[Gauge, set[str]] = {}


@cache
def series(metric: Counter | Gauge | Histogram, *labels: object) -> Any:
    """The series of a metric, cached for those of every webhook, because `labels` costs 3 us."""
    return metric.labels(*labels)


def show(gauge: Gauge, found: Mapping[str, float]) -> None:
    """Sets a gauge with one label. A label that is missing now becomes 0: a multiprocess file keeps every series."""
    seen = _shown.setdefault(gauge, set())
    for label in seen | found.keys():
        gauge.labels(label).set(found.get(label, 0))
    seen.update(found)


def count_rows(rows: Mapping[str, int], origin: str) -> None:
    """Counts changed rows by kind. Call it after the commit."""
    for kind, count in rows.items():
        if count:
            ROWS.labels(kind, origin).inc(count)


def status_class(status: int) -> str:
    """The label for an HTTP status: 2xx, 4xx ..., 429 (rate limits) or none (no response)."""
    return "429" if status == 429 else f"{status // 100}xx" if status >= 100 else "none"


def exposition() -> bytes:
    return generate_latest(_registry())


def serve(host: str, port: int) -> None:
    """Exposes the metrics on a port, from a thread. Failing to bind the port must not stop the worker."""
    try:
        start_http_server(port, host, _registry())
    except OSError as error:
        log.warning("HEADRACE_METRICS_PORT: %d on %s cannot be used: %s", port, host, error.strerror)


def counts(text: str, name: str, label: str) -> dict[str, int]:
    """A counter of an exposition, summed by one of its labels."""
    found: Counted[str] = Counted()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name:
                found[sample.labels[label]] += int(sample.value)
    return dict(found)


class _Machine(Collector):
    """The sum of all processes that write to the folder; removes the live gauges of dead ones first."""

    def collect(self) -> Iterable[Metric]:
        folder = Path(process_environment()[METRICS_FOLDER])
        for file in folder.glob("gauge_live*.db"):
            pid = int(file.stem.rpartition("_")[2])
            if not process_alive(pid):
                multiprocess.mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]
        found: Iterable[Metric] = multiprocess.MultiProcessCollector(None, str(folder)).collect()  # type: ignore[no-untyped-call]
        return found


def _registry() -> CollectorRegistry:
    if values.ValueClass is values.MutexValue:
        return REGISTRY
    registry = CollectorRegistry()
    registry.register(_Machine())
    return registry
