"""Backfills: the list with progress and time left, and one backfill with its windows."""

from flask import Blueprint, render_template
from sqlalchemy import text

from app.errors import NotFound, Unprocessable
from workers.console import formats
from workers.console.context import console, record_look
from workers.console.formats import PAGE_ROWS
from workers.console.views import MAX_ID, page_of_ids
from workers.store import backfill_admin, user_lookup
from workers.store.engine import transaction

pages = Blueprint("backfills", __name__)
STATES = ("pending", "running", "paused", "complete", "failed", "cancelled")
# Without an index of failed and cancelled backfills: a scan of a million takes 0.1 to 0.2 s. Open ones have indexes.
PAGE = text("""
SELECT id FROM headrace.backfills
WHERE (CAST(:before AS bigint) IS NULL OR id < :before)
  AND (CAST(:status AS text) IS NULL OR status = :status)
  AND (CAST(:users AS text[]) IS NULL OR user_id = ANY(:users))
ORDER BY id DESC LIMIT :limit""")


@pages.get("/backfills")
def listed() -> str:
    status, user = formats.text("status"), formats.text("user")
    if status and status not in STATES:
        raise Unprocessable("the status is unknown")
    with transaction(console().reader) as connection:
        users = [one.user_id for one in user_lookup.find(connection, user)] if user else None
        ids, following = page_of_ids(connection, PAGE, {"status": status or None, "users": users})
    rows = backfill_admin.listed(console().reader, backfill_admin.Filter(ids=tuple(ids)), PAGE_ROWS) if ids else []
    record_look("backfills", [*(users or ()), *(one.user_id for one in rows)])
    asked = {"status": status, "user": user}
    return render_template("backfills.html", rows=rows, asked=asked, states=STATES, following=following)


@pages.get(f"/backfills/<int(max={MAX_ID}):number>")
def page(number: int) -> str:
    found = backfill_admin.listed(console().reader, backfill_admin.Filter(ids=(number,)))
    if not found:
        raise NotFound(f"no backfill {number}")
    chunks = backfill_admin.chunks_of(console().reader, number)
    record_look("backfill", [found[0].user_id], backfill=number)
    return render_template("backfill.html", one=found[0], chunks=chunks[:200], total=len(chunks))
