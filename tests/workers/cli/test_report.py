"""`headrace report completeness`: the account by provider and day, what is missing, and the status that cron sees."""

import json
from datetime import datetime, timedelta
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine, text

from app.broker.celery import make_celery
from app.broker.lanes import APPLY
from app.config.settings import Settings
from app.delivery import Delivery, pack
from tests.support import START, apply, delivery, heartrate, workout
from tests.support.backfills import announce, notice
from tests.support.cli import Headrace
from tests.support.reconnections import EVENTS

DAY = timedelta(days=1)
SINCE = ("--since", "2026-03-01", "--until", "2026-03-20")


def came(one: Delivery, at: datetime) -> Delivery:
    """The delivery, as if it had come then."""
    return msgspec.structs.replace(one, received_at=at.timestamp())


def report(headrace: Headrace, *more: str, status: int) -> dict[str, Any]:
    """The report as JSON, ended with this status."""
    done = headrace("report", "completeness", *SINCE, *more, "--json")
    assert done.exit_code == status, done.stdout + done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(autouse=True)
def empty_broker(broker_url: str) -> None:
    """What waits is the test's own."""


def test_every_delivery_is_counted_once_on_its_day(headrace: Headrace, settings: Settings, engine: Engine) -> None:
    """Breaks if an outcome is left out, counted for another day or provider, or for every attempt."""
    first, second = delivery(workout("u1"), START), delivery(workout("u1"), START + DAY)
    sent = [came(first, START), came(first, START), came(delivery(b"{}", START), START), came(second, START + DAY)]
    apply(engine, settings, *sent)
    apply(engine, settings, came(EVENTS[0], START), came(delivery(workout("u1"), START - 20 * DAY), START - 20 * DAY))
    answer = report(headrace, "--no-coverage", status=1)
    shown = [(row["provider"], row["day"], row["accepted"], row["attempts"]) for row in answer["days"]]
    assert shown == [("junction", "2026-03-14", 2, 3), ("junction", "2026-03-15", 1, 1), ("terra", "2026-03-14", 1, 1)]
    for row in answer["days"]:
        assert row["accepted"] == sum(row[name] for name in ("applied", "duplicate", "stale", "ignored", "dead"))
    assert [row["dead letters"] for row in answer["days"]] == [1, 0, 0]
    assert answer["faults"] == ["1 dead letters"]


def test_all_is_well_ends_with_0(headrace: Headrace, settings: Settings, engine: Engine) -> None:
    """Breaks if cron sends a mail every night."""
    apply(engine, settings, came(delivery(workout("u1"), START), START))
    assert report(headrace, status=0)["faults"] == []
    done = headrace("report", "completeness", *SINCE)
    assert done.exit_code == 0
    assert "1 accepted = 1 applied + 0 duplicate + 0 stale + 0 ignored + 0 dead; 0 messages pending now" in done.stdout
    assert done.stdout.endswith("\nnothing is missing or dead\n")


def test_a_dead_letter_that_was_dropped_is_no_fault(headrace: Headrace, settings: Settings, engine: Engine) -> None:
    """Breaks if what an operator has settled is reported until the window has passed it."""
    apply(engine, settings, came(delivery(b"{}", START), START))
    report(headrace, status=1)
    assert headrace("dead", "drop", "--all", "--yes").exit_code == 0
    assert report(headrace, status=0)["days"][0]["dead"] == 1


def test_what_waits_in_the_broker_is_pending(headrace: Headrace, settings: Settings) -> None:
    """Breaks if events that no worker has taken look as if they had never come."""
    with make_celery(settings, "publisher") as celery:
        celery.send_task(APPLY, args=(pack([delivery(workout("u1"))]),), queue="live")
    answer = report(headrace, status=0)
    assert (answer["pending_messages"]["live"], answer["days"]) == (1, [])


@pytest.mark.parametrize(("status", "ends"), [("running", 0), ("failed", 1), ("paused", 1), ("complete", 0)])
def test_history_that_will_not_come_is_missing(
    headrace: Headrace, settings: Settings, engine: Engine, status: str, ends: int
) -> None:
    """Breaks if a backfill that nobody goes on with is passed over, or one under way is an alarm."""
    announce(engine, settings, notice("u1"))
    with engine.begin() as connection:
        connection.execute(
            text("UPDATE headrace.backfills SET status = :status, finished_at = now()"), {"status": status}
        )
    listed = report(headrace, status=ends)["unfinished_backfills"]
    assert [one["status"] for one in listed] == ([] if status == "complete" else [status])


@pytest.mark.parametrize(("whose", "ends"), [("ours", 1), ("aggregator", 0), ("provider", 0)])
def test_gaps_are_listed_and_ours_are_faults(headrace: Headrace, engine: Engine, whose: str, ends: int) -> None:
    """Breaks if what the reconciliation found is not seen, or what only the provider can mend wakes somebody."""
    query = """INSERT INTO headrace.gaps (user_id, provider, resource, part, whose, reason, is_pulling)
        VALUES ('u1', 'garmin', 'sleep', 'pulls', :whose, 'its backfill has failed', false)"""
    with engine.begin() as connection:
        connection.execute(text(query), {"whose": whose})
    answer = report(headrace, status=ends)
    assert [(one["user_id"], one["whose"]) for one in answer["open_gaps"]] == [("u1", whose)]


def test_days_between_days_are_missing(headrace: Headrace, settings: Settings, engine: Engine) -> None:
    """Breaks if a day that was lost between days with data is not found, in records or in samples."""
    for day in (10, 11, 13):
        date_of = f"2026-03-{day}"
        apply(engine, settings, delivery(workout("u1", f"w{day}", calendar_date=date_of)))
        minutes = {(day - 14) * 1440: 60.0}
        apply(engine, settings, delivery(heartrate("u1", minutes)))
    answer = report(headrace, status=1)
    assert {(one["resource"], *one["days"]) for one in answer["holes"]} == {
        ("workouts", "2026-03-12"),
        ("heartrate", "2026-03-12"),
    }
    assert answer["faults"] == ["2 days without data between days with data"]
    assert report(headrace, "--no-coverage", status=0)["holes"] == []


def test_a_window_that_ends_before_it_begins_is_refused(headrace: Headrace) -> None:
    """Breaks if a typing error is answered with "nothing is missing"."""
    done = headrace("report", "completeness", "--since", "2026-03-02", "--until", "2026-03-01")
    assert (done.exit_code, "is not before" in done.stderr) == (1, True)
