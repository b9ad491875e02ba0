"""Deliveries that PostgreSQL does not execute: faults by trigger, and the tries of a message without a broker."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sqlalchemy import Engine, text

from app.delivery import Delivery, pack
from app.errors import RetryAlone
from tests.support import delivery, workout
from workers.ingest.apply import Applier
from workers.ingest.outcomes import failures_after

BAD = "u-bad"  # the user whose rows make the fault
RAISE = "RAISE EXCEPTION 'a secret value' USING ERRCODE = '{}'"
SLEEP = "PERFORM pg_sleep(60)"


@contextmanager
def fault(
    engine: Engine, statement: str, when: str = f"NEW.user_id = '{BAD}'", table: str = "workouts"
) -> Iterator[None]:
    """Runs the PL/pgSQL statement whenever such a row of the table is written, until the block ends."""
    create = f"""
        CREATE FUNCTION headrace.fault() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN IF {when} THEN {statement}; END IF; RETURN NEW; END $$;
        CREATE TRIGGER fault BEFORE INSERT OR UPDATE ON headrace.{table}
            FOR EACH ROW EXECUTE FUNCTION headrace.fault()"""
    with engine.begin() as connection:
        connection.execute(text(create))
    try:
        yield
    finally:
        with engine.begin() as connection:
            connection.execute(text("DROP FUNCTION headrace.fault() CASCADE"))


def eleven() -> list[Delivery]:
    """Ten good deliveries, and one of the user BAD in the middle."""
    good = [delivery(workout(f"u{n}")) for n in range(10)]
    return [*good[:5], delivery(workout(BAD)), *good[5:]]


def run_tries(applier: Applier, deliveries: Sequence[Delivery], limit: int = 100) -> list[int]:
    """Applies a message until each delivery has an outcome, as workers do. Returns the size of each tried message."""
    queue, sizes = deque([(list(deliveries), 0)]), list[int]()
    while queue:
        message, failures = queue.popleft()
        sizes.append(len(message))
        assert len(sizes) <= limit, "too many tries"
        try:
            applied = applier.apply(pack(message), failures=failures)
        except RetryAlone as error:
            queue.append((message, failures_after(failures, error)))
        else:
            queue += [([one.delivery], one.failures) for one in applied.unsettled]
    return sizes
