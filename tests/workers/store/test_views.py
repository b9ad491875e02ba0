"""The views for people who query: comments, indexes, and the columns that are computed when they are read."""

from datetime import UTC, datetime, timedelta

from sqlalchemy import Engine, text

from app.catalogue import catalogue
from app.config.settings import Settings
from tests.support import apply, delivery, event, heartrate, rows, terra, workout
from tests.support.database import run
from workers.store.migrate import index_records, migrate
from workers.store.retractions import retract

UNCOMMENTED = """
SELECT c.relname || coalesce('.' || a.attname, '') AS name
FROM pg_class c LEFT JOIN LATERAL (
    SELECT attname, attnum FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0
    UNION ALL SELECT NULL, 0) AS a ON true
WHERE c.relnamespace = 'health'::regnamespace AND c.relkind = 'v' AND NOT EXISTS (
    SELECT FROM pg_description d WHERE d.objoid = c.oid AND d.classoid = 'pg_class'::regclass AND d.objsubid = a.attnum)
ORDER BY 1"""
COMMENT = """
SELECT col_description('health.sleep'::regclass, attnum) AS it FROM pg_attribute
WHERE attrelid = 'health.sleep'::regclass AND attname = 'hr_resting'"""
DESCRIPTIONS = "SELECT xmin::text, objsubid FROM pg_description WHERE classoid = 'pg_class'::regclass ORDER BY 1, 2"
INDEXES = """
SELECT relname AS name, relfilenode AS file FROM pg_class JOIN pg_index ON indexrelid = oid
WHERE relname LIKE '%\\_days' AND indisvalid ORDER BY 1"""
LAST = "SELECT provider, client_user_id, last_data_at FROM health.connections ORDER BY provider"
CROWD = """
INSERT INTO headrace.users (user_id, client_user_id) SELECT 'u' || n, 'member-' || n FROM generate_series(1, 100) AS n;
INSERT INTO headrace.connections (user_id, provider, status, version, origin, stored_at)
SELECT 'u' || n, 'garmin', 'connected', now(), 'webhook', now() FROM generate_series(1, 100) AS n;
INSERT INTO headrace.series (user_id, resource, provider, source_type, subtype)
SELECT 'u' || n, 'resource-' || m, 'garmin', 'watch', '' FROM generate_series(1, 100) AS n, generate_series(1, 10) AS m;
INSERT INTO headrace.samples (ts, value, version, stored_at, series_id, origin, unit)
SELECT now() - d * interval '20 days', 1, now(), now(), id, 'webhook', 'count'
FROM headrace.series, generate_series(1, 100) AS d;
ANALYZE headrace.samples, headrace.series, headrace.connections"""


def connected(user_id: str, provider: str) -> dict[str, object]:
    described = {"name": provider, "slug": provider, "logo": "https://example.invalid/logo.png"}
    return event("provider.connection.created", user_id, {"provider": described, "source": described})


def test_every_view_and_column_has_a_comment(engine: Engine) -> None:
    """Breaks if `\\d+` of a view in psql leaves a column unexplained."""
    assert [row["name"] for row in rows(engine, UNCOMMENTED)] == []


def test_a_migration_writes_only_comments_that_differ(empty: Engine) -> None:
    """Breaks if every start rewrites a thousand comments, or a comment that was changed stays wrong."""
    migrate(empty)
    before = rows(empty, DESCRIPTIONS)
    migrate(empty)
    assert rows(empty, DESCRIPTIONS) == before
    run(empty, "COMMENT ON COLUMN health.sleep.hr_resting IS 'wrong'")
    migrate(empty)
    assert rows(empty, COMMENT) == [{"it": "resting heart rate, beats per minute"}]


def test_an_index_that_was_not_completed_is_built_again(empty: Engine) -> None:
    """Breaks if queries scan a table of records after `headrace migrate` was killed, or each start builds indexes."""
    migrate(empty)
    built = rows(empty, INDEXES)
    expected = {f"{one.name}_days" for one in catalogue().values() if one.day_field and not one.is_series}
    assert {row["name"] for row in built} >= expected >= {"workouts_days", "sleep_days", "activity_days"}
    index_records(empty, catalogue())
    assert rows(empty, INDEXES) == built
    run(empty, "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'headrace.sleep_days'::regclass",
        "DROP INDEX headrace.workouts_days")  # fmt: skip
    migrate(empty)
    assert {row["name"] for row in rows(empty, INDEXES)} == {row["name"] for row in built}


