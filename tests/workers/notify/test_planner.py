"""The planner: which changes become which notifications, and that none is lost or planned twice."""

import json
from datetime import UTC, datetime, timedelta
from threading import Thread
from typing import Any

import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import apply, delivery, heartrate, rows, until, workout
from tests.support.database import run
from tests.support.receivers import change, commit, subscribe
from workers.notify import planner
from workers.notify.planner import coalesce, matches, plan, plan_since, type_of
from workers.notify.signing import body_of
from workers.operate.erase import Eraser
from workers.store import notifications, subscriptions
from workers.store.engine import transaction
from workers.store.erase import create_tombstone
from workers.store.feed import Sequencer
from workers.store.planning import MAX_IDS, FeedChange, Planned
from workers.store.user_merges import merge_user

AT = datetime(2026, 3, 14, 6, 30, tzinfo=UTC)
ANY = Planned(1, ["*"], 60, 0)
URL = "https://app.test/hook"
FOUND = """
SELECT s.name, n.type, n.user_id, n.ids, n.row_count, n.last_position FROM headrace.notifications n
JOIN headrace.subscriptions s ON s.id = n.subscription_id ORDER BY n.first_position, s.name, n.type"""


def read(position: int, record_id: str | None = "w1", **more: Any) -> FeedChange:
    """A change as the planner reads it."""
    values = {"op": "put", "user_id": "u1", "client_user_id": None, "resource": "workouts", "provider": "garmin"}
    values |= {"ts_min": None, "ts_max": None, "row_count": 1, "changed_at": AT + timedelta(seconds=position)}
    return FeedChange(position=position, record_id=record_id, **values | more)


def plan_all(engine: Engine) -> None:
    while plan(engine):
        pass


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "workouts.changed"),
        ({"op": "remove"}, "workouts.changed"),
        ({"resource": "daily"}, "daily.changed"),
        ({"resource": "history"}, "history.completed"),
        ({"resource": "connections"}, "connection.changed"),
        ({"op": "erase", "resource": None}, "user.erased"),
    ],
)
def test_the_type_of_a_change(given: dict[str, Any], expected: str) -> None:
    """Breaks if a change is announced under a type that the contract does not name."""
    assert type_of(read(1, **given)) == expected
    assert expected in planner.event_types()


def test_a_glob_selects_types() -> None:
    """Breaks if a subscriber gets types that it did not ask for."""
    assert matches(["user.*", "workouts.*"], "workouts.changed")
    assert not matches(["workouts.*"], "workout_stream.changed")
    assert not matches([], "workouts.changed")


def test_changes_of_one_person_and_resource_become_one_notification() -> None:
    """Breaks if changes are announced one by one, or those of two people or resources are mixed."""
    changes = [
        read(1, "w1"),
        read(2, "w2", client_user_id="member-1"),
        read(3, "w1"),
        read(4, "w3", user_id="u2"),
        read(5, "w4", provider="oura"),
        read(6, None, resource="heartrate", ts_min=AT, ts_max=AT + timedelta(hours=1), row_count=60),
        read(7, None, resource="heartrate", ts_min=AT - timedelta(hours=1), ts_max=AT, row_count=60),
    ]
    found = coalesce(changes, [ANY])
    assert [(one.user_id, one.resource, one.provider, one.ids, one.row_count, one.last_position) for one in found] == [
        ("u1", "workouts", "", ["w1", "w2", "w4"], 4, 5),
        ("u2", "workouts", "garmin", ["w3"], 1, 4),
        ("u1", "heartrate", "garmin", [], 120, 7),
    ]
    assert (found[0].due_at, found[0].changed_at) == (AT + timedelta(seconds=61), AT + timedelta(seconds=5))
    assert found[0].client_user_id == "member-1"
    assert (found[2].ts_min, found[2].ts_max) == (AT - timedelta(hours=1), AT + timedelta(hours=1))


def test_ids_are_limited_and_rows_are_counted() -> None:
    """Breaks if a large backfill makes a notification of megabytes."""
    (found,) = coalesce((read(number, f"w{number}") for number in range(MAX_IDS + 500)), [ANY])
    assert (len(found.ids), found.row_count) == (MAX_IDS, MAX_IDS + 500)


def test_a_pending_notification_is_extended_until_its_first_attempt(engine: Engine, settings: Settings) -> None:
    """Breaks if pages of changes are not coalesced, or a change alters a body that was posted already."""
    subscribe(engine, URL, window=60)
    for number in range(3):
        commit(engine, change(f"w{number}"))
        plan_all(engine)
    (first,) = rows(engine, FOUND)
    assert (first["ids"], first["row_count"], first["last_position"]) == (["w0", "w1", "w2"], 3, 3)
    run(engine, "UPDATE headrace.notifications SET due_at = now()")
    (one,) = notifications.start(engine, rows(engine, "SELECT id FROM headrace.subscriptions")[0]["id"], 4)
    commit(engine, change("w3"))
    plan_all(engine)
    found = {tuple(row["ids"]) for row in rows(engine, FOUND)}
    assert found == {("w0", "w1", "w2"), ("w3",)}
    assert json.loads(body_of(one))["data"]["ids"] == ["w0", "w1", "w2"]


