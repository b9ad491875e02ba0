"""The check behind the demo and the drill: accepted deliveries and the ledger, expected and stored rows."""

import contextlib
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sqlalchemy import Engine, text

from app.errors import TryLater
from workers.local.patience import Patience
from workers.store.engine import transaction
from workers.store.ledger import Outcome
from workers.verify.expected import NewestVersions, RowKey, stored, wanted

Verdict = Literal["proven", "unfinished", "different"]
EXIT_STATUS: dict[Verdict, int] = {"proven": 0, "different": 1, "unfinished": 5}
IDLE_SECONDS, MAX_SECONDS = 90.0, 600.0  # of waiting: without progress, and in total
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
SETTLED = text("SELECT message_id, outcome::text FROM health.deliveries")
DEAD_LETTERS = text("SELECT message_id FROM headrace.dead_letters")


@dataclass(frozen=True)
class Totals:
    """accepted = applied + duplicate + stale + ignored + dead + pending; and lost or doubled deliveries and rows."""

    accepted: int  # distinct delivery ids with a 202
    outcomes: dict[str, int]  # of these, by the ledger
    pending: list[str]  # accepted deliveries without an outcome
    nowhere: list[str]  # pending deliveries that are not in the broker, and dead ones without a dead letter
    twice: list[str]  # ids with a second row in the ledger
    wrongly_dead: list[str]  # usable deliveries with the outcome dead
    expected: int  # distinct records and samples in the accepted events and at the provider
    missing: list[RowKey] = field(repr=False)
    outdated: list[RowKey] = field(repr=False)  # rows without the content of the newest version
    surplus: list[RowKey] = field(repr=False)  # unexpected rows, and second rows with the same key

    @property
    def lost(self) -> int:
        """The number of deliveries that are nowhere, and of missing and outdated rows."""
        return len(self.nowhere) + len(self.missing) + len(self.outdated)

    @property
    def doubled(self) -> int:
        """The number of deliveries that are twice in the ledger, and of surplus rows."""
        return len(self.twice) + len(self.surplus)

    @property
    def is_exact(self) -> bool:
        """Whether every accepted delivery has one outcome, or is pending."""
        return self.accepted == sum(self.outcomes.values()) + len(self.pending)

    @property
    def holds(self) -> bool:
        """Whether there is no error of any kind."""
        return self.is_exact and not (self.lost or self.doubled or self.pending or self.wrongly_dead)

    def verdict(self, *, finished: bool) -> Verdict:
        """The result of the comparison. `finished` is whether all load was accepted and all backfills have ended.

        Before that, rows may be missing, outdated, or not replaced yet, which more time can repair.
        """
        if self.holds and finished:
            return "proven"
        is_certain = self.nowhere or self.twice or self.wrongly_dead or not self.is_exact
        return "different" if is_certain or (finished and not self.pending) else "unfinished"


def reconcile_totals(
    accepted: Collection[str],
    *,
    ledger: Iterable[tuple[str, str]],
    dead_letters: Collection[str],
    queued: Collection[str] | None,
    newest: NewestVersions,
    rows: Iterable[tuple[RowKey, Any]],
    optional: Collection[RowKey] = (),
    unusable: Collection[str] = (),
) -> Totals:
    """Compares accepted deliveries with the ledger, and the expected rows (`newest`) with those in the views.

    `queued` are the ids in the broker, or None if the broker cannot be inspected. `optional` are the keys of events
    that were sent without a response: their rows may be stored. `unusable` deliveries must become dead letters.
    """
    entries = [(name, outcome) for name, outcome in ledger if name in accepted]
    times = Counter(name for name, _ in entries)
    dead = {name for name, outcome in entries if outcome == "dead"}
    pending = sorted(set(accepted) - times.keys())
    found, outdated, surplus = set[RowKey](), [], []
    for key, content in rows:
        if key in found or (key not in newest and key not in optional):
            surplus.append(key)
        elif key in newest and content not in newest[key][1]:
            outdated.append(key)
        found.add(key)
    return Totals(
        accepted=len(accepted),
        outcomes={each: sum(outcome == each for _, outcome in entries) for each in OUTCOMES},
        pending=pending,
        nowhere=[one for one in pending if queued is not None and one not in queued] + sorted(dead - set(dead_letters)),
        twice=[name for name, count in times.items() if count > 1],
        wrongly_dead=sorted(dead - set(unusable)),
        expected=len(newest),
        missing=[key for key in newest if key not in found],
        outdated=outdated,
        surplus=surplus,
    )


def prove(
    engine: Engine, accepted: Mapping[str, Any], truth: Mapping[RowKey, Any], idle: float = IDLE_SECONDS
) -> Totals:
    """Waits until every accepted delivery has an outcome, or `idle` seconds without progress; then the totals.

    All events must be usable. `truth` is the final state of the provider, see `wanted`. Raises TryLater if the database
    cannot be read at the end.
    """
    patience, left = Patience(idle, MAX_SECONDS), len(accepted)
    while left and not patience.ends(left):
        with contextlib.suppress(TryLater), transaction(engine) as connection:
            left = len(accepted.keys() - {row.message_id for row in connection.execute(SETTLED)})
        time.sleep(0.2)
    with transaction(engine) as connection:
        ledger = [(row.message_id, row.outcome) for row in connection.execute(SETTLED)]
        dead_letters = set(connection.execute(DEAD_LETTERS).scalars())
        newest, rows = wanted(accepted, truth), stored(connection)
        return reconcile_totals(
            accepted, ledger=ledger, dead_letters=dead_letters, queued=None, newest=newest, rows=rows
        )
