"""`headrace retention`: counts, deletes, and records the deletion."""

from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import apply, delivery, heartrate, rows
from tests.support.cli import Headrace

BEATS = "SELECT count(*) AS rows FROM health.heartrate"


def test_dry_run_counts_and_the_command_deletes(headrace: Headrace, engine: Engine, settings: Settings) -> None:
    for user in ("u1", "u2"):
        apply(engine, settings, delivery(heartrate(user, {1440 * n: 60 for n in range(10)})))
    setting = {"HEADRACE_RETENTION": "heartrate=1"}
    assert "20" in headrace("retention", "--dry-run", **setting).stdout
    assert rows(engine, BEATS) == [{"rows": 20}]
    assert "removed" in headrace("retention", "--yes", **setting).stdout
    assert rows(engine, BEATS) == [{"rows": 0}]
    assert "retention" in headrace("audit", "--since", "2026-01-01").stdout