def test_a_change_of_another_provider_joins(engine: Engine, settings: Settings) -> None:
    """Breaks if a person with two devices causes two notifications per resource, or if one of them names one device."""
    subscribe(engine, URL, window=60)
    for provider, expected in (("garmin", "garmin"), ("garmin", "garmin"), ("oura", ""), ("oura", "")):
        commit(engine, change("w1", provider=provider))
        plan_all(engine)
        assert rows(engine, "SELECT provider FROM headrace.notifications") == [{"provider": expected}]
    run(engine, "UPDATE headrace.notifications SET due_at = now()")
    (one,) = notifications.start(engine, rows(engine, "SELECT id FROM headrace.subscriptions")[0]["id"], 4)
    assert json.loads(body_of(one))["data"] | {"rows": 4, "provider": None} == json.loads(body_of(one))["data"]


def test_a_change_that_joins_gets_the_whole_time_of_retries(engine: Engine, settings: Settings) -> None:
    """Breaks if a change that joins a notification of three days ago is given up with it."""
    subscribe(engine, URL, window=60)
    commit(engine, change("w1"))
    plan_all(engine)
    run(
        engine,
        "UPDATE headrace.notifications SET due_at = now() - interval '3 days', expires_at = now() + interval '1 min'",
    )
    commit(engine, change("w2"))
    plan_all(engine)
    left = (
        "SELECT due_at < now() AS is_due, expires_at > now() + interval '3 days' AS lasts FROM headrace.notifications"
    )
    assert rows(engine, left) == [{"is_due": True, "lasts": True}]


