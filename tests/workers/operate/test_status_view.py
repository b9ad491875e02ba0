"""`headrace status`: the snapshot and its tables."""

import io
import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from rich.console import Console
from sqlalchemy import Engine, text

from app.catalogue import catalogue
from app.config.settings import Settings
from app.errors import TryLater
from tests.support import START, apply, delivery, event, message_id, workout
from tests.support.backfills import make_due
from tests.support.cases import Failures
from tests.support.database import run
from tests.support.provider import Provider
from tests.support.refused import Refused, add_refused
from workers.broker_admin import Lane
from workers.cli.output import console
from workers.fetch.rate_limits import Pause, Throttle, failures, pauses
from workers.local.ports import free_port
from workers.operate import durations, health, status_view
from workers.store.backfills import due
from workers.store.engine import make_engine

IDLE = [Lane("live", 0, None), Lane("backfill", 0, None)]
BUSY = [Lane("live", 3, timedelta(seconds=61.25)), Lane("backfill", 1, None)]


NOT_RETRIED = {"unacked": 0, "unacked_for": None} | {
    "retrying": 0,
    "retries": 0,
    "retrying_for": None,
    "retry_reason": "",
}
RETRIED = Lane(
    *("live", 0, None),
    unacked=2,
    unacked_for=timedelta(seconds=4),
    retrying=1,
    retries=3,
    retrying_for=timedelta(seconds=75),
    retry_reason="PostgreSQL: QueryCanceled (57014) after 45s",
)


@pytest.fixture
def full(engine: Engine, settings: Settings) -> Engine:
    """A database with rows in every table of the status."""
    repeated = delivery(workout("u1"), name=message_id(START))
    broken = event("provider.connection.error", "u1", {"provider": "oura", "error_type": "token_refresh_failed"})
    mended = event("provider.connection.created", "u2", {"provider": {"slug": "garmin"}})
    notices = [
        event("historical.data.sleep.created", "u1", {"user_id": "u1", "provider": "oura", "is_final": final})
        for final in (False, True)
    ]
    bodies: list[Any] = [broken, mended, *notices, b"half", b"", event("raw.garmin.dailies", "u1", {})]
    apply(engine, settings, repeated, *map(delivery, bodies))
    apply(engine, settings, repeated)
    return engine


def shown(what: status_view.Status) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(status_view.render(what))
    return out.getvalue()


def test_due_backfills_without_a_worker_are_counted(full: Engine) -> None:
    assert status_view.read(full, IDLE, []).idle == 0
    with full.begin() as connection:
        connection.execute(text("UPDATE headrace.backfills SET due_at = now() - interval '6 minutes'"))
    assert status_view.read(full, IDLE, []).idle == 1
    with full.begin() as connection:
        connection.execute(text("UPDATE headrace.backfills SET lease_until = now() + interval '1 minute'"))
    assert status_view.read(full, IDLE, []).idle == 0


def test_the_snapshot_counts_every_table(full: Engine) -> None:
    plain = status_view.read(full, BUSY, []).plain()
    assert plain["lanes"] == [
        NOT_RETRIED | {"name": "live", "messages": 3, "oldest": 61.2},
        NOT_RETRIED | {"name": "backfill", "messages": 1, "oldest": None},
    ]
    assert {row["outcome"]: (row["total"], row["last_hour"]) for row in plain["deliveries"]} == {
        "applied": (5, 5),
        "dead": (2, 2),
        "ignored": (1, 1),
    }
    assert plain["backfills"] == [
        {"status": "pending", "backfills": 1, "last_day": 0, "chunks_done": 0, "chunks_total": 2, "records": 0}
    ]
    (broken,) = plain["connections_in_error"]
    assert (broken["user_id"], broken["provider"], broken["error"]) == ("u1", "oura", "token_refresh_failed")
    assert {row["reason"]: row["dead_letters"] for row in plain["dead_letters"]}
    assert sum(row["dead_letters"] for row in plain["dead_letters"]) == 2


