"""Retries of tasks: their delays, and the message headers that count and explain them."""

import time
from collections.abc import Mapping
from typing import Any, get_args

from app.broker.lanes import APPLY, FAILING_SINCE, FAILURES, LOST, RETRY_REASON
from app.errors import ConnectionLost, RetryCause
from app.observability import metrics
from workers.fetch.backoff import backoff
from workers.ingest.outcomes import retry_reason

MAX_RETRY_SECONDS = 30.0  # a task that waits in the broker counts against its visibility timeout
for _cause in (*get_args(RetryCause), "unavailable", "unexpected"):
    metrics.RETRIES.labels(APPLY, _cause)  # starts at 0: Prometheus' increase() does not count a series' first value


def seconds_before(retry: int) -> float:
    """The delay before retry number `retry`, counted from 0."""
    return backoff(retry, limit=MAX_RETRY_SECONDS)


def count_of(headers: Mapping[str, Any] | None, name: str) -> int:
    """The failed tries of a message that FAILURES or LOST counts. 0 if the header is not a count."""
    found = (headers or {}).get(name)
    return found if isinstance(found, int) and found > 0 else 0


def retry_headers(headers: Mapping[str, Any] | None, failures: int, error: Exception | None) -> dict[str, Any]:
    """The headers of a retried message. The time of its first failure is kept."""
    changed: dict[str, Any] = {FAILURES: failures}
    if isinstance(error, ConnectionLost):
        changed[LOST] = count_of(headers, LOST) + 1
    if error is not None:
        changed[RETRY_REASON] = retry_reason(error)
    return {FAILING_SINCE: time.time(), **(headers or {}), **changed}
