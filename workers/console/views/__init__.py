"""The console's pages and actions."""

from typing import Any

from sqlalchemy import Connection, TextClause

from workers.console import formats
from workers.console.formats import PAGE_ROWS

MAX_ID = 2**63 - 1


def page_of_ids(connection: Connection, query: TextClause, values: dict[str, Any]) -> tuple[list[int], int | None]:
    """The ids of the page after the parameter `before`, and the last of them if another page follows."""
    before = formats.text("before")
    values |= {"before": formats.number("before", before) if before else None, "limit": PAGE_ROWS + 1}
    ids = list(connection.scalars(query, values))
    return ids[:PAGE_ROWS], ids[PAGE_ROWS - 1] if len(ids) > PAGE_ROWS else None
