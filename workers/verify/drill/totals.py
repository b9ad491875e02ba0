"""The account: what was accepted, held against what is found."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from workers.simulator.events import Event
from workers.store.ledger import Outcome
from workers.verify.drill.load import is_usable
from workers.verify.expected import NewestVersions, RowKey

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(frozen=True)
class Totals:
    """accepted = applied + duplicate + stale + ignored + dead + pending, and what is lost or doubled."""

    accepted: int  # distinct delivery ids that were answered 202
    outcomes: dict[str, int]  # of those, by the ledger
    pending: list[str]  # of those, which have no outcome
    nowhere: list[str]  # and of these, which are not in the broker either; or dead, without a dead letter
    twice: list[str]  # ids with a second row in the ledger
    wrongly_dead: list[str]  # dead letters of events that are well
    expected: int  # records and samples in what was accepted and in what the provider has
    missing: list[RowKey] = field(repr=False)
    outdated: list[RowKey] = field(repr=False)
    surplus: list[RowKey] = field(repr=False)  # rows that nothing explains, a second one of the same key among them

    @property
    def lost(self) -> int:
        """Deliveries that are nowhere, and rows that are not there or not in their newest version."""
        return len(self.nowhere) + len(self.missing) + len(self.outdated)

    @property
    def doubled(self) -> int:
        """Deliveries that are in the ledger twice, and rows that should not be there."""
        return len(self.twice) + len(self.surplus)

    @property
    def is_exact(self) -> bool:
        """Whether every accepted delivery has one outcome, or is pending."""
        return self.accepted == sum(self.outcomes.values()) + len(self.pending)

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong."""
        return self.is_exact and not (self.lost or self.doubled or self.pending or self.wrongly_dead)


def reconcile_totals(
    accepted: Mapping[str, Event],
    *,
    ledger: Iterable[tuple[str, str]],
    dead_letters: Collection[str],
    queued: Collection[str] | None,
    newest: NewestVersions,
    rows: Iterable[tuple[RowKey, Any]],
    explained: Collection[RowKey] = (),
) -> Totals:
    """Holds what was accepted against the ledger, and what the views must hold against what they do.

    `queued` are the ids in the broker, or None if that cannot be said. `explained` are keys of events that were sent
    and not answered: they may be there.
    """
    entries = [(name, outcome) for name, outcome in ledger if name in accepted]
    times = Counter(name for name, _ in entries)
    dead = {name for name, outcome in entries if outcome == "dead"}
    pending = sorted(accepted.keys() - times.keys())
    found, outdated, surplus = set[RowKey](), [], []
    for key, content in rows:
        if key in found or (key not in newest and key not in explained):
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
        wrongly_dead=sorted(name for name in dead if is_usable(accepted[name])),
        expected=len(newest),
        missing=[key for key in newest if key not in found],
        outdated=outdated,
        surplus=surplus,
    )
