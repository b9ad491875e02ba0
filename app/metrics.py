"""What the endpoint counts. With PROMETHEUS_MULTIPROC_DIR set, every process of a machine is added up."""

from collections import Counter as Counter_

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, multiprocess, values
from prometheus_client.parser import text_string_to_metric_families

ANSWERS = Counter("headrace_answers_total", "Webhooks answered, by status", ["aggregator", "status"])
REFUSED = Counter("headrace_refused_total", "Webhooks refused, by what was wrong", ["aggregator", "reason"])
ANSWER_SECONDS = Histogram(
    "headrace_answer_seconds",
    "Time from the first byte read to the answer of a webhook",
    ["aggregator"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
OUTCOMES = Counter("headrace_outcomes_total", "Deliveries settled by workers", ["aggregator", "outcome"])
ROWS = Counter("headrace_rows_total", "Rows written, by kind", ["kind"])
COLLAPSED = Counter(
    "headrace_collapsed_samples_total", "Samples that shared their key with a different one of the same delivery", []
)


def exposition() -> bytes:
    """Everything counted, in Prometheus' text format."""
    if values.ValueClass is values.MutexValue:
        return generate_latest()
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def counts(text: str, name: str, label: str) -> dict[str, int]:
    """A counter of what an endpoint exposes, added up by one of its labels."""
    found: Counter_[str] = Counter_()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name:
                found[sample.labels[label]] += int(sample.value)
    return dict(found)
