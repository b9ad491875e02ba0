"""Tables and views of every resource in the catalogue."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime
from importlib.resources import files
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine, text

from app.catalogue import Catalogue, Field, catalogue, parse
from app.config.settings import Settings
from app.delivery import pack
from tests.support import START, delivery, rows
from tests.support.cases import Failures
from workers.actions import Record, Sample, Samples
from workers.ingest.apply import Applier
from workers.simulator import World
from workers.simulator.events import every_type
from workers.store import schema
from workers.store.engine import make_engine, transaction
from workers.store.migrate import migrate
from workers.store.series import SeriesNumbers
from workers.store.users import Claim, upsert_users
from workers.store.writer import BatchItem, write

# Part of the contract, and therefore not taken from the code.
TYPES = {
    "text": "text",
    "integer": "bigint",
    "number": "double precision",
    "boolean": "boolean",
    "date": "date",
    "datetime": "timestamp with time zone",
}
MOMENT = "timestamp with time zone"
WHOSE = [("user_id", "text"), ("client_user_id", "text"), ("provider", "text"), ("source_type", "text")]
HOW = [("version", MOMENT), ("origin", "text"), ("stored_at", MOMENT)]
SUMMARIES = {"workouts", "sleep", "activity", "body", "profile", "meal", "menstrual_cycle", "electrocardiogram"}
SUMMARIES |= {"sleep_cycle", "workout_stream"}
OTHER_VIEWS = {
    "large_requests": "user_id provider reference expected received is_complete announced_at",
    "users": "user_id client_user_id first_seen erased_at",
    "connections": "user_id provider status since error client_user_id last_data_at",
    "grants": "user_id provider resource granted since",
    "backfills": "user_id provider resource status window_start window_end is_final_seen chunks_total chunks_done "
    "records started_at finished_at error id",
    "deliveries": "provider message_id event_type received_at applied_at outcome attempts error aggregator user_id",
    "changes": "position changed_at op user_id client_user_id resource provider source_type id ts_min ts_max rows "
    "origin",
    "feed": "oldest_position newest_position",
    "daily": "client_user_id user_id local_date metric value unit provider source_type sources covered_minutes "
    "summary_value method zone_source computed_at",
    "best_sleep": "client_user_id user_id local_date is_night id provider source_type bedtime_start bedtime_stop total "
    "deep rem light awake also zone_source",
    "best_workouts": "client_user_id user_id local_date id provider source_type time_start time_end duration distance "
    "calories also zone_source",
    "source_priorities": "client_user_id resource rank provider source_type set_at",
}
VALUES: dict[str, tuple[Any, Any]] = {  # the value in a payload, and in its column
    "text": ("plain\u00e9 'text'", "plain\u00e9 'text'"),
    "integer": (146.0, 146),
    "number": (0.5, 0.5),
    "boolean": (False, False),
    "date": ("2026-03-14", date(2026, 3, 14)),
    "datetime": ("2026-03-14T08:30:00.250+02:00", datetime(2026, 3, 14, 6, 30, 0, 250_000, UTC)),
}
EVERY = list(catalogue().values())
RECORDS = [resource for resource in EVERY if not resource.is_series]
TIMESERIES = [resource for resource in EVERY if resource.is_series]


def columns(engine: Engine, view: str) -> list[tuple[str, str]]:
    """The columns of a view in their order, with their types."""
    found = rows(
        engine,
        "SELECT column_name, data_type FROM information_schema.columns "
        "WHERE table_schema = 'health' AND table_name = :view ORDER BY ordinal_position",
        view=view,
    )
    return [(row["column_name"], row["data_type"]) for row in found]


def store(engine: Engine, action: Record | Samples) -> None:
    numbers = SeriesNumbers(engine).of("junction", action.series)
    with transaction(engine) as connection:
        upsert_users(connection, {Claim("junction", action.user_id): ("member-1", datetime.now(UTC))})
        write(connection, [BatchItem(0, action)], "backfill", numbers)


def changed_catalogue(before: str, after: str) -> Catalogue:
    """The catalogue with one change in its text."""
    toml = files("app").joinpath("catalogue.toml").read_text(encoding="utf-8")
    assert before in toml
    return parse(toml.replace(before, after, 1))


@pytest.fixture
def changing(empty_settings: Settings) -> Iterator[Engine]:
    """A migrated database whose schema the test may change."""
    engine = make_engine(empty_settings)
    migrate(engine)
    yield engine
    engine.dispose()


def test_there_is_a_view_for_every_resource_and_nothing_else(shared: Engine) -> None:
    """Breaks if a resource has no view, or schema `health` shows what is not in the contract."""
    names = {row["name"] for row in rows(shared, "SELECT viewname AS name FROM pg_views WHERE schemaname = 'health'")}
    assert len(EVERY) == 69
    assert names == {resource.name for resource in EVERY} | set(OTHER_VIEWS)
    assert names > SUMMARIES
    assert rows(shared, "SELECT 1 FROM pg_tables WHERE schemaname = 'health'") == []


def test_a_record_view_has_the_columns_of_the_contract(shared: Engine) -> None:
    """Breaks if a column of a summary is missing, misplaced or of another type than its schema says."""
    failures = Failures()
    for resource in RECORDS:
        with failures.of(resource.name):
            scalars = [(field.name, TYPES[field.type]) for field in resource.fields]
            later = [("sport", "text")] if resource.name == "workouts" else []
            found = columns(shared, resource.name)
            assert found == [*WHOSE, ("id", "text"), *scalars, ("payload", "jsonb"), *HOW, *later]
    assert failures == {}


def test_a_timeseries_view_has_the_columns_of_the_contract(shared: Engine) -> None:
    """Breaks if a column of a timeseries is missing, misplaced or of another type."""
    failures = Failures()
    for resource in TIMESERIES:
        with failures.of(resource.name):
            sample = [("ts", MOMENT), ("ts_end", MOMENT), ("value", "double precision"), ("unit", "text")]
            sample += [("subtype", "text"), ("timezone_offset", "integer"), ("extra", "jsonb")]
            own = [(field.name, TYPES[field.type]) for field in resource.fields]
            assert columns(shared, resource.name) == [*WHOSE, *sample, *HOW, *own]
    assert failures == {}


def test_the_other_views_have_the_columns_of_the_contract(shared: Engine) -> None:
    """Breaks if a column that dashboards read is renamed or moved."""
    failures = Failures()
    for view, names in OTHER_VIEWS.items():
        with failures.of(view):
            assert [name for name, _ in columns(shared, view)] == names.split()
    assert failures == {}


def test_a_record_reads_back_as_it_was_written(shared: Engine) -> None:
    """Breaks if a scalar is in the wrong column, or loses digits, its zone or its type."""
    failures = Failures()
    for resource in RECORDS:
        with failures.of(resource.name):
            payload = {field.name: VALUES[field.type][0] for field in resource.fields} | {"more": [1, {"a": None}]}
            action = Record(resource.name, "record", "r1", "garmin", "ring", msgspec.json.encode(payload), START)
            store(shared, action)
            (row,) = rows(shared, f'SELECT * FROM health."{resource.name}" WHERE user_id = :user', user="record")
            assert row.pop("stored_at") is not None
            assert row.pop("sport", None) is None
            scalars = {field.name: VALUES[field.type][1] for field in resource.fields}
            assert row == scalars | {
                "user_id": "record",
                "client_user_id": "member-1",
                "provider": "garmin",
                "source_type": "ring",
                "id": "r1",
                "payload": payload,
                "version": START,
                "origin": "backfill",
            }
    assert failures == {}


def test_a_record_without_any_scalar_is_stored(shared: Engine) -> None:
    """Breaks if an absent scalar is required."""
    failures = Failures()
    for resource in RECORDS:
        with failures.of(resource.name):
            store(shared, Record(resource.name, "bare", "r1", "", "unknown", b"{}", START))
            (row,) = rows(shared, f'SELECT * FROM health."{resource.name}" WHERE user_id = :user', user="bare")
            assert {row[field.name] for field in resource.fields} <= {None}
    assert failures == {}


def test_a_sample_reads_back_as_it_was_written(shared: Engine) -> None:
    """Breaks if a part of a sample is in the wrong column, or in another resource's view."""
    failures = Failures()
    for resource in TIMESERIES:
        with failures.of(resource.name):
            own = {field.name: VALUES[field.type] for field in resource.fields}
            extra = {name: given for name, (given, _) in own.items()} | {"app_id": "x"}
            end, version = datetime(2026, 3, 14, 6, 35, tzinfo=UTC), datetime(2026, 3, 15, tzinfo=UTC)
            sample = Sample(START, end, 71.25, "u", -3600, msgspec.json.encode(extra))
            user = f"sample of {resource.name}"
            store(shared, Samples(resource.name, user, "oura", "ring", "a/b", [sample], version))
            (row,) = rows(shared, f'SELECT * FROM health."{resource.name}" WHERE user_id = :user', user=user)
            assert row.pop("stored_at") is not None
            assert row == {name: read for name, (_, read) in own.items()} | {
                "user_id": user,
                "client_user_id": "member-1",
                "provider": "oura",
                "source_type": "ring",
                "ts": START,
                "ts_end": end,
                "value": 71.25,
                "unit": "u",
                "subtype": "a/b",
                "timezone_offset": -3600,
                "extra": extra,
                "version": version,
                "origin": "backfill",
            }
            assert rows(shared, "SELECT count(*) AS n FROM headrace.series WHERE user_id = :user", user=user) == [
                {"n": 1}
            ]
    assert failures == {}


