"""A load through the whole pipeline: sends events, waits for their rows, and measures rates, response times and CPU."""

import time
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text

from app.broker.lanes import APPLY
from tests.bench.load import run
from tests.bench.processes import Cpu
from tests.bench.results import SAMPLES_PER_EVENT, PipelineRun, times
from tests.bench.stack import Stack
from tests.support import START

USERS = 200
STALL_TIMEOUT_SECONDS = 60
POLL_SECONDS = 0.1
MAX_EVENTS_PER_SECOND = {"workouts": 12_000, "heartrate": 200}  # events prepared per second of load
# Counts ledger rows, one per event: counting samples repeatedly would itself be a considerable load.
SETTLED = text("SELECT count(*) FROM headrace.deliveries WHERE received_at >= :began AND user_id = ANY(:users)")
ROWS = {
    "workouts": text("SELECT count(*) FROM health.workouts WHERE user_id = ANY(:users)"),
    "heartrate": text("SELECT count(*) FROM health.heartrate WHERE user_id = ANY(:users) AND ts >= :since"),
}

# Metrics of which the differences give the sizes of messages and batches.
PUBLISHED, MESSAGES = "headrace_message_deliveries_sum", "headrace_message_deliveries_count"
APPLIED, BATCHES = "headrace_outcomes_total", "headrace_task_seconds_count"


def people(count: int = USERS) -> list[str]:
    """New user ids."""
    return [str(uuid.uuid4()) for _ in range(count)]


def run_pipeline(
    stack: Stack,
    kind: str,
    *,
    connections: int,
    seconds: float,
    rate: float | None = None,
    users: Sequence[str] = (),
    first: int = 0,
) -> PipelineRun:
    """Sends events in a closed loop, or at a `rate`, and waits for their rows.

    Events are numbered from `first`: the same numbers for the same users would repeat samples.
    """
    users, snapshots = users or people(), []
    before = _metrics(stack)
    limit = int(seconds * (rate or MAX_EVENTS_PER_SECOND[kind]))
    load = run(
        stack.url,
        stack.secret,
        kind,
        users,
        connections=connections,
        seconds=seconds,
        numbers=range(first, first + limit),
        rate=rate,
        on_go=lambda: snapshots.append(Cpu(stack)),
    )
    settled_at = _settled(stack, load.began, users, load.accepted)
    spent = snapshots[0].by_stage(load.cpu_seconds)
    per_message, per_batch = batch_sizes(before, _metrics(stack))
    stored = _stored(stack, kind, users, first)
    return PipelineRun(
        kind,
        connections,
        load.accepted,
        accepted=load.accepted / load.seconds,
        committed=stored / (settled_at - load.began),
        missing=round(load.accepted - stored),
        refused=load.statuses.total() - load.accepted,
        answer=times(load.seconds_each),
        cpu_us={stage: used / max(load.accepted, 1) * 1e6 for stage, used in spent.items()},
        per_message=per_message,
        per_batch=per_batch,
    )


def _metrics(stack: Stack) -> dict[str, float]:
    with urlopen(stack.metrics_url, timeout=30) as response:
        return totals(response.read().decode())


def totals(exposition: str) -> dict[str, float]:
    """The sum of each sample over its labels. Of tasks, only the one that applies deliveries counts."""
    found: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            if sample.labels.get("task", APPLY) == APPLY:
                found[sample.name] += sample.value
    return dict(found)


def batch_sizes(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[float, float]:
    """Deliveries per published message and per applied batch, between two readings of `totals`."""

    def grown(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    return grown(PUBLISHED) / max(grown(MESSAGES), 1), grown(APPLIED) / max(grown(BATCHES), 1)


def _settled(stack: Stack, began: float, users: Sequence[str], wanted: int) -> float:
    """The time at which the ledger had `wanted` events, or after a stall, at which the last one was added."""
    last, changed = -1, time.time()
    parameters = {"users": list(users), "began": datetime.fromtimestamp(began, UTC) - timedelta(seconds=1)}
    while True:
        with stack.engine.connect() as connection:
            count = connection.scalar(SETTLED, parameters) or 0
        now = time.time()
        if count != last:
            last, changed = count, now
        if count >= wanted or now > changed + STALL_TIMEOUT_SECONDS:
            return changed
        time.sleep(POLL_SECONDS)


def _stored(stack: Stack, kind: str, users: Sequence[str], first: int) -> float:
    """The number of events with rows in the views."""
    each = SAMPLES_PER_EVENT if kind == "heartrate" else 1
    since = START + timedelta(seconds=first * SAMPLES_PER_EVENT)
    parameters = {"users": list(users)} | ({"since": since} if kind == "heartrate" else {})
    with stack.engine.connect() as connection:
        return (connection.scalar(ROWS[kind], parameters) or 0) / each
