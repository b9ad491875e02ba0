"""Refused items of deliveries and pages, sealed as dead letters."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from itertools import islice

from app.delivery import Delivery
from app.sealing import Sealer
from workers.actions import Refused
from workers.store.dead_letters import HISTORY, RefusedItem

MAX_ITEMS = 100  # per delivery or page; the last dead letter stands for all others


def count(refused: Sequence[Refused]) -> int:
    """The number of values that were refused."""
    return sum(one.items for one in refused)


def sentence(refused: Sequence[Refused]) -> list[str]:
    """What the ledger says about refused items: their number and the first reason."""
    return [f"{count(refused)} refused, first: {refused[0].reason}"] if refused else []


def dead_letters_of(
    refused: Sequence[Refused], delivery: Delivery, event_type: str, user_id: str | None, sealer: Sealer
) -> list[RefusedItem]:
    """The dead letters of refused items: events with one item each, under the id and clock of `delivery`."""
    digests = {hashlib.sha256(one.event).hexdigest()[:16]: one for one in refused if one.event}
    letters = [
        RefusedItem(
            delivery=delivery.with_body(one.event, sealer),
            reason=one.reason,
            event_type=event_type,
            user_id=user_id,
            item=digest,
            items=one.items,
        )
        for digest, one in islice(digests.items(), MAX_ITEMS)
    ]
    if others := count(list(digests.values())[MAX_ITEMS:]):
        letters[-1] = replace(letters[-1], items=letters[-1].items + others)
    return letters


def of_page(aggregator: str, asked_at: datetime) -> Delivery:
    """The delivery under whose id the refused items of fetched pages are stored, with the clock of the page.

    Its id is the same for all pages, so an item that is fetched again adds no second dead letter.
    """
    return Delivery(aggregator, HISTORY, asked_at.timestamp(), b"")
