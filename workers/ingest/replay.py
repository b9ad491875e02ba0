"""Replay: applies archived deliveries or dead letters again, through the guarded upsert."""

import random
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Literal

from sqlalchemy import Engine

from app.errors import Unprocessable
from workers.ingest.apply import Applier
from workers.ingest.parse import UNKNOWN
from workers.store import archive, backfill_admin, dead_letters
from workers.store.archive import ArchiveWindow
from workers.store.backfill_admin import OPEN, Filter
from workers.store.ledger import Outcome

Order = Literal["oldest", "newest", "random"]
MAX_BATCH = 200
NOT_ARCHIVED = (
    "counted only, and their delivery is not in the archive: fetch its data with headrace backfill start, "
    "then run headrace dead drop ID"
)


def replay(
    engine: Engine, applier: Applier, window: ArchiveWindow, order: Order, on_progress: Callable[[int], None]
) -> Counter[Outcome]:
    """Applies the archived deliveries of a window, and returns their number by outcome. Raises TryLater.

    `order` is the order within each hour; every order ends in the same rows. `on_progress` receives the number applied.
    """
    outcomes: Counter[Outcome] = Counter()
    for hour in archive.read(engine, window):
        if order == "random":
            random.shuffle(hour)
        elif order == "newest":
            hour.reverse()
        for start in range(0, len(hour), MAX_BATCH):
            outcomes += applier.replay(hour[start : start + MAX_BATCH]).outcomes
            on_progress(outcomes.total())
    return outcomes


def replay_dead_letters(
    engine: Engine, applier: Applier, entries: Iterable[dead_letters.DeadLetter]
) -> Counter[Outcome]:
    """Applies dead letters again, one by one. Rejected responses of a fetch are requested again instead.

    Counted items come last, because the deliveries that are applied for them resolve other dead letters too.
    """
    outcomes: Counter[Outcome] = Counter()
    reopened: set[int] = set()  # backfills whose window is requested again, for all of their counted items
    for entry in sorted(entries, key=lambda entry: entry.is_counter):
        if entry.backfill_id is not None:
            outcomes["applied" if _refetch(engine, entry, reopened) else "dead"] += 1
        elif entry.is_counter:
            outcomes["applied" if _apply_delivery_of(engine, applier, entry) else "dead"] += 1
        elif entry.item:
            reason = applier.replay_item(dead_letters.delivery(engine, entry))
            outcomes["dead" if reason else "applied"] += 1
            if reason:
                dead_letters.update_reason(engine, entry, reason)
            else:
                dead_letters.mark_resolved(engine, entry)
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


def _apply_delivery_of(engine: Engine, applier: Applier, entry: dead_letters.DeadLetter) -> bool:
    """Applies the archived delivery of counted items. False if it is not archived, or has too many of them again."""
    delivery = archive.find(engine, entry.aggregator, entry.message_id, entry.received_at)
    if delivery is None:
        dead_letters.update_reason(engine, entry, NOT_ARCHIVED)
        return False
    applier.replay([delivery])
    return not dead_letters.is_counted(engine, entry)


def _refetch(engine: Engine, entry: dead_letters.DeadLetter, reopened: set[int]) -> bool:
    """Resumes the backfill of a rejected response, or opens another one if it was completed without the response.

    False if neither is possible. Another dead letter of the same backfill may have resumed it before. For counted items
    the window is requested again even if the backfill is open, because it has passed their pages.
    """
    number = entry.backfill_id or 0
    if entry.is_counter:
        is_open = number in reopened
    else:
        backfill_admin.resume(engine, [number])
        is_open = bool(backfill_admin.listed(engine, Filter(ids=(number,), states=OPEN)))
    if not is_open and not backfill_admin.reopen(engine, number, entry.reference or ""):
        return False
    if entry.is_counter:
        reopened.add(number)
    dead_letters.drop(engine, [entry])
    return True