def test_an_old_delivery_is_not_of_the_last_hour(engine: Engine, settings: Settings) -> None:
    apply(engine, settings, delivery(workout("u1")))
    with engine.begin() as connection:
        connection.execute(text("UPDATE headrace.deliveries SET received_at = now() - interval '61 minutes'"))
    assert status_view.read(engine, IDLE, []).deliveries == [{"outcome": "applied", "total": 1, "last_hour": 0}]


def test_the_snapshot_is_json(full: Engine) -> None:
    plain = status_view.read(full, BUSY, []).plain()
    assert json.loads(json.dumps(plain)) == plain


def test_an_empty_installation_shows_its_lanes(engine: Engine) -> None:
    picture = status_view.read(engine, IDLE, [])
    assert picture.plain() == {
        "lanes": [NOT_RETRIED | {"name": name, "messages": 0, "oldest": None} for name in ("live", "backfill")],
        "deliveries": [],
        "backfills": [],
        "open_backfills": [],
        "pauses": [],
        "gaps": [],
        "connections_in_error": [],
        "dead_letters": [],
        "refused_items": [],
        "failures": [],
        "consumers": [],
        "unnumbered_changes": 0,
        "subscriptions": [],
        "days_behind": 0.0,
        "days_failed": [],
        "delay": None,
        "swept": None,
        "crashed_deliveries": 0,
        "lost_deliveries": 0,
        "idle": 0,
        "terra_admin_token": None,
        "outage": {},
        "faults": [],
    }
    text_shown = shown(picture)
    assert text_shown.startswith("healthy")
    assert "Lanes" in text_shown
    assert "Dead letters" not in text_shown


def test_a_consumer_that_loses_changes_is_a_problem(engine: Engine) -> None:
    """Breaks if a consumer that falls behind retention, or a feed that stands still, is called healthy."""
    at = datetime.now(UTC)
    change = "INSERT INTO headrace.changes (position, changed_at, op, user_id, row_count, origin) VALUES "
    run(
        engine,
        "UPDATE headrace.feed SET newest = 9, dropped = 3",
        "INSERT INTO headrace.consumers (name, position) VALUES ('current', 9), ('late', 5), ('lost', 2)",
        f"{change} (9, '{at - timedelta(days=12.5)}', 'put', 'u1', 1, 'webhook')",
        "INSERT INTO headrace.daily_feed (position) VALUES (9)",
    )
    picture = status_view.read(engine, IDLE, [])
    found = [one.what for one in health.problems(replace(picture, unnumbered=health.MANY_UNNUMBERED))]
    assert found == [
        "at least 50,000 changes are not in the change feed yet",
        "consumer late of the change feed loses changes in 1 d 12 h, 4 are unread",
        "changes were dropped that consumer lost of the change feed has not read",
    ]
    assert "Consumers of the change feed" in shown(picture)
    (problem,) = health.problems(status_view.read(engine, IDLE, [], feed_days=30))
    assert problem.what.startswith("changes were dropped")


def test_late_days_are_a_problem(engine: Engine) -> None:
    """Breaks if days that no worker computes are called healthy: queued ones, and changes that are not queued yet."""
    change = "INSERT INTO headrace.changes (position, changed_at, op, user_id, row_count, origin) VALUES "
    run(engine, f"{change} (9, now() - interval '6 minutes', 'put', 'u1', 1, 'webhook')")
    (problem,) = health.problems(status_view.read(engine, IDLE, []))
    assert (problem.what, problem.do, problem.lane) == (
        "values per day are 6 min behind the stored rows",
        "headrace worker --lane derive",
        "derive",
    )
    run(engine, "INSERT INTO headrace.daily_feed (position) VALUES (9)")
    assert list(health.problems(status_view.read(engine, IDLE, []))) == []
    run(
        engine,
        "INSERT INTO headrace.daily_queue (person, resource, dates, origin, since)"
        " VALUES ('u1', 'steps', '{[2026-03-14,2026-03-15)}', 'webhook', now() - interval '7 minutes')",
    )
    (problem,) = health.problems(status_view.read(engine, IDLE, []))
    assert problem.what == "values per day are 7 min behind the stored rows"


