"""A load through the whole way: sent, waited for until its rows are there, and what that took."""

import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy import text

from tests.bench.load import run
from tests.bench.processes import Cpu
from tests.bench.results import SAMPLES_AN_EVENT, Passage, times
from tests.bench.stack import Stack
from tests.support import START

USERS = 200
PATIENCE_SECONDS = 60
LOOKS_SECONDS = 0.1
MOST = {"workouts": 8000, "heartrate": 200}  # events that are made ready for a second of load
# The ledger, because it has a row an event: counting samples over and over would be a load of its own.
SETTLED = text("SELECT count(*) FROM headrace.deliveries WHERE received_at >= :began AND user_id = ANY(:users)")
ROWS = {
    "workouts": text("SELECT count(*) FROM health.workouts WHERE user_id = ANY(:users)"),
    "heartrate": text("SELECT count(*) FROM health.heartrate WHERE user_id = ANY(:users) AND ts >= :since"),
}


def people(count: int = USERS) -> list[str]:
    """So many users whom nobody has seen."""
    return [str(uuid.uuid4()) for _ in range(count)]


def through(
    stack: Stack,
    kind: str,
    *,
    connections: int,
    seconds: float,
    rate: float | None = None,
    users: Sequence[str] = (),
    first: int = 0,
) -> Passage:
    """Sends events as fast as they are answered, or at a `rate`, and waits for their rows.

    They are numbered from `first` on. Of the same users, samples of the same numbers would be repetitions.
    """
    users, snapshots = users or people(), []
    limit = int(seconds * (rate or MOST[kind]))
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
    spent = snapshots[0].spent(load.cpu_seconds)
    stored = _stored(stack, kind, users, first)
    return Passage(
        kind,
        connections,
        load.accepted,
        accepted=load.accepted / load.seconds,
        committed=stored / (settled_at - load.began),
        missing=round(load.accepted - stored),
        refused=load.statuses.total() - load.accepted,
        answer=times(load.seconds_each),
        cpu_us={stage: used / max(load.accepted, 1) * 1e6 for stage, used in spent.items()},
    )


def _settled(stack: Stack, began: float, users: Sequence[str], wanted: int) -> float:
    """When the ledger had so many events, or else, after some patience, when the last one came."""
    last, changed = -1, time.time()
    given = {"users": list(users), "began": datetime.fromtimestamp(began, UTC) - timedelta(seconds=1)}
    while True:
        with stack.engine.connect() as connection:
            count = connection.scalar(SETTLED, given) or 0
        now = time.time()
        if count != last:
            last, changed = count, now
        if count >= wanted or now > changed + PATIENCE_SECONDS:
            return changed
        time.sleep(LOOKS_SECONDS)


def _stored(stack: Stack, kind: str, users: Sequence[str], first: int) -> float:
    """How many events a reader finds the rows of."""
    each = SAMPLES_AN_EVENT if kind == "heartrate" else 1
    since = START + timedelta(seconds=first * SAMPLES_AN_EVENT)
    given = {"users": list(users)} | ({"since": since} if kind == "heartrate" else {})
    with stack.engine.connect() as connection:
        return (connection.scalar(ROWS[kind], given) or 0) / each
