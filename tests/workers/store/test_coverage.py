"""Coverage of a history in a real PostgreSQL: windows, days with data, outages."""

from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text

from app.catalogue import catalogue
from app.config.settings import Settings
from tests.support import apply, delivery, event, rows, workout
from tests.support.cases import Failures
from tests.support.database import emptied
from workers.store import coverage
from workers.store.coverage import ResourceKey
from workers.store.engine import transaction
from workers.store.users import erased_users

DAY, HOUR, MICROSECOND = timedelta(days=1), timedelta(hours=1), timedelta(microseconds=1)
FIRST = datetime(2026, 3, 10, tzinfo=UTC)
LAST = FIRST + 9 * DAY
SPAN = (FIRST, LAST)
HEARTRATE, WORKOUTS = ResourceKey("u1", "garmin", "heartrate"), ResourceKey("u1", "garmin", "workouts")
GARMIN = {"provider": "garmin", "type": "watch"}


def execute(engine: Engine, query: str, **parameters: Any) -> None:
    with engine.begin() as connection:
        connection.execute(text(query), parameters)


def samples(
    moments: Iterable[datetime], user: str = "u1", resource: str = "heartrate", **source: Any
) -> dict[str, Any]:
    """An event with a sample at each of these moments."""
    data = [{"timestamp": moment.isoformat(), "value": 60, "unit": "bpm"} for moment in moments]
    return event(f"daily.data.{resource}.created", user, {"source": GARMIN | source, "data": data})


def store(engine: Engine, settings: Settings, *bodies: dict[str, Any]) -> None:
    apply(engine, settings, *map(delivery, bodies))


def days(engine: Engine, *keys: ResourceKey, span: tuple[datetime, datetime] = SPAN) -> dict[ResourceKey, list[int]]:
    """The stored days of each key, counted from FIRST."""
    with transaction(engine) as connection:
        found = coverage.days_stored(connection, dict.fromkeys(keys, span))
    return {key: sorted(one - FIRST.toordinal() for one in some) for key, some in found.items()}


def newest(engine: Engine, *keys: ResourceKey) -> dict[ResourceKey, datetime]:
    with transaction(engine) as connection:
        return dict(coverage.newest_stored(connection, keys))


# Days with data


def test_the_days_of_samples(engine: Engine, settings: Settings) -> None:
    """Breaks if a sample counts for the wrong day, or a sample at the edge of a day or a span for no day."""
    failures = Failures()
    for moments, stored in (
        ([], {}),
        ([FIRST], {HEARTRATE: [0]}),
        ([FIRST - MICROSECOND], {}),
        ([FIRST + DAY - MICROSECOND], {HEARTRATE: [0]}),
        ([FIRST + DAY], {HEARTRATE: [1]}),
        ([LAST + DAY - MICROSECOND], {HEARTRATE: [9]}),  # a span ends with its last day
        ([LAST + DAY], {}),
        ([FIRST + n * HOUR for n in range(49)], {HEARTRATE: [0, 1, 2]}),
        ([FIRST + 3 * DAY + 23 * HOUR, FIRST + 7 * DAY], {HEARTRATE: [3, 7]}),
    ):
        with failures.of(moments, stored), emptied(engine):
            store(engine, settings, samples(moments))
            assert days(engine, HEARTRATE) == stored
            assert days(engine, HEARTRATE, span=(FIRST + 20 * HOUR, LAST + HOUR)) == stored  # days are whole
    assert failures == {}


def test_days_are_in_utc(engine: Engine, settings: Settings) -> None:
    """Breaks if a day follows the time zone of the sample, of the span, or of the session."""
    east = [datetime.fromisoformat("2026-03-12T01:30:00+09:00")]
    store(engine, settings, samples(east))
    assert days(engine, HEARTRATE) == {HEARTRATE: [1]}
    tokyo = datetime.fromisoformat("2026-03-12T08:59:59+09:00")  # 11 March in UTC
    assert days(engine, HEARTRATE, span=(tokyo, tokyo)) == {HEARTRATE: [1]}
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL timezone TO 'Pacific/Auckland'"))
        found = coverage.days_stored(connection, {HEARTRATE: SPAN})
    assert found == {HEARTRATE: {FIRST.toordinal() + 1}}


