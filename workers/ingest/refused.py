"""Refused items of deliveries and pages, sealed as dead letters."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from app.delivery import Delivery
from app.sealing import Sealer
from workers.actions import Refused
from workers.store.dead_letters import HISTORY, RefusedItem, counter

MAX_ITEMS = 100  # per delivery or page; one more dead letter counts all others


def count(refused: Sequence[Refused]) -> int:
    """The number of values that were refused."""
    return sum(one.items for one in refused)


def sentence(refused: Sequence[Refused]) -> list[str]:
    """The ledger's remark on refused items: their number and the first reason."""
    return [f"{count(refused)} refused, first: {refused[0].reason}"] if refused else []


def dead_letters_of(
    refused: Sequence[Refused],
    delivery: Delivery,
    event_type: str,
    user_id: str | None,
    sealer: Sealer,
    *,
    backfill_id: int | None = None,
) -> list[RefusedItem]:
    """The dead letters of refused items: events with one item each, under the id and clock of `delivery`.

    The items beyond MAX_ITEMS are counted by one without content. To apply them, the delivery or, for pages, the window
    of the backfill has to be read again.
    """
    found: dict[str, Refused] = {}
    for one in refused:
        if one.event:
            known = found.get(digest := _digest(one.event))
            found[digest] = replace(known, items=known.items + one.items) if known else one

    def letter(item: str, one: Refused) -> RefusedItem:
        return RefusedItem(delivery.with_body(one.event, sealer), one.reason, event_type, user_id, item, one.items)

    names = list(found)
    letters = [letter(name, found[name]) for name in names[:MAX_ITEMS]]
    if others := names[MAX_ITEMS:]:
        again = "applies the delivery again" if backfill_id is None else "fetches the history again"
        reason = f"{found[others[0]].reason} (counted only: headrace dead replay {again})"
        total = Refused(reason, b"", count([found[name] for name in others]))
        letters.append(letter(counter(_digest("".join(others).encode()), backfill_id), total))
    return letters


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def of_page(aggregator: str, asked_at: datetime) -> Delivery:
    """The delivery under whose id the refused items of fetched pages are stored, with the clock of the page.

    Its id is the same for all pages, so an item that is fetched again adds no second dead letter.
    """
    return Delivery(aggregator, HISTORY, asked_at.timestamp(), b"")
