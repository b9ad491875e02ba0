"""The table of backfills on screens of different widths."""

import io
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from workers.operate.backfill_table import progress
from workers.store.backfill_admin import Backfill

USER = "8a7f2c04-5c49-4a0b-9d4e-7b7f3f1d2c11"
NOW = datetime(2026, 3, 14, tzinfo=UTC)
ERROR = "status 500 after a long time of waiting " * 3


def backfill(number: int, **changes: Any) -> Backfill:
    values: dict[str, Any] = {
        "id": number,
        "user_id": USER,
        "provider": "garmin",
        "resource": "body_temperature_delta",
        "item": "",
        "requested_by": "reconcile",
        "status": "running",
        "window_start": NOW,
        "window_end": NOW,
        "is_final_seen": True,
        "chunks": 3,
        "chunks_done": 1,
        "records": 21_600_000,
        "pages": 3,
        "attempts": 1,
        "created_at": NOW,
        "started_at": NOW,
        "finished_at": None,
        "due_at": NOW,
        "error": None,
        "share": 0.5,
        "seconds": 3600.0,
    }
    return Backfill(**values | changes)


def printed(width: int, *found: Backfill) -> str:
    screen = Console(width=width, file=io.StringIO(), markup=False, emoji=False)
    screen.print(progress(found))
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160, 200])
def test_no_id_is_cut(width: int) -> None:
    """Breaks if the id that `backfill show` needs is cut, or is not the first column."""
    shown = printed(width, backfill(123456789), backfill(7, status="failed", error=ERROR))
    assert all(len(line) <= width for line in shown.splitlines())
    ids = [line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│")]
    assert [one for one in ids if one] == ["123456789", "7"]
    assert "…" not in shown
    folded = "".join(line.split("│")[2].strip() for line in shown.splitlines() if line.startswith("│"))
    assert folded == USER * 2


def test_a_narrow_screen_lists_errors_below_the_table() -> None:
    """Breaks if the reason of a failure is left out."""
    wide, narrow = printed(200, backfill(7, error="status 500")), printed(80, backfill(7, error="status 500"))
    assert [word in wide for word in ("requested by", "per s", "error")] == [True] * 3
    assert [word in narrow for word in ("requested by", "per s", "error")] == [False] * 3
    assert narrow.endswith("7: status 500\n")
    assert "50%" in narrow
