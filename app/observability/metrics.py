"""What is counted, in every process. No label says whose data it was about.

With PROMETHEUS_MULTIPROC_DIR set, the processes of a machine are added up, and each of them shows all. Of what is true
only now (`live...`), a process that has died takes its share along.
"""

import logging
from collections import Counter as Counted
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

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

from app.config.settings import process_environment
from app.observability.processes import process_alive

log = logging.getLogger(__name__)
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
LIVE_MODE: Literal["livemostrecent"] = "livemostrecent"  # of a gauge that one process sets for all
REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

# The endpoint.
ANSWERS = Counter("headrace_answers_total", "Webhooks answered, by status", ["aggregator", "status"])
REJECTED = Counter("headrace_refused_total", "Webhooks refused, by what was wrong", ["aggregator", "reason"])
ANSWER_SECONDS = Histogram(
    "headrace_answer_seconds",
    "Time from the first byte read to the answer of a webhook",
    ["aggregator"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
MESSAGE_DELIVERIES = Histogram(
    "headrace_message_deliveries", "Deliveries that left as one message", buckets=(1, 2, 5, 10, 20, 50, 100, 200)
)
PUBLISH_SECONDS = Histogram(
    "headrace_publish_seconds",
    "Time until the broker had a message, or was given up",
    ["result"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
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
    "headrace_task_seconds",
    "Time that a task took; of headrace.apply, one message",
    ["task"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
TASKS = Counter("headrace_tasks_total", "Tasks that ended, by how: SUCCESS, RETRY ...", ["task", "state"])
PUBLISHED = Counter("headrace_published_total", "Tasks that workers and beat have sent", ["task"])
REDELIVERED = Counter(
    "headrace_redelivered_total", "Messages given out again: a worker has died with them, or was cut off"
)
OUTCOMES = Counter("headrace_outcomes_total", "Deliveries settled by workers", ["aggregator", "outcome"])
DELIVERY_SECONDS = Histogram(
    "headrace_delivery_seconds",
    "Time from the receipt of a delivery to its commit",
    ["aggregator"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200, 43200),
)
ROWS = Counter(
    "headrace_rows_total", "Rows changed, by kind (record, sample, connection) and origin", ["kind", "origin"]
)
DUPLICATE_SAMPLES = Counter(
    "headrace_duplicate_samples_total", "Samples that shared their key with a different sample of the same delivery", []
)
SAMPLES_WITHOUT_TIMESTAMP = Counter(
    "headrace_samples_without_timestamp_total", "Values left out because they have no timestamp", []
)

# What is asked of the aggregators.
REQUESTS = Counter("headrace_requests_total", "Requests to aggregators, by class of status", ["aggregator", "status"])
REQUEST_SECONDS = Histogram(
    "headrace_request_seconds", "Time of a request to an aggregator", ["aggregator"], buckets=REQUEST_BUCKETS
)
THROTTLED = Counter(
    "headrace_throttled_total", "Requests put off: the rate was used up, or a pause was asked for", ["aggregator"]
)

# What the sweep has seen, in the maintenance worker.
LAST_SWEEP = Gauge(
    "headrace_last_sweep_timestamp_seconds", "When work that is due was last looked for", multiprocess_mode=LIVE_MODE
)
LANE_MESSAGES = Gauge("headrace_lane_messages", "Messages that wait in a lane", ["lane"], multiprocess_mode=LIVE_MODE)
LANE_OLDEST = Gauge(
    "headrace_lane_oldest_seconds",
    "How long the next message of a lane has waited; not told by RabbitMQ",
    ["lane"],
    multiprocess_mode=LIVE_MODE,
)
BACKFILLS = Gauge("headrace_backfills", "Backfills by status", ["status"], multiprocess_mode=LIVE_MODE)
GAPS = Gauge("headrace_gaps", "Gaps by whose turn it is", ["whose"], multiprocess_mode=LIVE_MODE)
DEAD_LETTERS = Gauge("headrace_dead_letters", "Dead letters that are kept", ["aggregator"], multiprocess_mode=LIVE_MODE)
CONNECTIONS = Gauge("headrace_connections", "Connections by status", ["status"], multiprocess_mode=LIVE_MODE)
CRASHED_DELIVERIES = Gauge(
    "headrace_crashed_deliveries",
    "Deliveries that a worker has died with, still to be applied",
    multiprocess_mode=LIVE_MODE,
)
PAUSED = Gauge(
    "headrace_account_paused_seconds",
    "How long an account is still to be left alone",
    ["aggregator"],
    multiprocess_mode=LIVE_MODE,
)
# The names of 0.1, exposed as well until 0.3.
OLD_NAMES = {
    "headrace_last_publish_timestamp_seconds": "headrace_last_taken_timestamp_seconds",
    "headrace_crashed_deliveries": "headrace_suspects",
    "headrace_duplicate_samples": "headrace_collapsed_samples",
    "headrace_samples_without_timestamp": "headrace_timeless_values",
}
_shown: dict[Gauge, set[str]] = {}


def show(gauge: Gauge, found: Mapping[str, float]) -> None:
    """Sets a gauge with one label. What it had and has no more becomes 0: no series can be taken out of a file."""
    seen = _shown.setdefault(gauge, set())
    for label in seen | found.keys():
        gauge.labels(label).set(found.get(label, 0))
    seen.update(found)


def count_rows(rows: Mapping[str, int], origin: str) -> None:
    """Counts what was changed, by kind; after its commit."""
    for kind, count in rows.items():
        if count:
            ROWS.labels(kind, origin).inc(count)


def status_class(status: int) -> str:
    """2xx, 4xx ...; 429 by itself, because it is about rates; none: nothing came back."""
    return "429" if status == 429 else f"{status // 100}xx" if status >= 100 else "none"


def exposition() -> bytes:
    """Everything counted, in Prometheus' text format."""
    return generate_latest(_registry())


def serve(host: str, port: int) -> None:
    """Shows it at a port of its own, from a thread. A worker must not end because that cannot be."""
    try:
        start_http_server(port, host, _registry())
    except OSError as error:
        log.warning("HEADRACE_METRICS_PORT: %d on %s cannot be used: %s", port, host, error.strerror)


def counts(text: str, name: str, label: str) -> dict[str, int]:
    """A counter of what an endpoint exposes, added up by one of its labels."""
    found: Counted[str] = Counted()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name:
                found[sample.labels[label]] += int(sample.value)
    return dict(found)


class _Machine(Collector):
    """All processes that count into the folder; those that have died are forgotten first, where that matters."""

    def collect(self) -> Iterable[Metric]:
        folder = Path(process_environment()[METRICS_FOLDER])
        for file in folder.glob("gauge_live*.db"):
            pid = int(file.stem.rpartition("_")[2])
            if not process_alive(pid):
                multiprocess.mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]
        found: Iterable[Metric] = multiprocess.MultiProcessCollector(None, str(folder)).collect()  # type: ignore[no-untyped-call]
        return found


class _WithOldNames(CollectorRegistry):
    """Exposes each renamed metric under its old name, too."""

    def collect(self) -> Iterable[Metric]:
        for family in super().collect():
            yield family
            if old := OLD_NAMES.get(family.name):
                copy = Metric(old, family.documentation, family.type)
                copy.samples = [one._replace(name=one.name.replace(family.name, old)) for one in family.samples]
                yield copy


def _registry() -> CollectorRegistry:
    registry = _WithOldNames()
    registry.register(REGISTRY if values.ValueClass is values.MutexValue else _Machine())
    return registry
