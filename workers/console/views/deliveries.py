"""Deliveries: search, and one delivery with its way from receipt to rows."""

from datetime import datetime
from typing import Any

from flask import Blueprint, render_template, url_for
from sqlalchemy import Connection

from app.errors import NotFound, Unprocessable
from workers.console import formats, ledger
from workers.console.context import console
from workers.console.deliveries import contents_of, open_delivery
from workers.console.ledger import Key, LedgerPage, Search
from workers.store import audit, user_lookup
from workers.store.engine import transaction

pages = Blueprint("deliveries", __name__)
SEARCHED = ("id", "user", "type", "outcome", "since", "until")


@pages.get("/deliveries")
def search() -> str:
    asked = {name: formats.text(name) for name in SEARCHED}
    with transaction(console().reader) as connection:
        users = _users(connection, asked["user"])
        found = _find(connection, asked, users)
    for user in users:
        audit.record(console().writer, "console deliveries", user, {"deliveries": len(found.rows)})
    more: dict[str, Any] = {name: value for name, value in asked.items() if value}
    following = url_for("deliveries.search", **more, **_parameters(found.next)) if found.next else ""
    return render_template("deliveries.html", asked=asked, found=found, following=following, outcomes=ledger.OUTCOMES)


def _users(connection: Connection, name: str) -> tuple[str, ...]:
    """The user_ids of a name. Raises NotFound."""
    if not name:
        return ()
    if not (found := user_lookup.find(connection, name)):
        raise NotFound(f"unknown user {name}")
    return tuple(one.user_id for one in found)


def _find(connection: Connection, asked: dict[str, str], users: tuple[str, ...]) -> LedgerPage:
    if asked["id"]:
        return LedgerPage(ledger.by_id(connection, asked["id"]))
    if asked["outcome"] and asked["outcome"] not in ledger.OUTCOMES:
        raise Unprocessable("the outcome is unknown")
    wanted = Search(
        users=users,
        event_type=asked["type"],
        outcome=asked["outcome"],
        since=formats.instant("since", asked["since"]),
        until=formats.instant("until", asked["until"]),
        before=_key(),
    )
    return ledger.find(connection, wanted)


def _key() -> Key | None:
    at: datetime | None = formats.instant("before", formats.text("before"))
    return Key(at, formats.text("before_aggregator"), formats.text("before_id")) if at else None


def _parameters(key: Key) -> dict[str, Any]:
    return {"before": key.received_at.isoformat(), "before_aggregator": key.aggregator, "before_id": key.message_id}


@pages.get("/delivery")
def page() -> str:
    aggregator, message_id = formats.text("aggregator"), formats.text("id")
    with transaction(console().reader) as connection:
        rows = [one for one in ledger.by_id(connection, message_id) if one["aggregator"] == aggregator]
        if not rows:
            raise NotFound(f"no delivery {message_id} of {aggregator or 'this aggregator'}")
        kept = open_delivery(connection, aggregator, message_id, rows[0]["received_at"])
        contents = contents_of(connection, console().settings, kept, rows[0])
    audit.record(console().writer, "console delivery", rows[0]["user_id"] or "unknown", {"delivery": message_id})
    return render_template("delivery.html", one=rows[0], kept=kept, contents=contents)