def test_everything_is_shown(full: Engine) -> None:
    text_shown = shown(status_view.read(full, BUSY, []))
    for part in (
        "Lanes",
        "1 min 1 s",
        "Deliveries",
        "Backfills",
        "Connections in error",
        "token_refresh_failed",
        "Dead",
    ):
        assert part in text_shown


def test_retried_messages_are_shown(engine: Engine) -> None:
    """Breaks if an empty lane hides that messages are retried, since when and why."""
    picture = status_view.read(engine, [RETRIED], [])
    text_shown = " ".join(shown(picture).split())
    for part in ("unacknowledged", "4.0 s", "Retried messages", "1 min 15 s", "QueryCanceled (57014) after 45s"):
        assert part in text_shown
    (lane,) = picture.plain()["lanes"]
    assert (lane["unacked"], lane["unacked_for"], lane["retrying"], lane["retrying_for"]) == (2, 4.0, 1, 75.0)
    assert "Retried messages" not in shown(status_view.read(engine, IDLE, []))


def test_nothing_of_a_body_is_shown(full: Engine) -> None:
    text_shown = shown(status_view.read(full, BUSY, []))
    assert "8000.5" not in text_shown
    assert "half" not in text_shown


def test_an_unreachable_database_raises_try_later(settings: Settings) -> None:
    url = f"postgresql+psycopg://u:sesame@127.0.0.1:{free_port()}/d"
    away = make_engine(replace(settings, database_url=url))
    with pytest.raises(TryLater, match="PostgreSQL"):
        status_view.read(away, IDLE, [])
    away.dispose()


def test_a_rejected_api_key_is_shown(engine: Engine, settings: Settings, broker_url: str) -> None:
    reading = replace(settings, broker_url=broker_url)
    Throttle(reading).pause("junction", 300, "status 401: the API key is refused", kind="key_refused")
    picture = status_view.read(engine, IDLE, pauses(reading))
    (silence,) = json.loads(json.dumps(picture.plain()))["pauses"]
    assert 290 <= silence.pop("seconds_left") <= 300
    because = "status 401: the API key is refused"
    known = {"account": "junction", "because_of": because, "kind": "key_refused", "key": "", "is_own_key": None}
    assert silence == known
    for part in ("Paused accounts", "junction", "status 401: the API key is refused", "because of", "seconds left"):
        assert part in shown(picture)


def test_the_table_of_paused_accounts_is_optional(engine: Engine) -> None:
    assert "Paused accounts" not in shown(status_view.read(engine, IDLE, []))
    assert "Paused accounts" in shown(status_view.read(engine, IDLE, [Pause("terra", 0.4, "status 429")]))


def test_backfills_in_progress_are_shown(engine: Engine, settings: Settings) -> None:
    names = [name for name, one in catalogue().items() if one.kind == "timeseries"][: status_view.MAX_SHOWN + 3]
    notices = [event(f"historical.data.{name}.created", "u1", {"provider": "oura"}) for name in names]
    apply(engine, settings, *map(delivery, notices))
    with engine.begin() as connection:
        change = "UPDATE headrace.backfills SET status = :state, started_at = now() - interval '1 hour'"
        for name, state in zip(names, ("failed", "complete", "cancelled", "running", "paused"), strict=False):
            connection.execute(text(f"{change} WHERE resource = :name"), {"name": name, "state": state})
        day = "interval '1 day'"
        half = f"window_end + {day} - (window_end - window_start + 2 * {day}) / 2"
        connection.execute(text(f"UPDATE headrace.chunks SET slice_end = {half}"))
    picture = status_view.read(engine, IDLE, [])
    found = picture.plain()["open_backfills"]
    assert [one["status"] for one in found] == ["running", "paused", *["pending"] * (status_view.MAX_SHOWN - 2)]
    assert found[0]["share"] == pytest.approx(0.5)
    assert found[0]["left"] == pytest.approx(3600, abs=60)
    assert json.loads(json.dumps(found)) == found
    text_shown = shown(picture)
    for part in ("Backfills in progress", "50%", "oura", names[3], names[4], "running", "paused"):
        assert part in text_shown
    assert names[0] not in text_shown


