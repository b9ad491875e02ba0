"""Days follow the stored rows: whatever changes, in whatever order, they end as a rebuild computes them."""

import random
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy import event as events

from app.catalogue import catalogue
from app.config.settings import Settings
from app.errors import TryLater, Unprocessable
from app.observability.metrics import exposition
from tests.support import apply, delivery, event, rows, workout
from tests.support.database import run
from workers.daily import priorities, queue
from workers.daily.derive import MAX_DATES, SAMPLE_DATES, Deriver
from workers.daily.follow import follow, is_due
from workers.operate.erase import Eraser
from workers.store import retention, retractions
from workers.store.engine import make_writer, transaction
from workers.store.feed import Sequencer
from workers.store.user_merges import merge_user

Derive = Callable[[], None]
Given = tuple[datetime, int, float, int | None]  # the start, minutes, value and offset of a sample
DAYS = "SELECT * FROM health.daily ORDER BY client_user_id, user_id, metric, local_date"
SESSIONS = "SELECT * FROM headrace.kept_sessions ORDER BY user_id, resource, id"
VALUES = "SELECT metric, local_date, value FROM health.daily ORDER BY metric, local_date"
NOON = datetime(2026, 3, 14, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


def samples(
    user: str, resource: str, given: list[tuple[datetime, int, float, int | None]], **more: Any
) -> dict[str, Any]:
    """An event of samples of garmin/watch, unless `more` names another source; `client` is the client_user_id."""
    client, source = more.pop("client", "member-1"), {"provider": "garmin", "type": "watch"} | more
    data = [
        {"timestamp": at.isoformat(), "value": value, "unit": "count", "timezone_offset": offset}
        | ({"start": at.isoformat(), "end": (at + timedelta(minutes=minutes)).isoformat()} if minutes else {})
        for at, minutes, value, offset in given
    ]
    return event(f"daily.data.{resource}.created", user, {"source": source, "data": data}, client)


def activity(user: str, day: str, steps: int, **source: str) -> dict[str, Any]:
    data = {"id": f"a-{day}-{source.get('provider', 'garmin')}", "user_id": user, "date": f"{day}T00:00:00+00:00"}
    data |= {"calendar_date": day, "steps": steps, "source": {"provider": "garmin", "type": "watch"} | source}
    return event("daily.data.activity.created", user, data)


def days(engine: Engine, metric: str = "steps") -> dict[str, float]:
    return {row["local_date"].isoformat(): row["value"] for row in rows(engine, VALUES) if row["metric"] == metric}


def store(engine: Engine, settings: Settings, *events: dict[str, Any], at: datetime | None = None) -> None:
    apply(engine, settings, *(delivery(one, at or datetime.now(UTC)) for one in events))


def test_a_change_computes_its_day_once_and_announces_it(engine: Engine, settings: Settings, derive: Derive) -> None:
    """Breaks if a day is not updated, unchanged days are written, or the announcement starts a loop."""
    store(engine, settings, samples("u1", "steps", [(NOON, 60, 500, 3600), (NOON + 11 * HOUR, 120, 60, 3600)]))
    derive()
    assert days(engine) == {"2026-03-14": 500, "2026-03-15": 60}
    (row,) = [one for one in rows(engine, DAYS) if one["local_date"] == date(2026, 3, 14)]
    assert row | {"computed_at": 0} == {
        "client_user_id": "member-1",
        "user_id": "u1",
        "local_date": date(2026, 3, 14),
        "metric": "steps",
        "value": 500,
        "unit": "count",
        "provider": "garmin",
        "source_type": "watch",
        "sources": 1,
        "covered_minutes": 60,
        "summary_value": None,
        "method": "samples",
        "zone_source": "sample",
        "computed_at": 0,
    }
    first = rows(engine, DAYS)
    store(engine, settings, samples("u1", "steps", [(NOON + 9 * HOUR, 60, 100, 3600)]))
    derive()
    derive()
    assert days(engine) == {"2026-03-14": 600, "2026-03-15": 60}
    assert [row for row in rows(engine, DAYS) if row in first] == [first[1]]
    first_day, second_day = (datetime(2026, 3, day, tzinfo=UTC) for day in (14, 15))
    assert announced(engine) == [
        ("put", "u1", "member-1", 2, first_day, second_day),
        ("put", "u1", "member-1", 1, first_day, first_day),
    ]


def computed() -> float:
    """The number of days that this process has computed."""
    (line,) = (one for one in exposition().decode().splitlines() if one.startswith("headrace_days_computed_total "))
    return float(line.split()[1])


def test_computed_days_are_counted(engine: Engine, settings: Settings, derive: Derive) -> None:
    """Breaks if the counter counts rows of the queue, values, or days that were not committed."""
    derive()
    before = computed()
    given = [(NOON, 60, 500, 0), (NOON + 24 * HOUR, 60, 60, 0)]
    store(engine, settings, samples("u1", "steps", given), samples("u1", "distance", given[:1]))
    derive()
    assert computed() - before == 3
    derive()
    assert computed() - before == 3


def test_a_record_that_moves_or_is_retracted_leaves_its_day(engine: Engine, settings: Settings, derive: Derive) -> None:
    """Breaks if the day on which a workout stood before it was corrected or hidden keeps its value."""
    store(engine, settings, workout("u1", "w1"), workout("u1", "w2", time_start="2026-03-20T06:30:00+00:00"))
    derive()
    assert days(engine, "workouts_count") == {"2026-03-14": 1, "2026-03-20": 1}
    moved = {"time_start": "2026-04-14T06:30:00+00:00", "time_end": "2026-04-14T07:30:00+00:00"}
    store(engine, settings, workout("u1", "w1", **moved, updated_at="2026-05-01T00:00:00+00:00"))
    with transaction(engine) as connection:
        retractions.retract(connection, catalogue()["workouts"], "u1", "w2")
    derive()
    assert days(engine, "workouts_count") == {"2026-04-14": 1}
    assert days(engine, "workouts_duration") == {"2026-04-14": 3600}
    assert [row["id"] for row in rows(engine, "SELECT id FROM health.best_workouts")] == ["w1"]


def test_two_connections_of_one_person_are_compared(engine: Engine, settings: Settings, derive: Derive) -> None:
    """Breaks if what two connections deliver counts twice, or the erasure of one removes the other."""
    for user in ("u1", "u2"):
        store(engine, settings, samples(user, "steps", [(NOON, 60, 500, 0)]), workout(user, f"w-{user}"))
    store(engine, settings, samples("u2", "steps", [(NOON + HOUR, 60, 70, 0)]))
    derive()
    assert days(engine) == {"2026-03-14": 570}
    assert days(engine, "workouts_count") == {"2026-03-14": 1}
    (best,) = rows(engine, "SELECT client_user_id, id, also FROM health.best_workouts")
    assert best == {"client_user_id": "member-1", "id": "w-u1", "also": ["w-u2"]}
    assert {row["user_id"] for row in rows(engine, DAYS)} == {None}
    Eraser(engine, settings).erase("u1", lambda _: None)
    assert rows(engine, DAYS) == []
    derive()
    assert days(engine) == {"2026-03-14": 570}
    assert {row["user_id"] for row in rows(engine, DAYS)} == {"u2"}
    assert [row["id"] for row in rows(engine, "SELECT id FROM health.best_workouts")] == ["w-u2"]


def test_an_erasure_removes_everything_of_the_last_user_of_a_person(
    engine: Engine, settings: Settings, derive: Derive
) -> None:
    """Breaks if days, sessions, priorities, the zone or queued dates of an erased person stay."""
    store(engine, settings, samples("u1", "steps", [(NOON, 60, 500, 0)]), workout("u1"))
    derive()
    with transaction(engine) as connection:
        priorities.set_list(connection, "member-1", "*", ["oura/ring"])
        priorities.set_zone(connection, "member-1", "Europe/Paris")
    Eraser(engine, settings).erase("u1", lambda _: None)
    for table in ("days", "kept_sessions", "daily_records", "daily_people", "daily_priorities", "daily_zones"):
        assert rows(engine, f"SELECT * FROM headrace.{table}") == [], table
    derive()
    assert rows(engine, DAYS) == rows(engine, "SELECT * FROM headrace.daily_queue") == []


def test_a_user_who_is_named_or_reconnects_takes_the_days_along(
    engine: Engine, settings: Settings, derive: Derive
) -> None:
    """Breaks if a day stays with a former name or user_id, exists twice, or moves without a change in the feed."""
    store(
        engine,
        settings,
        samples("u1", "steps", [(NOON, 60, 500, 0)], client=None),
        workout("u1") | {"client_user_id": None},
    )
    derive()
    assert {(row["client_user_id"], row["user_id"]) for row in rows(engine, DAYS)} == {(None, "u1")}
    seen = len(announced(engine))
    store(engine, settings, event("provider.connection.created", "u1", {"provider": {"slug": "garmin"}}, "member-1"))
    run(engine, "UPDATE headrace.daily_feed SET people_checked_at = now() - interval '1 day'")
    derive()
    assert {(row["client_user_id"], row["user_id"]) for row in rows(engine, DAYS)} == {("member-1", "u1")}
    day = datetime(2026, 3, 14, tzinfo=UTC)
    moved = [("remove", "u1", "member-1", 4, day, day), ("put", "u1", "member-1", 4, day, day)]
    assert announced(engine)[seen:] == moved
    store(engine, settings, samples("u1", "steps", [(NOON + HOUR, 60, 5, 0)]))
    derive()
    assert days(engine) == {"2026-03-14": 505}
    seen = len(announced(engine))
    with transaction(engine) as connection:
        merge_user(connection, "u1", "u9")
    derive()
    assert days(engine) == {"2026-03-14": 505}
    assert {(row["client_user_id"], row["user_id"]) for row in rows(engine, DAYS)} == {("member-1", "u9")}
    assert [row["user_id"] for row in rows(engine, SESSIONS)] == ["u9"]
    moved = [("remove", "u1", "member-1", 4, day, day), ("put", "u9", "member-1", 4, day, day)]
    assert announced(engine)[seen:] == moved


def announced(engine: Engine) -> list[tuple[Any, ...]]:
    """The changes of days, after numbering them."""
    Sequencer(engine).run(everything=True)
    query = "SELECT op, user_id, client_user_id, rows, ts_min, ts_max FROM health.changes WHERE resource = 'daily'"
    return [tuple(row.values()) for row in rows(engine, f"{query} ORDER BY position")]


def test_days_of_a_name_that_no_user_has_are_removed_and_announced(
    engine: Engine, settings: Settings, deriver: Deriver, derive: Derive
) -> None:
    """Breaks if days that were written while their user was renamed vanish without a change in the feed."""
    store(engine, settings, samples("u1", "steps", [(NOON, 60, 500, 0)]))
    derive()
    run(engine, "UPDATE headrace.days SET person = 'former'")
    seen = len(announced(engine))
    deriver.rebuild(None, lambda *_: None)
    assert {row["client_user_id"] for row in rows(engine, DAYS)} == {"member-1"}
    assert sorted(row[:4] for row in announced(engine)[seen:]) == [
        ("put", "u1", "member-1", 1),
        ("remove", "u1", "member-1", 1),
    ]


def test_a_renamed_person_keeps_expired_days_priorities_and_the_zone(
    engine: Engine, settings: Settings, derive: Derive
) -> None:
    """Breaks if the name is changed, of both users of a person, and what is stored for the former name stays there.

    No erasure would find it, and the person's list would no longer apply.
    """
    watch, ring = {"provider": "garmin", "type": "watch"}, {"provider": "oura", "type": "ring"}
    given = [(NOON, 60, 500.0, 0)]
    store(engine, settings, *(samples(user, "steps", given, client="a", **watch) for user in ("u1", "u2")))
    store(engine, settings, samples("u1", "steps", [(NOON, 60, 400, 0)], client="a", **ring))
    with transaction(engine) as connection:
        priorities.set_list(connection, "a", "steps", ["oura/ring"])
        priorities.set_list(connection, "a", "*", ["garmin/*"])
        priorities.set_list(connection, "b", "*", ["oura/*"])
        priorities.set_zone(connection, "a", "Europe/Paris")
    derive()
    before = rows(engine, DAYS)
    assert [(row["user_id"], row["value"]) for row in before] == [(None, 400)]
    limits = retention.limits(replace(settings, retention=(("steps", 1),)), NOON + 72 * HOUR)
    for _ in retention.remove(engine, limits):
        derive()
    store(engine, settings, *(samples(user, "heartrate", [(NOON, 0, 60, 0)], client="b") for user in ("u1", "u2")))
    derive()
    renamed = [row for row in rows(engine, DAYS) if row["metric"] == "steps"]
    assert renamed == [row | {"client_user_id": "b"} for row in before]
    lists = {(row["person"], row["resource"]): row["sources"] for row in stored_lists(engine)}
    assert lists == {("b", "steps"): ["oura/ring"], ("b", "*"): ["oura/*"]}
    assert [row["person"] for row in rows(engine, "SELECT person FROM headrace.daily_zones")] == ["b"]


def stored_lists(engine: Engine) -> list[dict[str, Any]]:
    return rows(engine, "SELECT person, resource, sources FROM headrace.daily_priorities")


def two_users_with_a_list(engine: Engine, settings: Settings, derive: Derive) -> None:
    """Two users of the person `a`, who has a list of priorities."""
    store(engine, settings, *(samples(user, "steps", [(NOON, 60, 500, 0)], client="a") for user in ("u1", "u2")))
    derive()
    with transaction(engine) as connection:
        priorities.set_list(connection, "a", "steps", ["oura/ring"])


def test_the_name_that_a_user_leaves_keeps_its_priorities_for_the_others(
    engine: Engine, settings: Settings, derive: Derive
) -> None:
    """Breaks if the list of a person follows one of two users who is renamed."""
    two_users_with_a_list(engine, settings, derive)
    store(engine, settings, samples("u1", "steps", [(NOON + HOUR, 60, 5, 0)], client="b"))
    derive()
    assert [row["person"] for row in stored_lists(engine)] == ["a"]
    found = {(row["client_user_id"], row["user_id"], row["value"]) for row in rows(engine, DAYS)}
    assert found == {("a", "u2", 500), ("b", "u1", 505)}


def test_an_erasure_reaches_a_former_name_whose_days_have_not_moved_yet(
    engine: Engine, settings: Settings, derive: Derive
) -> None:
    """Breaks if priorities, the zone or days of the former name stay when the person is erased after a change of it."""
    two_users_with_a_list(engine, settings, derive)
    with transaction(engine) as connection:
        priorities.set_zone(connection, "a", "Europe/Paris")
    run(engine, "UPDATE headrace.users SET client_user_id = 'b'")
    Eraser(engine, settings).erase("u1", lambda _: None)
    for table in ("days", "daily_priorities", "daily_zones"):
        assert rows(engine, f"SELECT * FROM headrace.{table}") == [], table


@pytest.mark.parametrize(
    ("names", "change"),
    [(("a", "a"), "client_user_id = 'b'"), (("u2", None), "client_user_id = 'u2'"), ((None, "u1"), "named_at = now()")],
    ids=["renamed", "named as another user's id", "another user is named as the id"],
)
def test_an_erasure_computes_the_days_of_others_of_a_name_again(
    engine: Engine, settings: Settings, derive: Derive, names: tuple[str | None, str | None], change: str
) -> None:
    """Breaks if others of the person's present or former name, or of a name that is a user_id, lose their days."""
    for user, client in zip(("u1", "u2"), names, strict=True):
        store(engine, settings, samples(user, "steps", [(NOON, 60, 500, 0)], client=client))
    derive()
    assert {row["user_id"] for row in rows(engine, DAYS)} == {None}
    run(engine, f"UPDATE headrace.users SET {change} WHERE user_id = 'u1'")
    Eraser(engine, settings).erase("u1", lambda _: None)
    derive()
    assert [(row["user_id"], row["value"]) for row in rows(engine, DAYS)] == [("u2", 500)]


def test_days_outlive_their_samples(engine: Engine, settings: Settings, deriver: Deriver, derive: Derive) -> None:
    """Breaks if a rebuild, or a late sample, removes or shrinks a day whose samples have expired."""
    old = NOON - timedelta(days=40)
    store(engine, settings, samples("u1", "steps", [(old, 60, 500, 0), (old + HOUR, 60, 70, 0), (NOON, 60, 9, 0)]))
    store(engine, settings, workout("u1"))
    derive()
    before = rows(engine, DAYS)
    limits = retention.limits(replace(settings, retention=(("steps", 30), ("workouts", 1))), NOON + 20 * HOUR)
    for _ in retention.remove(engine, limits | {"steps": old + timedelta(minutes=30)}):
        derive()
    assert len(rows(engine, "SELECT ts FROM health.steps")) == 2
    deriver.rebuild(None, lambda *_: None)
    assert rows(engine, DAYS) == before
    for _ in retention.remove(engine, limits):
        derive()
    store(engine, settings, samples("u1", "steps", [(old + 2 * HOUR, 60, 1, 0), (NOON + HOUR, 60, 1, 0)]))
    derive()
    deriver.rebuild(None, lambda *_: None)
    assert days(engine) == {old.date().isoformat(): 570, "2026-03-14": 10}


def test_days_have_a_limit_of_their_own(engine: Engine, settings: Settings, derive: Derive) -> None:
    """Breaks if HEADRACE_RETENTION cannot keep days longer than samples, or cannot remove them."""
    store(engine, settings, samples("u1", "steps", [(NOON, 60, 500, 0), (NOON + 48 * HOUR, 60, 7, 0)]), workout("u1"))
    derive()
    limits = retention.limits(replace(settings, retention=(("*", 30), ("daily", 1))), NOON + 61 * HOUR)
    assert retention.count(engine, {"daily": limits["daily"]}) == {"daily": 4}
    assert list(retention.remove(engine, {"daily": limits["daily"]})) == [("daily", 4)]
    assert days(engine) == {"2026-03-16": 7}
    assert rows(engine, SESSIONS) == []
    Sequencer(engine).run()
    (change,) = rows(engine, "SELECT op, user_id, rows FROM health.changes WHERE resource = 'daily' AND op = 'remove'")
    assert change == {"op": "remove", "user_id": "u1", "rows": 4}


def test_priorities_decide_and_their_change_computes_days_again(
    engine: Engine, settings: Settings, derive: Derive
) -> None:
    """Breaks if a list has no effect on stored days, or its removal does not restore them."""
    watch = samples("u1", "steps", [(NOON, 60, 500, 0)])
    phone = samples("u1", "steps", [(NOON, 60, 400, 0)], provider="apple_health_kit", type="phone")
    store(engine, settings, watch, phone, activity("u1", "2026-03-14", 450, provider="oura", type="ring"))
    derive()
    assert days(engine) == {"2026-03-14": 500}
    for person, resource, sources, expected in (
        ("*", "*", ["apple_health_kit/*"], 400),
        ("member-1", "*", ["*/ring"], 450),
        ("member-1", "steps", ["garmin/watch"], 500),
    ):
        with transaction(engine) as connection:
            assert priorities.set_list(connection, person, resource, sources)
        derive()
        assert days(engine) == {"2026-03-14": expected}
    with transaction(engine) as connection:
        assert priorities.reset(connection, "member-1", None) == ["*", "steps"]
    derive()
    assert days(engine) == {"2026-03-14": 400}


def test_the_offset_of_samples_without_one(engine: Engine, settings: Settings, derive: Derive) -> None:
    """Breaks if the nearest offset, the zone and UTC are not tried in this order, or a new offset moves no old day."""
    late = NOON + 11 * HOUR  # 23:00 UTC
    store(engine, settings, samples("u1", "steps", [(late, 0, 5, None)]))
    derive()
    assert zones(engine) == {("2026-03-14", "utc")}
    with transaction(engine) as connection:
        assert priorities.set_zone(connection, "member-1", "Asia/Kathmandu")
    derive()
    assert zones(engine) == {("2026-03-15", "user")}
    store(engine, settings, samples("u1", "heartrate", [(late - 90 * 24 * HOUR, 0, 60, -36000)]))
    derive()
    assert zones(engine) == {("2026-03-14", "neighbour")}
    store(engine, settings, workout("u1", timezone_offset=7200))
    derive()
    assert zones(engine) == {("2026-03-15", "neighbour")}
    with transaction(engine) as connection:
        retractions.retract(connection, catalogue()["workouts"], "u1", "w1")
    derive()
    assert zones(engine) == {("2026-03-14", "neighbour")}


def zones(engine: Engine) -> set[tuple[str, str]]:
    found = rows(engine, "SELECT local_date, zone_source FROM health.daily WHERE metric = 'steps'")
    return {(row["local_date"].isoformat(), row["zone_source"]) for row in found}


@pytest.mark.parametrize("seed", [1, 2, 3, 16])
def test_every_history_of_changes_ends_as_a_rebuild(
    engine: Engine, settings: Settings, deriver: Deriver, derive: Derive, seed: int
) -> None:
    """Breaks if a change touches a day that is not computed again: the rebuild would then find another value."""
    rng = random.Random(seed)
    for _ in range(12):
        store(engine, settings, *(_random_event(rng) for _ in range(rng.randint(1, 5))))
        if rng.random() < 0.2:
            with transaction(engine) as connection:
                retractions.retract(connection, catalogue()["workouts"], "u1", f"w{rng.randrange(4)}")
        if rng.random() < 0.6:
            derive()
    derive()
    before, sessions = rows(engine, DAYS), rows(engine, SESSIONS)
    assert before
    deriver.rebuild(None, lambda *_: None)
    assert rows(engine, DAYS) == before
    assert rows(engine, SESSIONS) == sessions
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM headrace.days"))
    deriver.rebuild(None, lambda *_: None)
    ignored = {"computed_at": None}
    assert [row | ignored for row in rows(engine, DAYS)] == [row | ignored for row in before]


@pytest.mark.parametrize("seed", range(8))
def test_sessions_around_midnight_end_as_a_rebuild(
    engine: Engine, settings: Settings, deriver: Deriver, derive: Derive, seed: int
) -> None:
    """Breaks if a session that comes, moves or goes leaves the days of sessions that overlap it as they were."""
    rng = random.Random(seed)
    for _ in range(10):
        store(engine, settings, *(_session_at_midnight(rng) for _ in range(rng.randint(1, 3))))
        if rng.random() < 0.3:
            with transaction(engine) as connection:
                kind, name = rng.choice([("workouts", "w"), ("sleep", "s")])
                retractions.retract(connection, catalogue()[kind], "u1", f"{name}{rng.randrange(4)}")
        derive()
        before, sessions = rows(engine, DAYS), rows(engine, SESSIONS)
        deriver.rebuild(None, lambda *_: None)
        assert (rows(engine, SESSIONS), rows(engine, DAYS)) == (sessions, before)


def _session_at_midnight(rng: random.Random) -> dict[str, Any]:
    """A workout or a night of one of two users of a person, some of them long, or a revision of one."""
    user, number = rng.choice(["u1", "u2"]), rng.randrange(4)
    source = rng.choice([{"provider": "oura", "type": "ring"}, {"provider": "apple_health_kit", "type": "phone"}])
    at = NOON + timedelta(hours=12, minutes=30 * rng.randrange(-60, 60))
    end = at + timedelta(minutes=30 * rng.choice([1, 4, 16, 48]))
    version = (datetime(2026, 6, 1, tzinfo=UTC) + timedelta(seconds=rng.randrange(10**6))).isoformat()
    whose = {"source": source, "timezone_offset": rng.choice([-36000, 0, 46800]), "updated_at": version}
    if rng.random() < 0.5:
        return workout(user, f"w{number}", time_start=at.isoformat(), time_end=end.isoformat(), **whose)
    data = {"id": f"s{number}", "user_id": user, "bedtime_start": at.isoformat(), "bedtime_stop": end.isoformat()}
    data |= {"date": at.isoformat(), "calendar_date": at.date().isoformat(), "total": 900, "created_at": version}
    return event("daily.data.sleep.created", user, data | whose)


def _recorded(name: str, provider: str, at: datetime, hours: float) -> dict[str, Any]:
    """A workout of one of three sources: oura is better than garmin, and garmin than polar."""
    source = {"provider": provider, "type": {"oura": "lab", "garmin": "watch", "polar": "phone"}[provider]}
    times = {"time_start": at.isoformat(), "time_end": (at + hours * HOUR).isoformat()}
    return workout("u1", name, source=source, timezone_offset=0, **times)


@pytest.mark.parametrize("direction", [1, -1])
def test_a_session_that_replaces_one_restores_a_third(
    engine: Engine, settings: Settings, derive: Derive, direction: int
) -> None:
    """Breaks if the third session, which overlaps the second but not the first, and is two days away, stays hidden."""
    far, middle = NOON + 48 * direction * HOUR, min(NOON, NOON + 48 * direction * HOUR)
    store(engine, settings, _recorded("second", "garmin", middle, 49), _recorded("third", "polar", far, 1))
    derive()
    assert kept(engine) == {"second"}
    store(engine, settings, _recorded("first", "oura", NOON, 1))
    derive()
    assert kept(engine) == {"first", "third"}


def test_sessions_that_are_joined_by_others_are_compared(
    engine: Engine, settings: Settings, deriver: Deriver, derive: Derive
) -> None:
    """Breaks if a date is computed without a session of an earlier day that decides which sessions are kept on it."""
    first = _recorded("first", "oura", NOON - 34 * HOUR, 2)
    second, third = _recorded("second", "garmin", NOON - 35 * HOUR, 36), _recorded("third", "polar", NOON, 0.5)
    store(engine, settings, first, second, third)
    derive()
    assert kept(engine) == {"first", "third"}
    with transaction(engine) as connection:
        queue.add(connection, [queue.Stretch("member-1", "workouts", NOON.date(), NOON.date(), queue.ORIGIN)])
    assert deriver.step() == 0, "the date was computed from other sessions"
    assert kept(engine) == {"first", "third"}


def kept(engine: Engine) -> set[str]:
    return {row["id"] for row in rows(engine, SESSIONS)}


def test_a_record_touches_its_own_date_only(engine: Engine, settings: Settings, derive: Derive) -> None:
    """Breaks if a workout that overlaps no other, or a summary, computes days that it cannot change."""
    derive()  # the first start queues everything
    late = {"time_start": "2026-03-14T23:30:00+00:00", "time_end": "2026-03-15T00:15:00+00:00"}
    store(engine, settings, workout("u1", **late, timezone_offset=3600), activity("u2", "2026-03-20", 4000))
    Sequencer(engine).run(everything=True)
    while follow(engine):
        pass
    queued = rows(engine, "SELECT DISTINCT resource, dates::text FROM headrace.daily_queue ORDER BY resource")
    found = {row["resource"]: row["dates"] for row in queued}
    assert found["workouts"] == "{[2026-03-15,2026-03-16)}"
    assert found["steps"] == "{[2026-03-20,2026-03-21)}"


def _random_event(rng: random.Random) -> dict[str, Any]:
    """Samples, workouts, nights and summaries of two users of a person, a few of them with an offset, and revisions."""
    user = rng.choice(["u1", "u1", "u2"])
    at = NOON + timedelta(minutes=15 * rng.randrange(4 * 24 * 6))
    offset = rng.choice([None, None, 3600, -36000, 46800])
    source = rng.choice([{}, {"provider": "oura", "type": "ring"}, {"provider": "apple_health_kit", "type": "phone"}])
    version = (datetime(2026, 6, 1, tzinfo=UTC) + timedelta(seconds=rng.randrange(10**6))).isoformat()
    kind = rng.choice(["steps", "steps", "heartrate", "weight", "workouts", "sleep", "activity"])
    if kind in {"steps", "heartrate", "weight"}:
        length = rng.choice([0, 15, 240, 1500]) if kind == "steps" else 0
        return samples(user, kind, [(at, length, rng.randint(1, 99), offset)], **source)
    whose = {
        "source": {"provider": "garmin", "type": "watch"} | source,
        "timezone_offset": offset,
        "updated_at": version,
    }
    end = (at + timedelta(minutes=rng.choice([30, 400]))).isoformat()
    if kind == "workouts":
        return workout(user, f"w{rng.randrange(4)}", time_start=at.isoformat(), time_end=end, **whose)
    if kind == "activity":
        day = at.date().isoformat()
        one = activity(user, day, rng.randint(1, 9999))
        return one | {"data": one["data"] | whose}
    data = {"id": f"s{rng.randrange(4)}", "user_id": user, "bedtime_start": at.isoformat(), "bedtime_stop": end}
    data |= {"date": at.isoformat(), "calendar_date": at.date().isoformat(), "total": 900, "created_at": version}
    return event("daily.data.sleep.created", user, data | whose)


def test_a_long_history_does_not_delay_others(engine: Engine, settings: Settings, deriver: Deriver) -> None:
    """Breaks if the days of a person whose history is computed come before everyone else's."""
    long = [(NOON - timedelta(days=30 * n), 60, 1.0, 0) for n in range(120)]
    store(engine, settings, samples("u1", "steps", long), samples("u2", "steps", [(NOON, 60, 7, 0)], client="member-2"))
    Sequencer(engine).run()
    deriver.run(lambda: False, seconds=0)
    follow(engine)
    deriver.step()
    assert rows(engine, "SELECT value FROM health.daily WHERE client_user_id = 'member-2'") == [{"value": 7}]


@pytest.mark.parametrize("dates", [["2026-03-14"], ["2026-03-14", "2026-03-30"]], ids=["short", "long"])
def test_the_number_of_statements_does_not_depend_on_the_number_of_people(
    engine: Engine, settings: Settings, deriver: Deriver, dates: list[str]
) -> None:
    """Breaks if each person costs statements or a transaction of its own: 500 people took 28 s instead of 8 s."""

    def statements_for(people: range) -> int:
        for person in people:
            for date_ in dates:
                changes = {"time_start": f"{date_}T06:30:00+00:00", "time_end": f"{date_}T07:15:00+00:00"}
                one = workout(f"u{person}", f"w{date_}", **changes, timezone_offset=3600)
                store(engine, settings, one | {"client_user_id": f"member-{person}"})
        Sequencer(engine).run()
        seen: list[str] = []
        note = lambda *given: seen.append(given[2])  # noqa: E731
        events.listen(engine, "before_cursor_execute", note)
        follow(engine)
        assert deriver.step()
        events.remove(engine, "before_cursor_execute", note)
        with transaction(engine) as connection:
            assert queue.count(connection) == 0
        return len(seen)

    assert statements_for(range(8)) == statements_for(range(8, 9))


@pytest.mark.parametrize("year", ["0001", "0002", "0005", "9999"])
def test_records_at_the_ends_of_the_calendar_hold_up_nobody(
    engine: Engine, settings: Settings, derive: Derive, year: str
) -> None:
    """Breaks if one workout of a wrong clock ends every task of the lane with an OverflowError."""
    times = {"time_start": f"{year}-01-01T00:00:00+00:00", "time_end": f"{year}-12-31T23:00:00+00:00"}
    samples_ = samples("u1", "steps", [(datetime(int(year), 1, 1, tzinfo=UTC), 0, 5, 0)])
    store(engine, settings, workout("u1", **times), samples_, workout("u2") | {"client_user_id": "member-2"})
    derive()
    found = rows(
        engine, "SELECT value FROM health.daily WHERE client_user_id = 'member-2' AND metric = 'workouts_count'"
    )
    assert found == [{"value": 1}]


def workouts_of_two(engine: Engine, settings: Settings) -> None:
    store(engine, settings, workout("u1"), workout("u2") | {"client_user_id": "member-2"})


def counts(engine: Engine) -> list[str]:
    """Whose workouts are counted."""
    return [row["user_id"] for row in rows(engine, DAYS) if row["metric"] == "workouts_count"]


def test_a_person_whose_days_cannot_be_computed_holds_up_nobody(
    engine: Engine, settings: Settings, deriver: Deriver, derive: Derive
) -> None:
    """Breaks if an unexpected error ends each task, is not reported, or ends a rebuild before the others are done."""

    def refuse(*given: Any) -> None:
        if "INSERT INTO headrace.days" in given[2] and "u1" in str(given[3]):
            raise ZeroDivisionError(12.5)

    events.listen(engine, "before_cursor_execute", refuse)
    workouts_of_two(engine, settings)
    derive()
    assert counts(engine) == ["u2"]
    with transaction(engine) as connection:
        (failed,) = queue.failed(connection)
    assert (failed.resource, failed.people) == ("workouts", 1)
    assert failed.error.startswith("unexpected ZeroDivisionError at refuse:")
    assert not is_due(engine)
    with pytest.raises(Unprocessable, match="days of 1 people and resources cannot be computed"):
        deriver.rebuild(None, lambda *_: None)
    events.remove(engine, "before_cursor_execute", refuse)
    deriver.rebuild(None, lambda *_: None)
    assert counts(engine) == ["u1", "u2"]
    with transaction(engine) as connection:
        assert queue.failed(connection) == []


def test_a_change_that_cannot_be_followed_holds_up_nobody(engine: Engine, settings: Settings, derive: Derive) -> None:
    """Breaks if the position in the feed stops before a change that cannot be followed, or its days are forgotten."""

    def refuse(*given: Any) -> None:
        if "daily_records" in given[2] and "u1" in str(given[3]) and is_following:
            raise ZeroDivisionError(12.5)

    is_following = True
    events.listen(engine, "before_cursor_execute", refuse)
    workouts_of_two(engine, settings)
    derive()
    with transaction(engine) as connection:
        newest = text("SELECT f.position = feed.newest FROM headrace.daily_feed f, headrace.feed")
        assert connection.scalar(newest)
    assert counts(engine) == ["u2"]
    is_following = False
    with transaction(engine) as connection:
        connection.execute(text("UPDATE headrace.daily_queue SET since = now() - interval '1 h'"))
    derive()
    assert counts(engine) == ["u1", "u2"]
    events.remove(engine, "before_cursor_execute", refuse)


def test_a_date_that_cannot_be_computed_holds_up_no_other_date(
    engine: Engine, settings: Settings, derive: Derive
) -> None:
    """Breaks if a person's new days wait for an old one that fails, or the old ones for a new one."""

    def refuse(*given: Any) -> None:
        if "INSERT INTO headrace.days" in given[2] and '"local_date":"2026-03-15"' in str(given[3]):
            raise ZeroDivisionError(12.5)

    events.listen(engine, "before_cursor_execute", refuse)
    store(engine, settings, samples("u1", "steps", [(NOON + n * 24 * HOUR, 60, 5, 0) for n in range(4)]))
    derive()
    assert list(days(engine)) == ["2026-03-14", "2026-03-16", "2026-03-17"]
    store(engine, settings, samples("u1", "steps", [(NOON + 96 * HOUR, 60, 5, 0)]))
    derive()
    with transaction(engine) as connection:
        connection.execute(text("UPDATE headrace.daily_queue SET since = now() - interval '1 h'"))
    derive()
    assert list(days(engine))[-1] == "2026-03-18"
    events.remove(engine, "before_cursor_execute", refuse)


def test_a_change_that_can_never_be_followed_is_left_out(
    engine: Engine, settings: Settings, deriver: Deriver, derive: Derive
) -> None:
    """Breaks if the feed stands still for everyone because nothing of one person can be queued."""

    def refuse(*given: Any) -> None:
        if "daily_people" in given[2] and "INSERT" in given[2] and "u1" in str(given[3]):
            raise ZeroDivisionError(12.5)

    events.listen(engine, "before_cursor_execute", refuse)
    workouts_of_two(engine, settings)
    derive()
    events.remove(engine, "before_cursor_execute", refuse)
    assert counts(engine) == ["u2"]
    deriver.rebuild(None, lambda *_: None)
    assert counts(engine) == ["u1", "u2"]


def test_a_name_that_changes_during_a_computation_takes_its_days_along(
    engine: Engine, settings: Settings, deriver: Deriver, derive: Derive
) -> None:
    """Breaks if days are written under a name that its user has left, beside those of the new name."""
    store(engine, settings, samples("u1", "steps", [(NOON, 60, 500, 0)]))
    derive()
    store(engine, settings, samples("u1", "steps", [(NOON + HOUR, 60, 5, 0)]))
    Sequencer(engine).run(everything=True)
    other = make_writer(settings, "second")
    with ThreadPoolExecutor(1) as second:
        renamed: list[Future[bool]] = []

        def rename(*given: Any) -> None:
            if "INSERT INTO headrace.days" in given[2] and not renamed:
                store(other, settings, samples("u1", "heartrate", [(NOON, 0, 60, 0)], client="second"))
                Sequencer(other).run(everything=True)
                renamed.append(second.submit(Deriver(other, settings).follow))
                wait(renamed, 0.3)

        events.listen(engine, "before_cursor_execute", rename)
        deriver.run(lambda: False)
        events.remove(engine, "before_cursor_execute", rename)
        renamed[0].result(20)
    derive()
    found = rows(engine, "SELECT DISTINCT client_user_id FROM health.daily")
    assert found == [{"client_user_id": "second"}]
    other.dispose()


def test_an_outage_postpones_nothing(engine: Engine, settings: Settings, deriver: Deriver) -> None:
    """Breaks if a database that shuts down is counted as a failure of the rows at hand."""

    def refuse(*given: Any) -> None:
        if "INSERT INTO headrace.days" in given[2]:
            given[1].execute("SELECT pg_terminate_backend(pg_backend_pid())")

    workouts_of_two(engine, settings)
    Sequencer(engine).run(everything=True)
    events.listen(engine, "before_cursor_execute", refuse)
    with pytest.raises(TryLater):
        deriver.run(lambda: False)
    events.remove(engine, "before_cursor_execute", refuse)
    assert rows(engine, "SELECT max(failures) AS most FROM headrace.daily_queue") == [{"most": 0}]


def test_days_of_huge_numbers_are_computed_from_the_others(engine: Engine, settings: Settings, derive: Derive) -> None:
    """Breaks if samples, summaries or records of a faulty device overflow the sums of a day."""
    second = timedelta(seconds=1)
    rates = [(NOON, 0, 60.0, 0), *((NOON + n * second, 0, 1e308, 0) for n in (1, 2, 3))]
    steps = [(NOON, 60, 1e308, 0), (NOON, 30, 1e308, 0)]
    summary = activity("u1", "2026-03-14", 450, provider="oura", type="ring")
    summary["data"]["distance"] = 1e308
    far = {"distance": 1e308, "calories": 300}
    store(engine, settings, samples("u1", "heartrate", rates), samples("u1", "steps", steps), summary)
    store(engine, settings, workout("u1", "w1", **far), workout("u1", "w2", **far, time_start="2026-03-14T02:00:00Z"))
    derive()
    found = {row["metric"]: row["value"] for row in rows(engine, "SELECT metric, value FROM health.daily")}
    assert {name: found.get(name) for name in ("heartrate_avg", "steps", "workouts_calories")} == {
        "heartrate_avg": 60,
        "steps": 450,
        "workouts_calories": 300,
    }
    assert not {"distance", "workouts_distance"} & found.keys()


def test_a_transaction_reads_a_bounded_number_of_days_of_samples(
    engine: Engine, settings: Settings, derive: Derive
) -> None:
    """Breaks if a worker reads the samples of all people at once that it would compute in one transaction."""
    derive()
    week = [(NOON + day * 24 * HOUR, 60, 500, 0) for day in range(7)]
    store(engine, settings, *(samples(f"u{n}", "steps", week, client=f"member-{n}") for n in range(30)))
    Sequencer(engine).run(everything=True)
    deriver = Deriver(engine, settings)
    deriver.follow()
    counts, before = [], computed()
    while deriver.step() is not None:
        counts.append(computed() - before)
        before = computed()
    assert (sum(counts), max(counts)) == (7 * 30, MAX_DATES // SAMPLE_DATES)


def test_following_delays_neither_the_feed_nor_another_process(
    engine: Engine, settings: Settings, derive: Derive
) -> None:
    """Breaks if the numbering of the feed waits until changes are followed, or two processes follow the same ones."""
    derive()
    store(engine, settings, workout("u1"))
    Sequencer(engine).run(everything=True)
    seen: list[tuple[bool, bool]] = []
    assert not follow(engine, queue_days=lambda *_: seen.append((is_due(engine), follow(engine))))
    assert seen == [(True, False)]


def test_a_task_is_requested_while_there_is_work(engine: Engine, settings: Settings, derive: Derive) -> None:
    """Breaks if the lane is not started for new changes, or gets a message for each of them."""
    derive()
    assert not is_due(engine)
    store(engine, settings, workout("u1"))
    assert not is_due(engine)  # not numbered yet
    Sequencer(engine).run(everything=True)
    assert (is_due(engine), is_due(engine)) == (True, False)
    derive()
    with engine.begin() as connection:
        connection.execute(text("UPDATE headrace.daily_feed SET requested_at = '-infinity'"))
    assert not is_due(engine)
    with transaction(engine) as connection:
        priorities.set_list(connection, "member-1", "*", ["oura/ring"])
    assert is_due(engine)
