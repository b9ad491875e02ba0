"""Scheduled jobs: when each is due, which process holds it, and its saved position."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, text

from workers.store.engine import execute, transaction

TERRA_TOKEN = "terra-token"  # noqa: S105 - a row with the state of the token, which has no part of the token
SWEPT = "sweep"  # this job's `done_at` shows that beat and the maintenance worker are alive
LEASE = "interval '60 seconds'"  # longer than a step
# The first run is one period after the installation, when there is data to compare.
ENSURE = text("""
INSERT INTO headrace.jobs (name, due_at) VALUES (:name, now() + make_interval(secs => :seconds))
ON CONFLICT (name) DO NOTHING""")
DUE = text("SELECT 1 FROM headrace.jobs WHERE name = :name AND due_at <= now() AND lease_until < now()")
CLAIM = text(f"""
UPDATE headrace.jobs SET lease_until = now() + {LEASE}
WHERE name = :name AND due_at <= now() AND lease_until < now() RETURNING CAST(position AS text), done_at""")
SAVE = text(f"""
UPDATE headrace.jobs SET position = CAST(:position AS jsonb), due_at = now() + make_interval(secs => :seconds),
       lease_until = CASE WHEN :held THEN now() + {LEASE} ELSE '-infinity' END,
       done_at = CASE WHEN CAST(:position AS jsonb) IS NULL AND :completed THEN now() ELSE done_at END
WHERE name = :name""")
HOLD = text(f"""
UPDATE headrace.jobs SET lease_until = now() + {LEASE} + make_interval(secs => :seconds)
WHERE name = :name AND (lease_until < now() OR :renew) RETURNING done_at""")
RELEASE = text("UPDATE headrace.jobs SET lease_until = '-infinity' WHERE name = :name")
# Values for `headrace status`. No process claims this row.
NOTE = text("""
INSERT INTO headrace.jobs AS stored (name, due_at, position) VALUES (:name, now(), CAST(:values AS jsonb))
ON CONFLICT (name) DO UPDATE SET position = coalesce(stored.position, '{}') || excluded.position""")
NOTED = text("SELECT CAST(position AS text) FROM headrace.jobs WHERE name = :name")
# A job's error is also such a row; `status` shows it until its `until`.
ERRORS = text("""
SELECT left(name, -length(:suffix)) AS name, position ->> 'error' AS error FROM headrace.jobs
WHERE right(name, length(:suffix)) = :suffix AND position ->> 'error' <> ''
  AND CAST(position ->> 'until' AS timestamptz) > now() ORDER BY 1""")
CLEAR_ERROR = text("UPDATE headrace.jobs SET position = NULL WHERE name = :name")
ERROR_SUFFIX = "-error"
TOUCH = text("""
INSERT INTO headrace.jobs (name, due_at, done_at) VALUES (:name, now(), now())
ON CONFLICT (name) DO UPDATE SET done_at = now()""")


@dataclass(frozen=True)
class Job:
    """A job that this process holds."""

    name: str
    position: bytes | None  # JSON, saved when the job was last interrupted
    done_at: datetime | None  # when it was last completed


def ensure_job(engine: Engine, name: str, period: float) -> bool:
    """Creates the job if it is missing. Returns whether it is due and not leased."""
    with transaction(engine) as connection:
        connection.execute(ENSURE, {"name": name, "seconds": period})
        return connection.execute(DUE, {"name": name}).first() is not None


def claim(engine: Engine, name: str) -> Job | None:
    """Leases a job for 60 s; None if it is not due, or leased already."""
    for row in execute(engine, CLAIM, {"name": name}):
        return Job(name, row.position.encode() if row.position else None, row.done_at)
    return None


def save(
    engine: Engine, name: str, position: Any, seconds: float, *, held: bool = False, completed: bool = True
) -> None:
    """Saves the position (None: at the end); due again in `seconds`. Renews the lease if `held`, else ends it.

    A run that ends without having `completed` leaves `done_at` as it was.
    """
    values = {"name": name, "position": position and msgspec.json.encode(position).decode(), "completed": completed}
    execute(engine, SAVE, values | {"seconds": seconds, "held": held})


def hold(engine: Engine, name: str, seconds: float = 0.0, *, renew: bool = False) -> bool:
    """Leases a job, whether or not it is due, for 60 s and `seconds`; False if another process holds it."""
    return bool(execute(engine, HOLD, {"name": name, "seconds": seconds, "renew": renew}))


def release(engine: Engine, name: str) -> None:
    execute(engine, RELEASE, {"name": name})


def note(engine: Engine, name: str, values: Any) -> None:
    """Stores values for `headrace status` under a name that is not a job's. Its other values stay."""
    execute(engine, NOTE, {"name": name, "values": msgspec.json.encode(values).decode()})


def noted(connection: Connection, name: str) -> bytes | None:
    """The values as JSON; None if there are none."""
    found = connection.scalar(NOTED, {"name": name})
    return found.encode() if found else None


def report(engine: Engine, name: str, error: str, seconds: float) -> None:
    """Replaces the error of a job that `headrace status` shows for this time; '' removes it."""
    name += ERROR_SUFFIX
    if error:
        note(engine, name, {"error": error, "until": datetime.now(UTC) + timedelta(seconds=seconds)})
    else:
        execute(engine, CLEAR_ERROR, {"name": name})


def errors(connection: Connection) -> dict[str, str]:
    return {row.name: row.error for row in connection.execute(ERRORS, {"suffix": ERROR_SUFFIX})}


def touch(engine: Engine, name: str) -> None:
    """Records that the job was completed just now."""
    execute(engine, TOUCH, {"name": name})
