"""The completeness report: missing days, refused items, and backfills in progress."""

from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support.backfills import announce, notice, put
from tests.support.cases import Failures
from tests.support.refused import Refused, add_refused
from workers.operate import completeness
from workers.operate.completeness import Completeness, holes, read_report
from workers.store.completeness import RefusedItems
from workers.store.coverage import Fetched, ResourceKey

KEY = ResourceKey("u1", "garmin", "sleep")
MONDAY = date(2026, 3, 2).toordinal()


def window(start: int, end: int, *, made: int, state: Any = "done") -> Fetched:
    """A fetched window, in days after Monday."""
    days = [datetime.fromordinal(MONDAY + n).replace(tzinfo=UTC) for n in (start, end, made)]
    return Fetched(days[0], days[1], "reconcile", state, days[2], days[2])


def test_only_days_that_were_not_fetched_since_are_missing() -> None:
    failures = Failures()
    for days, asked, missing in (
        ({0, 1, 3}, [], [2]),
        ({0, 1, 3}, [window(2, 2, made=5)], []),  # asked for since, and there was nothing
        ({0, 1, 3}, [window(2, 2, made=2)], [2]),  # on the day itself, which was not over
        ({0, 1, 3}, [window(2, 2, made=5, state="open")], [2]),
        ({0, 1, 3}, [window(0, 1, made=5)], [2]),
        ({0, 5, 9}, [], []),  # too rare to miss
        ({4}, [], []),
        (set(), [], []),
    ):
        with failures.of(days, asked, missing):
            found = [
                one.toordinal() - MONDAY
                for hole in holes({KEY: {MONDAY + n for n in days}}, {KEY: asked})
                for one in hole.days
            ]
            assert found == missing
    assert failures == {}


def report(engine: Engine) -> Completeness:
    now = datetime.now(UTC)
    return read_report(engine, [], now - timedelta(days=1), now + timedelta(minutes=1), None)


def test_refused_items_are_counted_by_user_and_resource(engine: Engine) -> None:
    """Breaks if the report says that nothing is missing while items of webhooks or of history were refused."""
    daily = "daily.data.heartrate.updated"
    add_refused(
        engine,
        Refused("msg_1", "no timestamp", 1, event_type=daily),
        Refused("msg_2", "no value", 900, event_type=daily),
        Refused("msg_3", "no value", 2, event_type=daily),
        Refused("history", "no value", 3),
        Refused("history", "no value", 1, event_type="fetch.sleep", user_id="u2"),
        Refused("msg_4", "no key", 2, event_type="activity", user_id=None),
        Refused("msg_5", "old", 10, "2 days"),
    )
    found = report(engine)
    assert found.listed_refused == [
        RefusedItems("u1", "heartrate", 903, 3, "no value"),
        RefusedItems("", "activity", 2, 0, "no key"),
        RefusedItems("u2", "sleep", 0, 1, "no value"),
    ]
    assert found.faults == ["909 refused items"]
    assert found.days == []  # no delivery is dead


def test_backfills_in_progress_do_not_hide_failed_ones(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if running backfills are faults, or if many of them push the failed ones out of the list."""
    monkeypatch.setattr(completeness, "MAX_LISTED", 2)
    *running, failed = announce(engine, settings, *(notice(f"u{n}") for n in range(4)))
    for number in running:
        put(engine, number, "running")
    assert report(engine).faults == []
    put(engine, failed, "failed")
    found = report(engine)
    assert [one.status for one in found.unfinished] == ["failed", "running"]
    assert found.faults == ["1 backfills that failed or are paused"]
