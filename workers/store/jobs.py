"""What is done from time to time: when it is due, how far it has come, and what the reconciliation found."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Engine, text

from workers.store.engine import transaction

SWEPT = "sweep"  # the name under which the sweep says that beat and the maintenance worker are alive
LEASE = "interval '60 seconds'"  # longer than a step
# The first time is a whole period after the installation, when there is something to compare.
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
       done_at = CASE WHEN CAST(:position AS jsonb) IS NULL THEN now() ELSE done_at END
WHERE name = :name""")
TOUCH = text("""
INSERT INTO headrace.jobs (name, due_at, done_at) VALUES (:name, now(), now())
ON CONFLICT (name) DO UPDATE SET done_at = now()""")


@dataclass(frozen=True)
class Job:
    """A chore that this process holds, and what was put down when it was last interrupted."""

    name: str
    position: bytes | None
    done_at: datetime | None  # the last time it came to its end


def ensure_job(engine: Engine, name: str, period: float) -> bool:
    """Makes a chore known, and says whether it is due and nobody is at it."""
    with transaction(engine) as connection:
        connection.execute(ENSURE, {"name": name, "seconds": period})
        return connection.execute(DUE, {"name": name}).first() is not None


def claim(engine: Engine, name: str) -> Job | None:
    """Takes a chore that is due; None if it is not, or somebody is at it."""
    with transaction(engine) as connection:
        row = connection.execute(CLAIM, {"name": name}).first()
        return Job(name, row[0].encode() if row[0] else None, row.done_at) if row else None


def save(engine: Engine, name: str, position: Any, seconds: float, *, held: bool = False) -> None:
    """Writes down how far it has come, and when to go on; gives it back unless it is `held`."""
    values = {"name": name, "position": position and msgspec.json.encode(position).decode()}
    with transaction(engine) as connection:
        connection.execute(SAVE, values | {"seconds": seconds, "held": held})


def touch(engine: Engine, name: str) -> None:
    """Writes down that it has been done just now, for whoever wants to know whether anybody still does it."""
    with transaction(engine) as connection:
        connection.execute(TOUCH, {"name": name})