@pytest.mark.parametrize(
    ("given", "stored"), [(9_007_199_254_740_993, 9_007_199_254_740_993), (1e3, 1000), (-5, -5), (None, None)]
)
def test_integers_are_read_exactly(shared: Engine, given: float | None, stored: int | None) -> None:
    """Breaks if an integer is converted to a float, or 1e3 is rejected."""
    payload = msgspec.json.encode({"steps": given})
    store(shared, Record("activity", "integers", f"{given}", "", "unknown", payload, START))
    assert rows(shared, "SELECT steps FROM health.activity WHERE id = :id", id=f"{given}") == [{"steps": stored}]


SNAPSHOT = """
SELECT c.oid, c.relname, c.relkind::text, CASE WHEN c.relkind = 'v' THEN pg_get_viewdef(c.oid) END AS definition,
       (SELECT array_agg(a.attname::text || ' ' || a.atttypid::regtype::text ORDER BY a.attnum) FROM pg_attribute a
        WHERE a.attrelid = c.oid AND a.attnum > 0) AS columns
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname IN ('health', 'headrace') ORDER BY c.oid
"""


def test_sync_again_changes_nothing(shared: Engine) -> None:
    """Breaks if a second `headrace migrate` recreates tables, or drops views that a dashboard uses."""
    before = rows(shared, SNAPSHOT)
    with transaction(shared) as connection:
        schema.sync(connection, catalogue())
    assert rows(shared, SNAPSHOT) == before


