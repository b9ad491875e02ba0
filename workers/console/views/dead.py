"""Dead letters: the list, and one dead letter."""

from dataclasses import asdict

from flask import Blueprint, render_template
from sqlalchemy import text

from app.errors import NotFound
from workers.console import formats
from workers.console.context import console, record_look
from workers.console.formats import PAGE_ROWS
from workers.console.views import MAX_ID, page_of_ids
from workers.store import dead_letters
from workers.store.engine import transaction

pages = Blueprint("dead", __name__)
REASONS = text("""
SELECT reason, count(*) AS dead_letters FROM (
    SELECT reason FROM headrace.dead_letters ORDER BY id DESC LIMIT 10000) AS newest
GROUP BY reason ORDER BY dead_letters DESC, reason LIMIT 20""")
# In two steps, because dead_letters.listed selects by id: the page's ids by key, then their rows.
PAGE = text("""
SELECT id FROM headrace.dead_letters
WHERE (CAST(:before AS bigint) IS NULL OR id < :before)
  AND (CAST(:reason AS text) IS NULL OR position(lower(:reason) IN lower(reason)) > 0)
ORDER BY id DESC LIMIT :limit""")


@pages.get("/dead")
def listed() -> str:
    reason = formats.text("reason")
    with transaction(console().reader) as connection:
        ids, following = page_of_ids(connection, PAGE, {"reason": reason or None})
        reasons = connection.execute(REASONS).all()
    rows = dead_letters.listed(console().reader, ids, limit=PAGE_ROWS) if ids else []
    record_look("dead letters", [one.user_id for one in rows])
    return render_template("dead.html", rows=rows, reason=reason, reasons=reasons, following=following)


@pages.get(f"/dead/<int(max={MAX_ID}):number>")
def page(number: int) -> str:
    """One dead letter, without its body: `headrace dead show --body` prints it."""
    found = dead_letters.listed(console().reader, [number])
    if not found:
        raise NotFound(f"no dead letter {number}")
    record_look("dead letter", [found[0].user_id or "unknown"], dead_letter=number)
    return render_template("dead_letter.html", one=found[0], fields=asdict(found[0]))