def test_every_series_of_a_resource_counts(engine: Engine, settings: Settings) -> None:
    """Breaks if data of a second device or source type is left out, or data of another user counts."""
    bodies = [samples([FIRST]), samples([FIRST + DAY], type="phone"), samples([FIRST + 2 * DAY], user="u2")]
    bodies += [samples([FIRST + 3 * DAY], provider="oura"), samples([FIRST + 4 * DAY], resource="steps")]
    store(engine, settings, *bodies)
    keys = [HEARTRATE, HEARTRATE._replace(user_id="u2"), HEARTRATE._replace(provider="oura")]
    keys.append(ResourceKey("u3", "garmin", "hrv"))
    assert days(engine, *keys) == {keys[0]: [0, 1], keys[1]: [2], keys[2]: [3]}
    assert days(engine) == {}


def test_each_key_has_a_span_of_its_own(engine: Engine, settings: Settings) -> None:
    """Breaks if the span of one key is used for another."""
    every = [FIRST + n * DAY for n in range(10)]
    store(engine, settings, samples(every), samples(every, user="u2"), workout("u1", "w1", calendar_date="2026-03-11"))
    other = HEARTRATE._replace(user_id="u2")
    spans = {HEARTRATE: (FIRST, FIRST + DAY), other: (FIRST + 5 * DAY, FIRST + 5 * DAY)}
    spans[WORKOUTS] = (FIRST + 2 * DAY, LAST)
    with transaction(engine) as connection:
        found = coverage.days_stored(connection, spans)
    first = FIRST.toordinal()
    assert found == {HEARTRATE: {first, first + 1}, other: {first + 5}}


def test_the_days_of_records(engine: Engine, settings: Settings) -> None:
    """Breaks if a record counts for the wrong day, or a record without a day fails."""
    failures = Failures()
    for dates, stored in (
        (["2026-03-10"], {WORKOUTS: [0]}),
        (["2026-03-09"], {}),
        (["2026-03-19"], {WORKOUTS: [9]}),
        (["2026-03-20"], {}),
        (["2026-03-12", "2026-03-12", "2026-03-15"], {WORKOUTS: [2, 5]}),
        ([None], {}),
    ):
        with failures.of(dates, stored), emptied(engine):
            store(engine, settings, *(workout("u1", f"w{n}", calendar_date=one) for n, one in enumerate(dates)))
            assert days(engine, WORKOUTS, WORKOUTS._replace(provider="oura"), WORKOUTS._replace(user_id="u2")) == stored
    assert failures == {}


DATED = [resource for resource in catalogue().of_kind("summary") if resource.day_field]
UNDATED = [resource for resource in catalogue().values() if not resource.has_days]


def test_every_kind_of_record_has_its_days(engine: Engine, settings: Settings) -> None:
    """Breaks if the day of a resource is not found, or follows the server's time zone."""
    failures = Failures()
    for resource in DATED:
        with failures.of(resource), emptied(engine):
            given = {field.name: field.type for field in resource.fields}[resource.day_field]
            value = "2026-03-13" if given == "date" else "2026-03-14T01:30:00+02:00"
            record = {"id": "r1", "user_id": "u1", "source": GARMIN, resource.day_field: value}
            store(engine, settings, event(f"daily.data.{resource.name}.created", "u1", record))
            key = ResourceKey("u1", "garmin", resource.name)
            assert days(engine, key) == {key: [3]}
            until = 4 if resource.day_field == "calendar_date" else 5  # a record may end on the next day
            assert newest(engine, key) == {key: FIRST + until * DAY - MICROSECOND}
    assert failures == {}


def test_resources_without_days_have_no_days(engine: Engine, settings: Settings) -> None:
    """Breaks if a profile, a device or a stream fails, or counts for a day."""
    keys = [ResourceKey("u1", "garmin", resource.name) for resource in UNDATED]
    assert {"profile", "workout_stream", "device"} <= {key.resource for key in keys}
    profile = {"id": "p1", "user_id": "u1", "source": GARMIN}
    store(engine, settings, event("daily.data.profile.created", "u1", profile), workout("u1"))
    assert days(engine, *keys) == {}
    assert newest(engine, *keys) == {}
    with transaction(engine) as connection:
        found = {key.resource: coverage.any_stored(connection, key.resource, ["u1", "u2"]) for key in keys}
    assert found.pop("profile") == {ResourceKey("u1", "garmin", "profile")}
    assert set().union(*found.values()) == set()


