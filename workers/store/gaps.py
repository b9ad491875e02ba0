"""The table of gaps that the reconciliation found."""

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
    """Data that the aggregator has or should have, and that is not stored. `whose` is the responsible party.

    ours        Headrace never fetched it, or lost it: fetch the windows
    aggregator  the aggregator has not pulled it yet, or counts data that it does not return
    provider    the provider did not send it to the aggregator
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
FORGET_PART = text("DELETE FROM headrace.gaps WHERE part = :part")
PULLING = text("SELECT user_id, provider, resource FROM headrace.gaps WHERE user_id = ANY(:users) AND is_pulling")


def keep_gaps(connection: Connection, part: str, users: Sequence[str], gaps: Iterable[Gap]) -> None:
    """Replaces these users' gaps that one part of the reconciliation found."""
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


def forget_gaps(connection: Connection, part: str) -> None:
    """Removes all gaps that one part of the reconciliation found: for a part that does not compare every user."""
    connection.execute(FORGET_PART, {"part": part})


def still_pulling(connection: Connection, users: Sequence[str]) -> set[ResourceKey]:
    """The resources that the aggregator was still pulling at the last check."""
    return {ResourceKey(**row) for row in connection.execute(PULLING, {"users": list(users)}).mappings()}