def test_the_sport_is_that_of_the_payload(engine: Engine, settings: Settings) -> None:
    """Breaks if a workout whose payload has no sport, or one of another shape, cannot be read."""
    shapes = {"w1": {"id": 1, "name": "Running", "slug": "running"}, "w2": None, "w3": "running", "w4": [1]}
    apply(engine, settings, *(delivery(workout("u1", name, sport=sport)) for name, sport in shapes.items()))
    found = rows(engine, "SELECT id, sport FROM health.workouts ORDER BY id")
    assert [(row["id"], row["sport"]) for row in found if row["sport"]] == [("w1", "running")]


def test_the_sport_of_terra_is_the_name_of_its_number(engine: Engine, settings: Settings) -> None:
    """Breaks if Terra's workouts have no sport or another one than Junction's, or an unknown number cannot be read."""
    numbers = {"s1": 8, "s2": 0, "s3": 999, "s4": "running"}
    for name, number in numbers.items():
        activity = terra.event("activity", {"metadata": terra.METADATA | {"summary_id": name, "type": number}})
        apply(engine, settings, delivery(activity, aggregator="terra", name=f"trace-{name}"))
    found = {row["id"]: row["sport"] for row in rows(engine, "SELECT id, sport FROM health.workouts")}
    assert found == {"s1": "running", "s2": "in_vehicle", "s3": None, "s4": None}


def test_the_ledger_names_the_aggregator_and_the_person(engine: Engine, settings: Settings) -> None:
    """Breaks if a support request about a person cannot be answered from health.deliveries."""
    apply(engine, settings, delivery(workout("u1"), name="msg_1"))
    query = "SELECT provider, aggregator, user_id FROM health.deliveries"
    assert rows(engine, query) == [{"provider": "junction", "aggregator": "junction", "user_id": "u1"}]


def test_a_connection_shows_its_newest_data(engine: Engine, settings: Settings) -> None:
    """Breaks if a person who synchronizes only records or only samples seems to have stopped, or a clock hides it."""
    day = {"id": "a1", "user_id": "u1", "calendar_date": "2026-03-15", "source": {"provider": "oura", "type": "ring"}}
    ring = event("daily.data.activity.created", "u1", day)
    future = {"calendar_date": "2105-01-01", "source": {"provider": "oura", "type": "ring"}}
    events = [connected("u1", provider) for provider in ("garmin", "oura", "strava")]
    events += [heartrate("u1", {0: 60, 7: 61}), ring, workout("u1", "w9", **future)]
    apply(engine, settings, *(delivery(one) for one in events))
    newest = {row["provider"]: row["last_data_at"] for row in rows(engine, LAST)}
    assert newest == {
        "garmin": datetime(2026, 3, 14, 6, 37, tzinfo=UTC),
        "oura": datetime(2026, 3, 15, tzinfo=UTC),
        "strava": None,
    }
    assert {row["client_user_id"] for row in rows(engine, LAST)} == {"member-1"}
    with engine.begin() as connection:
        retract(connection, catalogue()["activity"], "u1", "a1")
    assert {row["provider"]: row["last_data_at"] for row in rows(engine, LAST)} == newest


def test_the_newest_data_of_a_thousand_series_needs_no_scan(engine: Engine, settings: Settings) -> None:
    """Breaks if health.connections reads every sample or record of a person."""
    run(engine, *CROWD.split(";"))
    found = rows(engine, LAST)
    assert len(found) == 100
    assert all(datetime.now(UTC) - row["last_data_at"] < timedelta(days=21) for row in found)
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL enable_seqscan = off"))
        plan = "\n".join(connection.scalars(text(f"EXPLAIN {LAST}")))
    assert "Seq Scan on samples" not in plan
    assert "Seq Scan on workouts" not in plan
