"""What is done from time to time: when it is due, how far it has come, and what the reconciliation found."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, text

from workers.gaps import Gap
from workers.store.coverage import Key
from workers.store.engine import transaction

SWEPT = "sweep"  # the name under which the sweep says that beat and the maintenance worker are alive
LEASE = "interval '60 seconds'"  # longer than a step
# The first time is a whole period after the installation, when there is something to compare.
PLAN = text("""
INSERT INTO headrace.chores (name, due_at) VALUES (:name, now() + make_interval(secs => :seconds))
ON CONFLICT (name) DO NOTHING""")
DUE = text("SELECT 1 FROM headrace.chores WHERE name = :name AND due_at <= now() AND lease_until < now()")
CLAIM = text(f"""
UPDATE headrace.chores SET lease_until = now() + {LEASE}
WHERE name = :name AND due_at <= now() AND lease_until < now() RETURNING CAST(position AS text), done_at""")
SAVE = text(f"""
UPDATE headrace.chores SET position = CAST(:position AS jsonb), due_at = now() + make_interval(secs => :seconds),
       lease_until = CASE WHEN :held THEN now() + {LEASE} ELSE '-infinity' END,
       done_at = CASE WHEN CAST(:position AS jsonb) IS NULL THEN now() ELSE done_at END
WHERE name = :name""")
MARK = text("""
INSERT INTO headrace.chores (name, due_at, done_at) VALUES (:name, now(), now())
ON CONFLICT (name) DO UPDATE SET done_at = now()""")
KEEP = text("""
INSERT INTO headrace.gaps AS stored
    (user_id, provider, resource, part, whose, reason, is_pulling, window_start, window_end)
VALUES (:user_id, :provider, :resource, :part, :whose, :reason, :is_pulling, :window_start, :window_end)
ON CONFLICT (user_id, provider, resource, part) DO UPDATE SET whose = excluded.whose, reason = excluded.reason,
    is_pulling = excluded.is_pulling, window_start = excluded.window_start, window_end = excluded.window_end,
    since = CASE WHEN stored.whose = excluded.whose THEN stored.since ELSE now() END, seen_at = now()""")
FORGET = text("DELETE FROM headrace.gaps WHERE user_id = ANY(:users) AND part = :part AND seen_at < now()")
PULLING = text("SELECT user_id, provider, resource FROM headrace.gaps WHERE user_id = ANY(:users) AND is_pulling")


@dataclass(frozen=True)
class Chore:
    """A chore that this process holds, and what was put down when it was last interrupted."""

    name: str
    position: bytes | None
    done_at: datetime | None  # the last time it came to its end


def plan(engine: Engine, name: str, period: float) -> bool:
    """Makes a chore known, and says whether it is due and nobody is at it."""
    with transaction(engine) as connection:
        connection.execute(PLAN, {"name": name, "seconds": period})
        return connection.execute(DUE, {"name": name}).first() is not None


def claim(engine: Engine, name: str) -> Chore | None:
    """Takes a chore that is due; None if it is not, or somebody is at it."""
    with transaction(engine) as connection:
        row = connection.execute(CLAIM, {"name": name}).first()
        return Chore(name, row[0].encode() if row[0] else None, row.done_at) if row else None


def save(engine: Engine, name: str, position: Any, seconds: float, *, held: bool = False) -> None:
    """Writes down how far it has come, and when to go on; gives it back unless it is `held`."""
    values = {"name": name, "position": position and msgspec.json.encode(position).decode()}
    with transaction(engine) as connection:
        connection.execute(SAVE, values | {"seconds": seconds, "held": held})


def mark(engine: Engine, name: str) -> None:
    """Writes down that it has been done just now, for whoever wants to know whether anybody still does it."""
    with transaction(engine) as connection:
        connection.execute(MARK, {"name": name})


def keep_gaps(connection: Connection, part: str, users: Sequence[str], gaps: Iterable[Gap]) -> None:
    """What a part of the reconciliation found of these people now, in place of what it found before."""
    rows = [
        gap.key._asdict()
        | {"part": part, "whose": gap.whose, "reason": gap.reason, "is_pulling": gap.is_pulling}
        | {"window_start": gap.windows[0][0] if gap.windows else None}
        | {"window_end": gap.windows[-1][1] if gap.windows else None}
        for gap in gaps
    ]
    if rows:
        connection.execute(KEEP, rows)
    connection.execute(FORGET, {"users": list(users), "part": part})


def still_pulling(connection: Connection, users: Sequence[str]) -> set[Key]:
    """What the aggregator had not yet pulled when it was last asked."""
    return {Key(*row) for row in connection.execute(PULLING, {"users": list(users)})}