LAST = '"updated_at datetime",\n]\n\n[summary.body]'
STREAM = 'identifier = "workout_id"'


@pytest.mark.parametrize(
    ("view", "before", "after", "kind"),
    [
        pytest.param(
            "glucose", 'glucose = { day = "gauge" }', 'glucose = { values = ["mood text"] }', "text", id="timeseries"
        ),
        pytest.param("workout_stream", STREAM, f'{STREAM}\nfields = ["mood number"]', "number", id="stream"),
        pytest.param("workouts", '"title text"', '"mood integer", "title text"', "integer", id="first of a record"),
        pytest.param("workouts", LAST, f'"mood datetime", {LAST}', "datetime", id="amid a record"),
    ],
)
def test_a_new_field_is_a_new_last_column(changing: Engine, view: str, before: str, after: str, kind: str) -> None:
    """Breaks if a new field of the catalogue fails the migration, or drops a user's view."""
    old = columns(changing, view)
    with changing.begin() as connection:
        connection.execute(text(f'CREATE VIEW public.mine AS SELECT * FROM health."{view}"'))
    with transaction(changing) as connection:
        schema.sync(connection, changed_catalogue(before, after))
    assert columns(changing, view) == [*old, ("mood", TYPES[kind])]
    assert rows(changing, "SELECT * FROM public.mine") == []


def test_a_new_resource_gets_its_table_and_view(changing: Engine) -> None:
    """Breaks if a new resource of the catalogue is not created."""
    row = '[summary.mood]\npath = "/v2/summary/mood/{user_id}"\nfields = ["score integer"]\n\n[summary.activity]'
    new = changed_catalogue("[summary.activity]", row)
    with transaction(changing) as connection:
        schema.sync(connection, new)
    assert ("score", "bigint") in columns(changing, "mood")
    assert new["mood"].fields == (Field("score", "integer"),)


def test_a_removed_field_keeps_its_column(changing: Engine) -> None:
    """Breaks if a removed field fails the migration or drops data."""
    with transaction(changing) as connection:
        schema.sync(connection, changed_catalogue('"title text", ', ""))
    assert rows(changing, "SELECT title FROM headrace.workouts") == []


MEANT = ("data", "historical", "connection", "device")


def allowed(event_type: str) -> tuple[str, ...]:
    """The allowed outcomes of an event. Some updates repeat stored data: a notice, or a sample."""
    if catalogue().event(event_type).does not in MEANT:
        return ("ignored",)
    return ("applied", "duplicate") if event_type.endswith(".updated") else ("applied",)