def test_a_duration_has_two_units() -> None:
    failures = Failures()
    for seconds, words in (
        (0, "0 s"),
        (0.9, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (725, "12 min 5 s"),
        (3600, "1 h"),
        (3605, "1 h 5 s"),
        (86_400 + 7260, "1 d 2 h"),
        (400 * 86_400, "400 d"),
        (None, "-"),
    ):
        with failures.of(seconds, words):
            assert durations.format_duration(seconds) == words
            assert durations.format_duration(None if seconds is None else timedelta(seconds=seconds)) == words
    assert failures == {}


@pytest.mark.parametrize("error", ["[invalid_grant] expired", "no [/path]"])
def test_brackets_in_an_error_are_no_markup(engine: Engine, settings: Settings, error: str) -> None:
    body = {"provider": "oura", "error_type": error}
    apply(engine, settings, delivery(event("provider.connection.error", "u1", body)))
    screen = console()
    with screen.capture() as captured:
        screen.print(status_view.render(status_view.read(engine, IDLE, [])))
    assert error in captured.get()


def test_refused_items_of_webhooks_and_history_are_counted(full: Engine) -> None:
    """Breaks if refused items of history are not shown, or items count as dead deliveries."""
    dead = status_view.read(full, IDLE, []).dead_letters
    add_refused(
        full,
        Refused("msg_1", "no timestamp"),
        Refused("msg_1", "no timestamp", 900),
        Refused("msg_2", "old", 5000, "2 hours"),
        Refused("history", "no value", 3, "61 minutes"),
    )
    picture = status_view.read(full, IDLE, [])
    assert picture.plain()["refused_items"] == [
        {"origin": "webhooks", "items": 5901, "last_hour": 901, "reason": "no timestamp"},
        {"origin": "history", "items": 3, "last_hour": 0, "reason": "no value"},
    ]
    assert picture.dead_letters == dead
    for part in ("Refused items", "5901", "history", "901 items refused in the last hour: no timestamp"):
        assert part in shown(picture)


def test_an_api_that_does_not_answer_is_no_missing_worker(full: Engine, settings: Settings, broker_url: str) -> None:
    """Breaks if `status` says that no worker fetches while a worker's requests to Junction fail."""
    settings = replace(settings, broker_url=broker_url)
    down = Provider(lambda _request: httpx.Response(502))
    fetcher = down.fetcher(full, settings)
    with (
        full.begin() as connection
    ):  # a second backfill, which no worker has tried: there are more than workers can try
        copy = "INSERT INTO headrace.backfills (aggregator, user_id, provider, resource, item, requested_by, due_at)"
        values = "('junction', 'u9', 'oura', 'sleep', '', 'notice', now() - interval '1 hour')"
        connection.execute(text(f"{copy} VALUES {values}"))
    assert status_view.read(full, IDLE, []).idle == 1
    for _ in range(3):
        make_due(full)
        with full.begin() as connection:
            connection.execute(
                text("UPDATE headrace.backfills SET due_at = now() - interval '1 hour' WHERE user_id = 'u9'")
            )
        for one in due(full, user_id="u1"):
            fetcher.run(one)
    picture = status_view.read(full, IDLE, pauses(settings), failures(settings))
    (fault,) = [one["what"] for one in picture.plain()["faults"] if "dead letters" not in one["what"]]
    assert fault == "Junction does not answer: status 502, 3 times in a row"
    with full.begin() as connection:  # the worker ends
        connection.execute(text("UPDATE headrace.backfills SET due_at = now() - interval '1 hour'"))
    assert status_view.read(full, IDLE, []).idle == 2


def test_an_unknown_number_of_unacknowledged_messages_is_shown_as_unknown() -> None:
    """Breaks if `status` says 0 on a RabbitMQ without its management API."""
    status = status_view.Status(lanes=[Lane("live", 3, None, unacked=None)])
    assert re.search(r"live[ │]+3[ │]+-[ │]+-[ │]+-", shown(status))
    assert status.plain()["lanes"][0]["unacked"] is None
