"""`headrace retention`: what would go, what goes, and that it is written down."""

from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import apply, delivery, heartrate, rows
from tests.support.cli import Headrace

BEATS = "SELECT count(*) AS rows FROM health.heartrate"


def test_the_command_says_what_would_go(headrace: Headrace, engine: Engine, settings: Settings) -> None:
    """Breaks if an operator cannot see the effect of a setting before it is in force."""
    for user in ("u1", "u2"):
        apply(engine, settings, delivery(heartrate(user, {1440 * n: 60 for n in range(10)})))
    setting = {"HEADRACE_RETENTION": "heartrate=1"}
    assert "20" in headrace("retention", "--dry-run", **setting).stdout
    assert rows(engine, BEATS) == [{"rows": 20}]
    assert "removed" in headrace("retention", "--yes", **setting).stdout
    assert rows(engine, BEATS) == [{"rows": 0}]
    assert "retention" in headrace("audit", "--since", "2026-01-01").stdout
