"""The cost of an event as the number of stored samples grows."""

from collections.abc import Sequence

import psycopg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sqlalchemy import Engine

from tests.bench.live import warm
from tests.bench.passage import MAX_EVENTS_PER_SECOND, USERS, people, run_pipeline
from tests.bench.results import SAMPLES_PER_EVENT, GrowthStep, Plan
from tests.bench.stack import Stack, running_stack
from tests.support import START
from workers.store.series import SeriesNumbers

STEPS = (0, 1_000_000, 10_000_000, 50_000_000)
BATCH_ROWS = 500_000  # rows per INSERT statement
# Like history: a sample every five minutes, from START backwards, so that years of partitions are filled. Rows are
# ordered by series, as backfills write them; the measured events then continue each of these series.
FILL = """
INSERT INTO headrace.samples (ts, value, version, stored_at, series_id, timezone_offset, origin, unit)
SELECT %(start)s - n * interval '5 minutes', 60 + n %% 90, %(start)s, now(), id, 3600, 'backfill', 'bpm'
FROM headrace.series CROSS JOIN generate_series(%(first)s::int, %(last)s::int) AS n ORDER BY id, n DESC"""


def measure(plan: Plan, console: Console) -> list[GrowthStep]:
    """Runs the same load on one stack before each fill and after the last one."""
    steps = [rows for rows in STEPS if rows < plan.rows] + [plan.rows]
    with running_stack(plan.workers) as stack:
        warm(stack)
        users = people()
        _register(stack.engine, users)
        found: list[GrowthStep] = []
        filled, sent = 0, 0
        for step in steps:
            filled = _fill(stack, filled, max(step - sent * SAMPLES_PER_EVENT, filled), console)
            found.append(_measured(stack, plan, users, filled + sent * SAMPLES_PER_EVENT, len(found)))
            sent += found[-1].samples.events
        return found


def _measured(stack: Stack, plan: Plan, users: Sequence[str], rows: int, steps_before: int) -> GrowthStep:
    """One step. The samples load is half as long, because it would otherwise exceed the fill of the first steps."""
    seconds = plan.seconds / 2
    first = steps_before * int(seconds * MAX_EVENTS_PER_SECOND["heartrate"])
    workouts = run_pipeline(stack, "workouts", connections=32, seconds=plan.seconds)
    samples = run_pipeline(stack, "heartrate", connections=32, seconds=seconds, users=users, first=first)
    return GrowthStep(rows, workouts, samples)


def _register(engine: Engine, users: Sequence[str]) -> None:
    """Registers the series of the events."""
    SeriesNumbers(engine).of("junction", ((user, "heartrate", "garmin", "watch", "") for user in users))


def _fill(stack: Stack, present: int, wanted: int, console: Console) -> int:
    """Inserts about `wanted` - `present` samples directly into the table, then runs VACUUM and CHECKPOINT."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        psycopg.connect(stack.database_url, autocommit=True) as connection,
        Progress(*columns, console=console, transient=True) as progress,
    ):
        task = progress.add_task(f"filling up to {wanted:,} samples", total=wanted, completed=present)
        while each := min(BATCH_ROWS, wanted - present) // USERS:
            first = present // USERS + 1  # the events contain the sample of START itself
            connection.execute(FILL, {"start": START, "first": first, "last": first + each - 1})
            present += each * USERS
            progress.update(task, completed=present)
        progress.update(task, description="VACUUM and CHECKPOINT")
        connection.execute("VACUUM (ANALYZE) headrace.samples")
        connection.execute("CHECKPOINT")
    return present
