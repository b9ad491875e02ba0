"""What an event costs with more and more samples stored: are the last as cheap as the first?"""

from collections.abc import Sequence

import psycopg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sqlalchemy import Engine

from tests.bench.live import warm
from tests.bench.passage import MOST, USERS, people, through
from tests.bench.results import SAMPLES_AN_EVENT, Grown, Plan
from tests.bench.stack import Stack, running_stack
from tests.support import START
from workers.store.series import SeriesNumbers

STEPS = (0, 1_000_000, 10_000_000, 50_000_000)
AT_ONCE = 500_000  # rows a statement
# As a history is: a sample every five minutes, from START back, so that years of partitions fill. Series by series,
# as backfills write; what is measured then goes on where each of these series ends.
FILL = """
INSERT INTO headrace.samples (ts, value, version, stored_at, series_id, timezone_offset, origin, unit)
SELECT %(start)s - n * interval '5 minutes', 60 + n %% 90, %(start)s, now(), id, 3600, 'backfill', 'bpm'
FROM headrace.series CROSS JOIN generate_series(%(first)s::int, %(last)s::int) AS n ORDER BY id, n DESC"""


def measure(plan: Plan, console: Console) -> list[Grown]:
    """The same load before each filling and after the last, on one stack."""
    steps = [rows for rows in STEPS if rows < plan.rows] + [plan.rows]
    with running_stack(plan.workers) as stack:
        warm(stack)
        users = people()
        _register(stack.engine, users)
        found: list[Grown] = []
        filled, sent = 0, 0
        for step in steps:
            filled = _fill(stack, filled, max(step - sent * SAMPLES_AN_EVENT, filled), console)
            found.append(_measured(stack, plan, users, filled + sent * SAMPLES_AN_EVENT, len(found)))
            sent += found[-1].samples.events
        return found


def _measured(stack: Stack, plan: Plan, users: Sequence[str], rows: int, times_before: int) -> Grown:
    """Half as long for samples, which would else be more than what the first steps fill."""
    seconds = plan.seconds / 2
    first = times_before * int(seconds * MOST["heartrate"])
    workouts = through(stack, "workouts", connections=32, seconds=plan.seconds)
    samples = through(stack, "heartrate", connections=32, seconds=seconds, users=users, first=first)
    return Grown(rows, workouts, samples)


def _register(engine: Engine, users: Sequence[str]) -> None:
    """The series that the events will be of."""
    SeriesNumbers(engine).of((user, "heartrate", "garmin", "watch", "") for user in users)


def _fill(stack: Stack, present: int, wanted: int, console: Console) -> int:
    """Stores samples straight into the table, as many as are wanted but for a few, and lets PostgreSQL settle."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        psycopg.connect(stack.database_url, autocommit=True) as connection,
        Progress(*columns, console=console, transient=True) as progress,
    ):
        task = progress.add_task(f"filling up to {wanted:,} samples", total=wanted, completed=present)
        while each := min(AT_ONCE, wanted - present) // USERS:
            first = present // USERS + 1  # the sample of START itself is one that is sent
            connection.execute(FILL, {"start": START, "first": first, "last": first + each - 1})
            present += each * USERS
            progress.update(task, completed=present)
        progress.update(task, description="VACUUM and CHECKPOINT")
        connection.execute("VACUUM (ANALYZE) headrace.samples")
        connection.execute("CHECKPOINT")
    return present
