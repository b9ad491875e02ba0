"""Gaps that the reconciliation found, as rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sqlalchemy import Connection, text

from workers.store.coverage import ResourceKey

Responsible = Literal["ours", "aggregator", "provider"]
Window = tuple[datetime, datetime]


@dataclass(frozen=True)
class Gap:
    """Something that Junction has or should have, and we have not.

    ours        we never fetched it, or lost it: the windows are to be fetched
    aggregator  Junction has not got it yet, or counts what it does not give
    provider    the provider did not give it to Junction
    """

    key: ResourceKey
    whose: Responsible
    reason: str
    windows: tuple[Window, ...] = ()
    is_pulling: bool = False


KEEP = text("""
INSERT INTO headrace.gaps AS stored
    (user_id, provider, resource, part, whose, reason, is_pulling, window_start, window_end)
VALUES (:user_id, :provider, :resource, :part, :whose, :reason, :is_pulling, :window_start, :window_end)
ON CONFLICT (user_id, provider, resource, part) DO UPDATE SET whose = excluded.whose, reason = excluded.reason,
    is_pulling = excluded.is_pulling, window_start = excluded.window_start, window_end = excluded.window_end,
    since = CASE WHEN stored.whose = excluded.whose THEN stored.since ELSE now() END, seen_at = now()""")
FORGET = text("DELETE FROM headrace.gaps WHERE user_id = ANY(:users) AND part = :part AND seen_at < now()")
PULLING = text("SELECT user_id, provider, resource FROM headrace.gaps WHERE user_id = ANY(:users) AND is_pulling")


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


def still_pulling(connection: Connection, users: Sequence[str]) -> set[ResourceKey]:
    """What the aggregator had not yet pulled when it was last asked."""
    return {ResourceKey(*row) for row in connection.execute(PULLING, {"users": list(users)})}
