"""`headrace report completeness`: deliveries by provider and day, missing data, and the exit status for cron."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text

from app.broker.celery import make_celery
from app.broker.lanes import APPLY
from app.config.settings import Settings
from app.delivery import Delivery, pack
from tests.support import START, apply, delivery, heartrate, workout
from tests.support.backfills import announce, notice
from tests.support.cli import Headrace
from tests.support.database import run
from tests.support.deliveries import received
from tests.support.reconnections import EVENTS
from tests.support.refused import Refused, add_refused

DAY = timedelta(days=1)
SINCE = ("--since", "2026-03-01", "--until", "2026-03-20")


def came(one: Delivery, at: datetime) -> Delivery:
    """The delivery, received at that time."""
    return received(one, at)


def report(headrace: Headrace, *more: str, status: int) -> dict[str, Any]:
    done = headrace("report", "completeness", *SINCE, *more, "--json")
    assert done.exit_code == status, done.stdout + done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(autouse=True)
def empty_broker(broker_url: str) -> None:
    """`broker_url` empties the broker."""


def test_every_delivery_is_counted_once_on_its_day(headrace: Headrace, settings: Settings, engine: Engine) -> None:
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


def test_complete_data_ends_with_0(headrace: Headrace, settings: Settings, engine: Engine) -> None:
    apply(engine, settings, came(delivery(workout("u1"), START), START))
    assert report(headrace, status=0)["faults"] == []
    done = headrace("report", "completeness", *SINCE)
    assert done.exit_code == 0
    assert "1 accepted = 1 applied + 0 duplicate + 0 stale + 0 ignored + 0 dead; 0 messages pending now" in done.stdout
    assert done.stdout.endswith("\nnothing is missing or dead\n")


def test_a_dropped_dead_letter_is_no_fault(headrace: Headrace, settings: Settings, engine: Engine) -> None:
    apply(engine, settings, came(delivery(b"{}", START), START))
    report(headrace, status=1)
    assert headrace("dead", "drop", "--all", "--yes").exit_code == 0
    assert report(headrace, status=0)["days"][0]["dead"] == 1


def test_queued_messages_are_pending(headrace: Headrace, settings: Settings) -> None:
    with make_celery(settings, "publisher") as celery:
        celery.send_task(APPLY, args=(pack([delivery(workout("u1"))]),), queue="live")
    answer = report(headrace, status=0)
    assert (answer["pending_messages"]["live"], answer["days"]) == (1, [])


@pytest.mark.parametrize(("status", "ends"), [("running", 0), ("failed", 1), ("paused", 1), ("complete", 0)])
def test_stopped_backfills_are_faults(
    headrace: Headrace, settings: Settings, engine: Engine, status: str, ends: int
) -> None:
    announce(engine, settings, notice("u1"))
    with engine.begin() as connection:
        connection.execute(
            text("UPDATE headrace.backfills SET status = :status, finished_at = now()"), {"status": status}
        )
    listed = report(headrace, status=ends)["unfinished_backfills"]
    assert [one["status"] for one in listed] == ([] if status == "complete" else [status])


def test_backfills_in_progress_are_listed_apart(headrace: Headrace, settings: Settings, engine: Engine) -> None:
    """Breaks if a running backfill is reported like one that an operator must resume."""
    announce(engine, settings, notice("u1", "sleep"), notice("u1", "workouts"))
    run(engine, "UPDATE headrace.backfills SET status = 'failed', finished_at = now() WHERE resource = 'sleep'")
    done = headrace("report", "completeness", *SINCE)
    stuck, _, in_progress = done.stdout.partition("backfills that failed or are paused: 1")[2].partition(
        "backfills in progress: 1"
    )
    assert ("sleep" in stuck, "workouts" in stuck) == (True, False)
    assert "workouts" in in_progress
    assert done.stdout.endswith("missing or dead: 1 backfills that failed or are paused\n")


def test_refused_items_are_listed(headrace: Headrace, settings: Settings, engine: Engine) -> None:
    """Breaks if data that was refused inside an applied delivery or page appears in no report."""
    columns = "aggregator, message_id, event_type, user_id, received_at, reason, sealed, item, items"
    values = ("'msg_1', 'daily.data.workouts.created'", "'history', 'fetch.workouts'")
    for number, names in enumerate(values, 3):
        run(
            engine,
            f"""INSERT INTO headrace.dead_letters ({columns})
            VALUES ('junction', {names}, 'u1', '2026-03-14', 'no id', '', 'digest', {number})""",
        )
    (one,) = report(headrace, status=1)["refused_items"]
    assert (one["user_id"], one["resource"], one["of_webhooks"], one["of_history"]) == ("u1", "workouts", 3, 4)
    assert "refused items, by user and resource: 1" in headrace("report", "completeness", *SINCE).stdout


def test_refused_items_are_listed_and_are_faults(headrace: Headrace, engine: Engine) -> None:
    """Breaks if the report says that nothing is missing while items of a page of history were refused."""
    add_refused(engine, Refused("history", "no value", 3), Refused("msg_1", "no timestamp"))
    done = headrace("report", "completeness", "--since", f"{datetime.now(UTC) - DAY:%Y-%m-%d}", "--json")
    answer = json.loads(done.stdout)
    assert (done.exit_code, answer["faults"]) == (1, ["4 refused items"])
    (row,) = answer["refused_items"]
    assert (row["user_id"], row["resource"], row["of_webhooks"], row["of_history"]) == ("u1", "heartrate", 1, 3)


@pytest.mark.parametrize(("whose", "ends"), [("ours", 1), ("aggregator", 0), ("provider", 0)])
def test_gaps_are_listed_and_ours_are_faults(headrace: Headrace, engine: Engine, whose: str, ends: int) -> None:
    query = """INSERT INTO headrace.gaps (user_id, provider, resource, part, whose, reason, is_pulling)
        VALUES ('u1', 'garmin', 'sleep', 'pulls', :whose, 'its backfill has failed', false)"""
    with engine.begin() as connection:
        connection.execute(text(query), {"whose": whose})
    answer = report(headrace, status=ends)
    assert [(one["user_id"], one["whose"]) for one in answer["open_gaps"]] == [("u1", whose)]


def test_days_between_days_are_missing(headrace: Headrace, settings: Settings, engine: Engine) -> None:
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


def test_an_empty_period_is_refused(headrace: Headrace) -> None:
    done = headrace("report", "completeness", "--since", "2026-03-02", "--until", "2026-03-01")
    assert (done.exit_code, "is not before" in done.stderr) == (1, True)
