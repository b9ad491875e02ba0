"""The migration 0002, from a database that Headrace 0.1 made and filled: nothing is lost, and it can still be used."""

from datetime import UTC, datetime

from sqlalchemy import Engine, text

from app.config.settings import Settings
from tests.support import apply, delivery, heartrate, rows, workout
from tests.support.database import settings_of
from workers.ingest.apply import Applier
from workers.store import archive, schema
from workers.store.archive import ArchiveWindow
from workers.store.engine import make_writer
from workers.store.migrate import migrate
from workers.store.partitions import maintain_partitions

VIEWS = ("users", "connections", "deliveries", "backfills", "workouts", "heartrate")
OLD_NAMES = "SELECT relname FROM pg_class WHERE relname ~ '^(kept|suspects|chores)' AND relname !~ '^kept_sessions'"


def read(engine: Engine) -> dict[str, list[dict[str, object]]]:
    """What users read, and what the internal tables hold under their names of today."""
    found = {view: rows(engine, f"SELECT * FROM health.{view} ORDER BY 1, 2, 3") for view in VIEWS}
    return found | {
        "dead letters": rows(engine, "SELECT message_id, reason, sealed FROM headrace.dead_letters"),
        "gaps": rows(engine, "SELECT * FROM headrace.gaps"),
    }


def test_names_change_and_nothing_else(old: Engine) -> None:
    """Breaks if the migration loses or changes a row, or leaves a table, index or partition under its old name."""
    before = read(old)
    archived = rows(old, "SELECT * FROM headrace.kept ORDER BY message_id")
    merged = rows(old, "SELECT user_id, succeeded_by AS other FROM headrace.users ORDER BY 1")
    crashes = rows(old, "SELECT * FROM headrace.suspects")
    requested = rows(old, "SELECT id, asked_by AS by FROM headrace.backfills")
    jobs = rows(old, "SELECT due_at FROM headrace.chores ORDER BY due_at, name")
    assert all(before.values())
    assert len(archived) == 6
    assert migrate(old) == "0014"
    after = read(old)
    assert {name: [row | same for row, same in zip(after[name], before[name], strict=True)] for name in before} == after
    archived = [row | {"digest": None} for row in archived]
    assert rows(old, "SELECT * FROM headrace.archive ORDER BY message_id") == archived
    assert rows(old, "SELECT user_id, merged_into AS other FROM headrace.users ORDER BY 1") == merged
    assert rows(old, "SELECT * FROM headrace.crash_counts") == crashes
    assert rows(old, "SELECT id, requested_by AS by FROM headrace.backfills") == requested
    assert rows(old, "SELECT due_at FROM headrace.jobs ORDER BY due_at, name") == jobs
    names = rows(old, "SELECT name FROM headrace.jobs ORDER BY name")
    assert [row["name"] for row in names] == ["partitions", "reconcile", "retention", "sweep"]
    assert rows(old, OLD_NAMES) == []


def test_a_migrated_database_can_be_used(old: Engine, settings: Settings) -> None:
    """Breaks if what 0.1 archived cannot be replayed, partitions are not found again, or new events do not land."""
    migrate(old)
    here = settings_of(settings, str(old.url.render_as_string(hide_password=False)).replace("+psycopg", ""))
    writer = make_writer(here)
    before = schema.digests(writer)
    applier, window = Applier(writer, here), ArchiveWindow(*edges(old))
    outcomes = [applier.replay(some).outcomes for some in archive.read(writer, window)]
    assert sum(outcome.total() for outcome in outcomes) == 6
    assert schema.digests(writer) == before
    dropped = maintain_partitions(writer, 30, datetime(2027, 1, 1, tzinfo=UTC))
    assert dropped[0] == "archive_20261120"
    assert apply(writer, here, delivery(workout("u1", "w3")), delivery(heartrate("u3", {0: 70}))) == {"applied": 2}
    assert len(rows(writer, "SELECT id FROM health.workouts WHERE user_id = 'u1'")) == 3
    writer.dispose()


def test_rejected_requests_get_separate_columns(old: Engine) -> None:
    """Breaks if an upgrade forgets what backfills that still run have been refused."""
    errors = {"a": "12 refused, first: no id", "b": "status 503", "c": None, "d": "x 1 refused, first: y"}
    add = text("""INSERT INTO headrace.backfills (aggregator, user_id, provider, resource, asked_by, window_start,
        window_end, is_final_seen, error)
        VALUES ('junction', :user, 'oura', 'hrv', 'notice', now(), now(), true, :error)""")
    with old.begin() as connection:
        for user, error in errors.items():
            connection.execute(add, {"user": user, "error": error})
    migrate(old)
    found = rows(old, "SELECT refused, first_refusal FROM headrace.backfills WHERE resource = 'hrv' ORDER BY user_id")
    assert [tuple(row.values()) for row in found] == [(12, "no id"), (0, None), (0, None), (0, None)]


def edges(engine: Engine) -> tuple[object, object]:
    """A window around everything that is archived."""
    (row,) = rows(
        engine, "SELECT min(received_at) AS since, max(received_at) + interval '1 s' AS until FROM headrace.archive"
    )
    return row["since"], row["until"]
