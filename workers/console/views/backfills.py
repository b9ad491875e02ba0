"""Backfills: the list with progress and time left, and one backfill with its windows."""

from flask import Blueprint, render_template
from sqlalchemy import Connection, text

from app.errors import NotFound, Unprocessable
from workers.console import formats
from workers.console.context import console, record_look
from workers.store import backfill_admin, user_lookup
from workers.store.backfill_admin import Filter
from workers.store.engine import transaction

pages = Blueprint("backfills", __name__)
PAGE_ROWS = 50
STATES = ("pending", "running", "paused", "complete", "failed", "cancelled")
PAGE = text("""
SELECT id FROM headrace.backfills
WHERE (CAST(:before AS bigint) IS NULL OR id < :before)
  AND (CAST(:status AS text) IS NULL OR status = :status)
  AND (CAST(:users AS text[]) IS NULL OR user_id = ANY(:users))
ORDER BY id DESC LIMIT :limit""")


@pages.get("/backfills")
def listed() -> str:
    status, user, before = formats.text("status"), formats.text("user"), formats.text("before")
    if status and status not in STATES:
        raise Unprocessable("the status is unknown")
    with transaction(console().reader) as connection:
        users = [one.user_id for one in user_lookup.find(connection, user)] if user else None
        ids = _page(connection, status, users, before)
    shown = ids[:PAGE_ROWS]
    rows = backfill_admin.listed(console().reader, Filter(ids=tuple(shown)), PAGE_ROWS) if shown else []
    record_look("backfills", [*(users or ()), *(one.user_id for one in rows)])
    following = shown[-1] if len(ids) > PAGE_ROWS else None
    asked = {"status": status, "user": user}
    return render_template("backfills.html", rows=rows, asked=asked, states=STATES, following=following)


def _page(connection: Connection, status: str, users: list[str] | None, before: str) -> list[int]:
    number = formats.number("before", before) if before else None
    values = {"before": number, "status": status or None, "users": users, "limit": PAGE_ROWS + 1}
    return list(connection.scalars(PAGE, values))


@pages.get("/backfills/<int:number>")
def page(number: int) -> str:
    number = min(number, 2**62)
    found = backfill_admin.listed(console().reader, Filter(ids=(number,)))
    if not found:
        raise NotFound(f"no backfill {number}")
    chunks = backfill_admin.chunks_of(console().reader, number)
    record_look("backfill", [found[0].user_id], backfill=number)
    return render_template("backfill.html", one=found[0], chunks=chunks[:200], total=len(chunks))
