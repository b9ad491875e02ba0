"""Deliveries: the search, and the page of one delivery."""

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
    if asked["outcome"] not in ("", *ledger.OUTCOMES):
        raise Unprocessable("the outcome is unknown")
    before = formats.instant("before", formats.text("before"))
    with transaction(console().reader) as connection:
        users = _users(connection, asked["user"])
        wanted = Search(
            id=asked["id"],
            users=people.with_former(connection, users),
            event_type=asked["type"],
            outcome=asked["outcome"],
            since=formats.instant("since", asked["since"]),
            until=formats.instant("until", asked["until"]),
            before=Key(before, formats.text("before_aggregator"), formats.text("before_id")) if before else None,
        )
        found = ledger.find(connection, wanted)
    record_look("deliveries", [*users, *(row["user_id"] for row in found.rows)])
    given: dict[str, Any] = {name: value for name, value in asked.items() if value}
    if found.next:
        given |= found.next._asdict() | {"before": found.next.before.isoformat()}
    following = url_for("deliveries.search", **given) if found.next else ""
    return render_template("deliveries.html", asked=asked, found=found, following=following, outcomes=ledger.OUTCOMES)


def _users(connection: Connection, name: str) -> tuple[str, ...]:
    """The user_ids of a name. Raises NotFound."""
    found = user_lookup.find(connection, name) if name else []
    if name and not found:
        raise NotFound(f"unknown user {name}")
    return tuple(one.user_id for one in found)


@pages.get("/delivery")
def page() -> str:
    aggregator, message_id = formats.text("aggregator"), formats.text("id")
    with transaction(console().reader) as connection:
        found = ledger.find(connection, Search(id=message_id)).rows if message_id else []
        rows = [one for one in found if one["aggregator"] == aggregator]
        if not rows:
            raise NotFound(f"no delivery {message_id} of {aggregator or 'this aggregator'}")
        kept = open_delivery(connection, aggregator, message_id, rows[0]["received_at"])
        contents, total = contents_of(connection, console().settings, kept, rows[0])
    users = {rows[0]["user_id"], *(one.user_id for one in contents)}
    record_look("delivery", users - {None} or ["unknown"], delivery=message_id)
    return render_template("delivery.html", one=rows[0], kept=kept, contents=contents, total=total)