# The newest


def test_the_newest_of_samples(engine: Engine, settings: Settings) -> None:
    """Breaks if the newest sample is not found across series and years, or is another user's."""
    far = [datetime(2019, 5, 5, tzinfo=UTC), FIRST, FIRST + DAY]
    bodies = [samples(far[:2]), samples([FIRST + HOUR], type="phone"), samples(far, user="u2")]
    store(engine, settings, *bodies, samples([LAST], provider="oura"), samples([LAST], resource="steps"))
    other = HEARTRATE._replace(user_id="u2")
    assert newest(engine, HEARTRATE, other) == {HEARTRATE: FIRST + HOUR, other: far[2]}
    assert newest(engine, ResourceKey("u3", "garmin", "heartrate")) == {}
    assert newest(engine) == {}


def test_the_newest_of_records_is_the_end_of_its_day(engine: Engine, settings: Settings) -> None:
    """Breaks if a record with a calendar date counts as older than its day, or a missing day as newer."""
    dates = ["2026-03-11", "2026-03-15", None, "2026-03-12"]
    bodies = [workout("u1", f"w{n}", calendar_date=one) for n, one in enumerate(dates)]
    store(engine, settings, *bodies, workout("u2", "w9", calendar_date=None))
    assert newest(engine, WORKOUTS, WORKOUTS._replace(user_id="u2")) == {WORKOUTS: FIRST + 6 * DAY - MICROSECOND}


def test_data_of_the_future_is_not_the_newest(engine: Engine, settings: Settings) -> None:
    """Breaks if one record or sample of 2105, from a device with a wrong clock, hides that a month is missing."""
    soon = datetime.now(UTC) + DAY
    bodies = [workout("u1", "w1", calendar_date="2026-03-15"), workout("u1", "w2", calendar_date="2105-01-01")]
    bodies += [workout("u2", "w3", calendar_date=f"{soon:%Y-%m-%d}"), workout("u3", "w4", calendar_date="2105-01-01")]
    store(engine, settings, *bodies, samples([FIRST, LAST]))
    execute(engine, "UPDATE headrace.samples SET ts = '2105-01-01' WHERE ts = :last", last=LAST)
    others = [WORKOUTS._replace(user_id=user) for user in ("u2", "u3")]
    assert newest(engine, HEARTRATE, WORKOUTS, *others) == {
        HEARTRATE: FIRST,
        WORKOUTS: FIRST + 6 * DAY - MICROSECOND,
        others[0]: datetime.combine(soon.date() + DAY, datetime.min.time(), UTC) - MICROSECOND,
    }


# Fetched windows


def backfill(engine: Engine, chunks: Iterable[str] = ("done",), resource: str = "heartrate", **more: Any) -> None:
    """Inserts a backfill with a chunk of a day for each status."""
    given = {"user_id": "u1", "provider": "garmin", "item": "", "by": "notice", "status": "complete"} | more
    finished = LAST if given["status"] in ("complete", "failed", "cancelled") else None
    query = """
        INSERT INTO headrace.backfills
            (aggregator, user_id, provider, resource, item, requested_by, status, finished_at)
        VALUES ('junction', :user_id, :provider, :resource, :item, :by, :status, :finished_at) RETURNING id"""
    with engine.begin() as connection:
        number = connection.scalar(text(query), given | {"resource": resource, "finished_at": finished})
        for n, status in enumerate(chunks):
            window = {"start": FIRST + n * DAY, "end": FIRST + (n + 1) * DAY, "at": FIRST + n * HOUR}
            connection.execute(
                text("""
                INSERT INTO headrace.chunks
                    (backfill_id, message_id, created_at, window_start, window_end, is_final, status)
                VALUES (:id, :name, :at, :start, :end, true, :status)"""),
                window | {"id": number, "name": f"m{n}", "status": status},
            )