def test_a_refused_change_is_stepped_over(engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a change that cannot be planned holds up all later ones, or is left out silently.

    The time of the change is after the last year of Python, so that no page with it can be read.
    """
    monkeypatch.setattr(planner, "PAGE_CHANGES", 8)
    subscribe(engine, URL)
    commit(engine, *(change(f"w{number}", f"u{number}") for number in range(20)))
    run(engine, "UPDATE headrace.changes SET ts_max = '20000-01-01' WHERE record_id = 'w5'")
    plan_all(engine)
    assert [row["user_id"] for row in rows(engine, FOUND)] == [f"u{number}" for number in range(20) if number != 5]
    (found,) = rows(engine, "SELECT reason FROM headrace.subscriptions")
    assert found["reason"] == (
        "the change at position 6 could not be planned and was left out: PostgreSQL refuses it: DataError"
    )


def test_each_subscription_reads_every_change_once(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a page boundary, a pause or a later subscriber loses a change or repeats one."""
    monkeypatch.setattr(planner, "PAGE_CHANGES", 3)
    subscribe(engine, URL, "a")
    commit(engine, *(change(f"w{number}", f"u{number}") for number in range(5)))
    subscribe(engine, URL, "b")
    with transaction(engine) as connection:
        subscriptions.pause(connection, "a", "for the test")
    commit(engine, *(change(f"w{number}", f"u{number}") for number in range(5, 12)))
    plan_all(engine)
    with transaction(engine) as connection:
        subscriptions.resume(connection, "a", 3)
    commit(engine, change("w12", "u12"))
    plan_all(engine)
    plan_all(engine)
    found = [(row["name"], row["user_id"]) for row in rows(engine, FOUND)]
    expected = [("a", f"u{number}") for number in range(13)] + [("b", f"u{number}") for number in range(5, 13)]
    assert sorted(found) == sorted(expected)
    assert {row["row_count"] for row in rows(engine, FOUND)} == {1}


def test_older_changes_are_planned_on_request_only(engine: Engine, settings: Settings) -> None:
    """Breaks if a new subscription gets old changes by itself, or a repeated request plans them twice."""
    commit(engine, change("w1"), change("w2", "u2"))
    subscribe(engine, URL)
    plan_all(engine)
    assert rows(engine, FOUND) == []
    long_ago = datetime(2026, 1, 1, tzinfo=UTC)
    for expected in (2, 0):
        (start,) = rows(engine, "SELECT start_position FROM headrace.subscriptions")
        assert plan_since(engine, "app", long_ago, start["start_position"]) == expected
    assert [row["user_id"] for row in rows(engine, FOUND)] == ["u1", "u2"]


def test_dropped_changes_are_reported(engine: Engine, settings: Settings) -> None:
    """Breaks if a subscription that was paused for longer than the feed is kept misses changes silently."""
    subscribe(engine, URL)
    commit(engine, change("w1"), change("w2"))
    run(engine, "DELETE FROM headrace.changes WHERE position = 1", "UPDATE headrace.feed SET dropped = 1")
    plan_all(engine)
    (found,) = rows(engine, "SELECT reason FROM headrace.subscriptions")
    assert found["reason"] == "changes up to position 1 were dropped from the feed before they were read"


def test_a_body_contains_no_value(engine: Engine, settings: Settings) -> None:
    """Breaks if a notification of stored data contains a part of it beyond ids, times and counts."""
    subscribe(engine, URL)
    values = {minute: 71.25 + minute for minute in range(10)}
    found = apply(engine, settings, delivery(workout("u1", distance=8123.5)), delivery(heartrate("u1", values)))
    assert found == {"applied": 2}
    Sequencer(engine).run(everything=True)
    plan_all(engine)
    run(engine, "UPDATE headrace.notifications SET due_at = now()")
    (one,) = rows(engine, "SELECT id FROM headrace.subscriptions")
    bodies = [body_of(row).decode() for row in notifications.start(engine, one["id"], 100)]
    kinds = {json.loads(body)["type"] for body in bodies}
    assert kinds >= {"workouts.changed", "heartrate.changed"}
    for body in bodies:
        assert sorted(json.loads(body)["data"]) == sorted(
            ("user_id", "client_user_id", "resource", "provider", "ids", "from", "to", "rows", "position")
        )
        assert not any(text in body for text in ("8123", "71.25", "Running", "average_hr", "bpm"))


def test_an_erasure_removes_pending_notifications_and_announces_itself(engine: Engine, settings: Settings) -> None:
    """Breaks if ids of an erased person are still sent, or the subscriber does not learn of the erasure."""
    subscribe(engine, URL)
    apply(engine, settings, delivery(workout("u1")), delivery(workout("u2", "w2")))
    Sequencer(engine).run(everything=True)
    plan_all(engine)
    assert {row["user_id"] for row in rows(engine, FOUND)} == {"u1", "u2"}
    receipt = Eraser(engine, settings).erase("u1", lambda _: None)
    assert receipt.removed["notifications"] >= 1
    Sequencer(engine).run(everything=True)
    plan_all(engine)
    Eraser(engine, settings).erase("u1", lambda _: None)  # again: the notification of the erasure stays
    plan_all(engine)
    assert [row["type"] for row in rows(engine, FOUND) if row["user_id"] == "u1"] == ["user.erased"]
    assert "u2" in {row["user_id"] for row in rows(engine, FOUND)}


def test_an_erasure_is_sent_for_former_ids(engine: Engine, settings: Settings) -> None:
    """Breaks if a subscriber that knows a person by a former id does not learn of the erasure."""
    apply(engine, settings, delivery(workout("old")))
    with transaction(engine) as connection:
        assert merge_user(connection, "old", "new")
    Sequencer(engine).run(everything=True)
    subscribe(engine, URL)
    Eraser(engine, settings).erase("new", lambda _: None)
    Sequencer(engine).run(everything=True)
    plan_all(engine)
    assert [(row["type"], row["user_id"]) for row in rows(engine, FOUND)] == [
        ("user.erased", "new"),
        ("user.erased", "old"),
    ]


def test_changes_of_a_person_who_is_being_erased_are_not_planned(engine: Engine, settings: Settings) -> None:
    """Breaks if the planner reads changes that an erasure has not deleted yet."""
    subscribe(engine, URL)
    apply(engine, settings, delivery(workout("u1")), delivery(workout("u2", "w2")))
    Sequencer(engine).run(everything=True)
    create_tombstone(engine, "u1")
    plan_all(engine)
    assert {row["user_id"] for row in rows(engine, FOUND)} == {"u2"}


def test_an_erasure_waits_for_a_planner(engine: Engine, settings: Settings) -> None:
    """Breaks if a planner that read a person's changes before the erasure leaves notifications of them."""
    subscribe(engine, URL)
    apply(engine, settings, delivery(workout("u1")))
    Sequencer(engine).run(everything=True)
    real, erased = planner.planning.save, []

    def save(*given: Any) -> None:
        """At this moment the person is not erased; the erasure begins now."""
        thread = Thread(target=lambda: erased.append(Eraser(engine, settings).erase("u1", lambda _: None)))
        thread.start()
        threads.append(thread)
        until(lambda: rows(engine, "SELECT 1 FROM headrace.users WHERE erased_at IS NOT NULL"), 10)
        thread.join(1)  # it does not end before this transaction
        real(*given)

    threads: list[Thread] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner.planning, "save", save)
        plan(engine)
    threads[0].join(20)
    assert erased
    assert [row["type"] for row in rows(engine, FOUND)] == []
