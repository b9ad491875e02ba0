"""Applies deliveries again: what was kept of a window, or what was dead. All go through the same guarded upsert."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from sqlalchemy import Engine

from app.delivery import Delivery
from app.errors import DeadLetter
from workers.apply import UNKNOWN, Applier
from workers.store import dead, history, kept
from workers.store.history import OPEN, Filter
from workers.store.kept import Window
from workers.store.ledger import Outcome

Order = Literal["oldest", "newest", "random"]
MOST_TOGETHER = 200


def replay(
    engine: Engine, applier: Applier, window: Window, order: Order, tell: Callable[[int], None]
) -> Counter[Outcome]:
    """Applies what is kept of a window, and says what became of it; `tell` is called with how many are done.

    Within an hour in the order that is asked for: any order ends in the same rows. Raises TryLater.
    """
    outcomes: Counter[Outcome] = Counter()
    for hour in kept.read(engine, window):
        for some in _together(_ordered(hour, order)):
            outcomes += applier.replay(some).outcomes
            tell(outcomes.total())
    return outcomes


def raise_dead(engine: Engine, applier: Applier, letters: Iterable[dead.Letter]) -> Counter[Outcome]:
    """Applies dead letters again, one by one. A refused request to a provider is made again instead."""
    outcomes: Counter[Outcome] = Counter()
    for letter in letters:
        if letter.backfill_id is not None:
            outcomes["applied" if _asked_again(engine, letter) else "dead"] += 1
        elif letter.aggregator == UNKNOWN:
            outcomes += _raise_foreign(engine, applier, letter)
        else:
            applied = applier.replay([dead.delivery(engine, letter)])
            outcomes += applied.outcomes
            for settled in applied.settled:
                if settled.outcome == "dead":
                    dead.restate(engine, letter, settled.error)
    return outcomes


def _raise_foreign(engine: Engine, applier: Applier, letter: dead.Letter) -> Counter[Outcome]:
    try:
        applied = applier.raise_foreign(dead.delivery(engine, letter))
    except DeadLetter:
        return Counter({"dead": 1})
    dead.mended(engine, letter)
    return applied.outcomes


def _asked_again(engine: Engine, letter: dead.Letter) -> bool:
    """Whether what was refused is going to be asked for; another letter of the same backfill may have seen to that.

    Its backfill goes on, or it was complete without, and another one is opened.
    """
    number = letter.backfill_id or 0
    history.resume(engine, [number])
    goes_on = history.listed(engine, Filter(ids=(number,), states=OPEN))
    if not goes_on and not history.begin_again(engine, number, letter.reference or ""):
        return False
    dead.drop(engine, [letter])
    return True


def _ordered(deliveries: list[Delivery], order: Order) -> list[Delivery]:
    if order == "random":
        random.shuffle(deliveries)
    return deliveries[::-1] if order == "newest" else deliveries


def _together(deliveries: list[Delivery]) -> Iterator[list[Delivery]]:
    for start in range(0, len(deliveries), MOST_TOGETHER):
        yield deliveries[start : start + MOST_TOGETHER]