def fetched(engine: Engine, *users: str) -> dict[ResourceKey, list[tuple[Any, ...]]]:
    """The windows of these users: day, requester, state, and whether the backfill has ended."""
    with transaction(engine) as connection:
        found = coverage.fetched(connection, users)
    short: dict[ResourceKey, list[tuple[Any, ...]]] = {}
    for key, windows in found.items():
        for one in windows:
            number = (one.start - FIRST).days
            assert (one.end - one.start, one.created_at) == (DAY, FIRST + number * HOUR)
            short.setdefault(key, []).append((number, one.requested_by, one.state, one.finished_at is not None))
    return {key: sorted(windows) for key, windows in short.items()}


def test_the_state_of_a_window(engine: Engine) -> None:
    """Breaks if a lost window counts as covered, or a fetched or open one as missing."""
    failures = Failures()
    for status in ("pending", "running", "paused", "complete", "failed", "cancelled"):
        pending = "lost" if status == "failed" else "open"
        with failures.of(status), emptied(engine):
            backfill(engine, ["done", "pending", "done"], status=status)
            over = status in ("complete", "failed", "cancelled")
            assert fetched(engine, "u1") == {
                HEARTRATE: [(0, "notice", "done", over), (1, "notice", pending, over), (2, "notice", "done", over)]
            }
    assert failures == {}


def test_windows_are_grouped_by_key(engine: Engine) -> None:
    """Breaks if another user's window, or that of a single workout's stream, covers a history."""
    backfill(engine)
    backfill(engine, by="reconcile")
    backfill(engine, by="operator", status="failed", chunks=["pending"])
    backfill(engine, user_id="u2")
    backfill(engine, user_id="u3")
    backfill(engine, provider="oura")
    backfill(engine, resource="workout_stream", item="w1")
    backfill(engine, resource="steps", chunks=[])
    three = [(0, "notice", "done", True), (0, "operator", "lost", True), (0, "reconcile", "done", True)]
    one = three[:1]
    oura, other = HEARTRATE._replace(provider="oura"), HEARTRATE._replace(user_id="u2")
    assert fetched(engine, "u1", "u2") == {HEARTRATE: three, oura: one, other: one}
    assert fetched(engine) == {}


# Connections and erased users


def test_connections_are_grouped_by_user(engine: Engine, settings: Settings) -> None:
    """Breaks if a broken connection counts as connected, or another user's is returned."""
    broken = {"provider": "oura", "error_type": "token"}
    bodies = [event("provider.connection.created", user, {"provider": {"slug": "garmin"}}) for user in ("u1", "u2")]
    store(engine, settings, *bodies, event("provider.connection.error", "u1", broken))
    with transaction(engine) as connection:
        assert coverage.connected(connection, "u1") == {"garmin": "connected", "oura": "error"}
        assert coverage.connected(connection, "u3") == {}


def test_erased_users_are_found(engine: Engine) -> None:
    """Breaks if a tombstone is not found, or another user counts as erased."""
    users = "('gone', now()), ('here', NULL), ('other', now())"
    execute(engine, f"INSERT INTO headrace.users (user_id, erased_at) VALUES {users}")
    with transaction(engine) as connection:
        assert erased_users(connection, ["gone", "here", "never heard of"]) == {"gone"}
        assert erased_users(connection, []) == set()


# Outages

NOW = datetime.now(UTC)
THIS_HOUR = NOW.replace(minute=0, second=0, microsecond=0)


def hour(number: float) -> datetime:
    """A moment so many hours from the current full hour."""
    return THIS_HOUR + number * HOUR


def known_since(engine: Engine, *moments: datetime) -> None:
    """Inserts a user first seen at each moment."""
    for n, moment in enumerate(moments):
        execute(engine, "INSERT INTO headrace.users (user_id, first_seen) VALUES (:id, :at)", id=f"u{n}", at=moment)


def receive(engine: Engine, at: Iterable[datetime], aggregator: str = "junction", outcome: str = "applied") -> None:
    """Inserts a delivery received at each moment."""
    query = """
        INSERT INTO headrace.deliveries (aggregator, message_id, received_at, applied_at, outcome)
        SELECT :aggregator, :aggregator || at, at, now(), :outcome FROM unnest(CAST(:moments AS timestamptz[])) AS at"""
    execute(engine, query, aggregator=aggregator, outcome=outcome, moments=list(at))