@pytest.fixture(scope="module")
def world(shared: Engine, shared_settings: Settings) -> World:
    """A simulated user; one event of every type was applied."""
    made = World(seed=7, users=1, until=datetime(2026, 3, 14, 12, tzinfo=UTC), days=60)
    applier = Applier(shared, shared_settings)
    for number, body in enumerate(every_type(made)):
        applier.apply(pack([delivery(body, START.replace(minute=number % 60, hour=7 + number // 60))]))
    return made


def test_one_event_of_every_type_is_applied_or_ignored(shared: Engine, world: World) -> None:
    """Breaks if an event of the public catalogue becomes a dead letter, or one with data is ignored."""
    found = {row["event_type"]: row for row in rows(shared, "SELECT event_type, outcome, error FROM health.deliveries")}
    assert sorted(found) == sorted(catalogue().event_names)
    assert len(found) == 194
    assert [row for name, row in found.items() if row["outcome"] not in allowed(name)] == []
    assert sum(row["outcome"] == "duplicate" for row in found.values()) < 10


def test_every_resource_shows_its_events(shared: Engine, world: World) -> None:
    """Breaks if the events of a resource leave no row in its view."""
    failures = Failures()
    for resource in [one for one in EVERY if one.is_junctions and not one.legacy]:
        with failures.of(resource.name):
            user = world.members[0]
            query = f'SELECT client_user_id, provider, origin FROM health."{resource.name}" WHERE user_id = :user'
            found = rows(shared, query, user=user.user_id)
            assert found
            assert {row["client_user_id"] for row in found} == {user.client_user_id}
            assert {row["origin"] for row in found} == {"webhook"}
            assert {row["provider"] for row in found} <= {one.provider.slug for one in user.connections}
    assert failures == {}


def test_own_columns_are_filled_by_events(shared: Engine, world: World) -> None:
    """Breaks if systolic, diastolic or a note's text stay in the payload."""
    failures = Failures()
    for resource in [one for one in TIMESERIES if one.is_junctions and one.fields]:
        with failures.of(resource.name):
            query = f'SELECT * FROM health."{resource.name}" WHERE user_id = :user'
            for row in rows(shared, query, user=world.members[0].user_id):
                assert row["value"] is None
                assert all(row[field.name] is not None for field in resource.fields)
    assert failures == {}


def test_own_columns_override_the_payload(shared: Engine) -> None:
    """Breaks if an object whose shape differs from its columns is read as if it had them, or is changed."""
    payload, columns = {"steps": "many", "title": 1}, {"steps": 12, "calendar_date": "2026-03-14"}
    encoded = msgspec.json.encode(payload), msgspec.json.encode(columns)
    store(shared, Record("activity", "columns", "a1", "garmin", "daily", encoded[0], START, encoded[1]))
    query = "SELECT steps, calendar_date, distance, payload FROM health.activity WHERE user_id = 'columns'"
    assert rows(shared, query) == [
        {"steps": 12, "calendar_date": date(2026, 3, 14), "distance": None, "payload": payload}
    ]


def test_a_deleted_record_is_hidden_until_a_newer_version_arrives(shared: Engine) -> None:
    """Breaks if a deleted record is shown, hides a newer version, or is restored by an older one."""
    failures = Failures()
    for resource in RECORDS:
        with failures.of(resource.name):
            moments = [START.replace(minute=minute) for minute in range(4)]
            given = Record(resource.name, "taken back", "r1", "garmin", "ring", b"{}", moments[1])
            query = f'SELECT version FROM health."{resource.name}" WHERE user_id = :user'
            seen = []
            for version, is_deleted in ((1, False), (2, True), (0, False), (1, False), (3, False)):
                store(shared, replace(given, version=moments[version], is_deleted=is_deleted))
                seen.append([row["version"] for row in rows(shared, query, user="taken back")])
            assert seen == [[moments[1]], [], [], [], [moments[3]]]
    assert failures == {}


@pytest.mark.parametrize("order", [(False, True), (True, False)])
def test_of_two_equal_versions_the_deletion_wins(shared: Engine, order: tuple[bool, bool]) -> None:
    """Breaks if a record and its deletion of one version end differently in the two orders."""
    for is_deleted in order:
        store(shared, Record("sleep", f"tie {order}", "s1", "", "ring", b'{"a":1}', START, is_deleted=is_deleted))
    assert rows(shared, "SELECT id FROM health.sleep WHERE user_id = :user", user=f"tie {order}") == []


def test_a_table_without_deletions_gets_them(changing: Engine) -> None:
    """Breaks if the upgrade of a database from before deletions fails, or hides records."""
    with changing.begin() as connection:
        connection.execute(text("DROP VIEW health.sleep"))
        connection.execute(text("ALTER TABLE headrace.sleep DROP COLUMN deleted"))
        connection.execute(text("CREATE VIEW health.sleep AS SELECT r.user_id FROM headrace.sleep r"))
        insert = "INSERT INTO headrace.sleep (user_id, id, provider, source_type, payload, version, origin, stored_at)"
        connection.execute(text(f"{insert} VALUES ('u1', 's1', '', '', '{{}}', now(), 'webhook', now())"))
    with transaction(changing) as connection:
        schema.sync(connection, catalogue())
    assert rows(changing, "SELECT id FROM health.sleep") == [{"id": "s1"}]
