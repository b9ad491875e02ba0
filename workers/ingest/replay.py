"""Applies deliveries again: what was kept of a window, or what was dead. All go through the same guarded upsert."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from sqlalchemy import Engine

from app.delivery import Delivery
from app.errors import Unprocessable
from workers.ingest.apply import UNKNOWN, Applier
from workers.store import archive, backfill_admin, dead_letters
from workers.store.archive import ArchiveWindow
from workers.store.backfill_admin import OPEN, Filter
from workers.store.ledger import Outcome

Order = Literal["oldest", "newest", "random"]
MAX_BATCH = 200


def replay(
    engine: Engine, applier: Applier, window: ArchiveWindow, order: Order, on_progress: Callable[[int], None]
) -> Counter[Outcome]:
    """Applies what is kept of a window, and says what became of it; `on_progress` is called with how many are done.

    Within an hour in the order that is asked for: any order ends in the same rows. Raises TryLater.
    """
    outcomes: Counter[Outcome] = Counter()
    for hour in archive.read(engine, window):
        for some in _chunked(_ordered(hour, order)):
            outcomes += applier.replay(some).outcomes
            on_progress(outcomes.total())
    return outcomes


def replay_dead_letters(
    engine: Engine, applier: Applier, entries: Iterable[dead_letters.DeadLetter]
) -> Counter[Outcome]:
    """Applies dead letters again, one by one. A refused request to a provider is made again instead."""
    outcomes: Counter[Outcome] = Counter()
    for entry in entries:
        if entry.backfill_id is not None:
            outcomes["applied" if _refetch(engine, entry) else "dead"] += 1
        elif entry.aggregator == UNKNOWN:
            outcomes += _replay_raw_message(engine, applier, entry)
        else:
            applied = applier.replay([dead_letters.delivery(engine, entry)])
            outcomes += applied.outcomes
            for settled in applied.settled:
                if settled.outcome == "dead":
                    dead_letters.update_reason(engine, entry, settled.error)
    return outcomes


def _replay_raw_message(engine: Engine, applier: Applier, entry: dead_letters.DeadLetter) -> Counter[Outcome]:
    try:
        applied = applier.replay_raw_message(dead_letters.delivery(engine, entry))
    except Unprocessable:
        return Counter({"dead": 1})
    dead_letters.mark_resolved(engine, entry)
    return applied.outcomes


def _refetch(engine: Engine, entry: dead_letters.DeadLetter) -> bool:
    """Whether the refused part will be requested; another dead letter of the same backfill may have requested it.

    Its backfill goes on, or it was complete without, and another one is opened.
    """
    number = entry.backfill_id or 0
    backfill_admin.resume(engine, [number])
    goes_on = backfill_admin.listed(engine, Filter(ids=(number,), states=OPEN))
    if not goes_on and not backfill_admin.reopen(engine, number, entry.reference or ""):
        return False
    dead_letters.drop(engine, [entry])
    return True


def _ordered(deliveries: list[Delivery], order: Order) -> list[Delivery]:
    if order == "random":
        random.shuffle(deliveries)
    return deliveries[::-1] if order == "newest" else deliveries


def _chunked(deliveries: list[Delivery]) -> Iterator[list[Delivery]]:
    for start in range(0, len(deliveries), MAX_BATCH):
        yield deliveries[start : start + MAX_BATCH]