def outages(engine: Engine, since: datetime) -> list[tuple[int, int]]:
    """The outages in hours from the current full hour; one that is still open ends with 1."""
    with transaction(engine) as connection:
        found = coverage.outages(connection, since)
    assert all(start < end <= datetime.now(UTC) for start, end in found)
    full = [(start - THIS_HOUR) // HOUR for start, _ in found]
    return list(zip(full, [-((THIS_HOUR - end) // HOUR) for _, end in found], strict=True))


def every_hour(*away: range, since: int = -100) -> list[datetime]:
    """Two moments per hour, except in these hours."""
    gone = {number for some in away for number in some}
    return [hour(n) + part * HOUR / 4 for n in range(since, 1) if n not in gone for part in (0, 3) if hour(n) <= NOW]


OUTAGES: list[tuple[str, Callable[[], list[datetime]], list[tuple[int, int]]]] = [
    ("none", every_hour, []),
    ("a day", lambda: every_hour(range(-60, -36)), [(-60, -36)]),
    ("an hour less", lambda: every_hour(range(-60, -37)), []),
    ("three days", lambda: every_hour(range(-90, -18)), [(-90, -18)]),
    ("two", lambda: every_hour(range(-90, -60), range(-50, -20)), [(-90, -60), (-50, -20)]),
    ("an hour between", lambda: every_hour(range(-90, -60), range(-59, -30)), [(-90, -60), (-59, -30)]),
    ("from the beginning", lambda: every_hour(range(-100, -70)), [(-100, -70)]),
    ("to the last moment of an hour", lambda: [*every_hour(range(-60, -36)), hour(-36) - MICROSECOND], []),
    ("from the first of one", lambda: [*every_hour(range(-60, -35)), hour(-36)], [(-60, -36)]),
]


def test_a_day_without_deliveries_is_an_outage(engine: Engine) -> None:
    """Breaks if an outage longer than the sender's retries is not found, or a quiet evening counts as one."""
    failures = Failures()
    for _, moments, found in OUTAGES:
        with failures.of(moments, found), emptied(engine):
            known_since(engine, hour(-100), hour(-3))
            receive(engine, moments())
            assert outages(engine, hour(-1000)) == found
    assert failures == {}


def test_an_outage_may_be_open(engine: Engine) -> None:
    """Breaks if an outage is found only when it has ended, or reaches into the future."""
    known_since(engine, hour(-100))
    receive(engine, every_hour(range(-40, 1)))
    ((start, end),) = outages(engine, hour(-1000))
    assert start == -40
    assert 0 <= end <= 2


@pytest.mark.parametrize(
    ("known", "since", "found"),
    [
        ([-300, -100], -200, [(-200, -50)]),
        ([-120, -100], -200, [(-120, -50)]),
        ([-60], -200, []),  # less than a day after the first user
        ([-300], -60, []),
        ([], -200, []),
    ],
)
def test_before_the_first_user_there_is_no_outage(
    engine: Engine, known: list[int], since: int, found: list[tuple[int, int]]
) -> None:
    """Breaks if the years before the installation count as lost."""
    known_since(engine, *map(hour, known))
    receive(engine, every_hour(since=-50))
    assert outages(engine, hour(since)) == found


@pytest.mark.parametrize("outcome", ["applied", "duplicate", "stale", "ignored", "dead"])
def test_every_outcome_counts_as_a_delivery(engine: Engine, outcome: str) -> None:
    """Breaks if hours with only ignored or dead deliveries count as an outage."""
    known_since(engine, hour(-100))
    receive(engine, every_hour(), outcome=outcome)
    assert outages(engine, hour(-1000)) == []


def test_another_sender_does_not_hide_an_outage(engine: Engine) -> None:
    """Breaks if Terra's deliveries hide that Junction's are rejected for days."""
    known_since(engine, hour(-100))
    receive(engine, every_hour(range(-60, -30)))
    receive(engine, every_hour(), "terra")
    assert outages(engine, hour(-1000)) == [(-60, -30)]


def test_queries_change_nothing(engine: Engine) -> None:
    """Breaks if a query writes a row."""
    known_since(engine, hour(-100))
    outages(engine, hour(-1000))
    assert rows(engine, "SELECT count(*) AS n FROM headrace.users") == [{"n": 1}]
