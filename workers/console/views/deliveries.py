"""Deliveries: search, and one delivery with its way from receipt to rows."""

from datetime import datetime
from typing import Any

from flask import Blueprint, render_template, url_for
from sqlalchemy import Connection

from app.errors import NotFound, Unprocessable
from workers.console import formats, ledger, people
from workers.console.context import console, record_look
from workers.console.deliveries import contents_of, open_delivery
from workers.console.ledger import Key, Search
from workers.store import user_lookup
from workers.store.engine import transaction

pages = Blueprint("deliveries", __name__)
SEARCHED = ("id", "user", "type", "outcome", "since", "until")


@pages.get("/deliveries")
def search() -> str:
    asked = {name: formats.text(name) for name in SEARCHED}
    with transaction(console().reader) as connection:
        users = _users(connection, asked["user"])
        found = ledger.find(connection, _search(asked, people.with_former(connection, users)))
    record_look("deliveries", [*users, *(row["user_id"] for row in found.rows)])
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


def _search(asked: dict[str, str], users: tuple[str, ...]) -> Search:
    if asked["outcome"] and asked["outcome"] not in ledger.OUTCOMES:
        raise Unprocessable("the outcome is unknown")
    return Search(
        id=asked["id"],
        users=users,
        event_type=asked["type"],
        outcome=asked["outcome"],
        since=formats.instant("since", asked["since"]),
        until=formats.instant("until", asked["until"]),
        before=_key(),
    )


def _key() -> Key | None:
    at: datetime | None = formats.instant("before", formats.text("before"))
    return Key(at, formats.text("before_aggregator"), formats.text("before_id")) if at else None


def _parameters(key: Key) -> dict[str, Any]:
    return {"before": key.received_at.isoformat(), "before_aggregator": key.aggregator, "before_id": key.message_id}


@pages.get("/delivery")
def page() -> str:
    aggregator, message_id = formats.text("aggregator"), formats.text("id")
    with transaction(console().reader) as connection:
        found = ledger.find(connection, Search(id=message_id)).rows if message_id else []
        rows = [one for one in found if one["aggregator"] == aggregator]
        if not rows:
            raise NotFound(f"no delivery {message_id} of {aggregator or 'this aggregator'}")
        kept = open_delivery(connection, aggregator, message_id, rows[0]["received_at"])
        contents = contents_of(connection, console().settings, kept, rows[0])
    users = {rows[0]["user_id"], *(one.user_id for one in contents.shown)}
    record_look("delivery", users - {None} or ["unknown"], delivery=message_id)
    return render_template("delivery.html", one=rows[0], kept=kept, contents=contents)
