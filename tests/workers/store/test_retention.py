"""Retention: deletes old rows of each resource in batches, and no others."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine, text

from app.broker.celery import make_celery
from app.config.settings import Settings, load
from app.errors import Misconfigured
from tests.support import START, apply, delivery, event, heartrate, rows, workout
from tests.support.deliveries import received
from workers.celery.context import WorkerContext
from workers.celery.jobs import Jobs
from workers.operate import status_view
from workers.store import retention
from workers.store.feed import Sequencer

DAY = timedelta(days=1)
NOW = START + 400 * DAY
BEATS = "SELECT count(*) AS rows FROM health.heartrate"
WORKOUTS = "SELECT id FROM health.workouts ORDER BY id"


def keeping(settings: Settings, ledger: int = 0, **days: int) -> Settings:
    """The settings with these days by resource; `rest` is the default."""
    return replace(
        settings, retention=tuple((name.replace("rest", "*"), n) for name, n in days.items()), ledger_days=ledger
    )


def run(engine: Engine, settings: Settings, now: datetime = NOW) -> dict[str, int]:
    """Deletes old rows and returns their number, which a dry run must predict."""
    edges, gone = retention.limits(settings, now), dict[str, int]()
    predicted = retention.count(engine, edges)
    for name, number in retention.remove(engine, edges):
        gone[name] = gone.get(name, 0) + number
    assert gone == predicted
    return gone


@pytest.fixture
def stored(engine: Engine, settings: Settings) -> None:
    """Ten days of heart rates of two users, a workout per day, and a profile."""
    for user in ("u1", "u2"):
        apply(engine, settings, delivery(heartrate(user, {1440 * n: 60 for n in range(10)})))
    for n in range(10):
        day = (START + n * DAY).date().isoformat()
        apply(engine, settings, delivery(workout("u1", f"w{n}", calendar_date=day)))
    profile = {"id": "p1", "user_id": "u1", "height": 180, "source": {"provider": "garmin", "type": "watch"}}
    apply(engine, settings, delivery(event("daily.data.profile.created", "u1", profile)))


@pytest.mark.usefixtures("stored")
def test_nothing_is_deleted_by_default(engine: Engine, settings: Settings) -> None:
    """Breaks if an installation without a setting loses data."""
    assert run(engine, settings) == {}
    assert run(engine, keeping(settings, heartrate=0, rest=0)) == {}


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("batch", [3, 10_000])
def test_each_resource_has_its_own_limit(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """Breaks if a resource is kept longer or shorter than its limit, or only one batch is deleted."""
    monkeypatch.setattr(retention, "BATCH", batch)
    monkeypatch.setattr(retention, "SERIES_PAGE", 1)
    assert run(engine, keeping(settings, heartrate=396, workouts=399)) == {"heartrate": 8, "workouts": 2}
    assert rows(engine, BEATS) == [{"rows": 12}]
    assert [row["id"] for row in rows(engine, WORKOUTS)] == [f"w{n}" for n in range(2, 10)]


@pytest.mark.usefixtures("stored")
def test_a_default_limit_with_exceptions(engine: Engine, settings: Settings) -> None:
    """Breaks if the default limit applies to an exception."""
    now = datetime.now(UTC)
    assert run(engine, keeping(settings, rest=10, workouts=0), now) == {"heartrate": 20}
    assert len(rows(engine, WORKOUTS)) == 10
    assert len(rows(engine, "SELECT 1 FROM health.profile")) == 1  # has no day, and was just written
    assert "profile" in run(engine, keeping(settings, rest=10, workouts=0), now + 11 * DAY)


def test_a_late_event_is_deleted_by_the_next_run(engine: Engine, settings: Settings) -> None:
    """Breaks if an old event cannot be stored, or is never deleted."""
    here = keeping(settings, heartrate=10)
    assert apply(engine, here, delivery(heartrate("u1", {0: 60}))) == {"applied": 1}
    assert run(engine, here) == {"heartrate": 1}
    assert apply(engine, here, delivery(heartrate("u1", {0: 60}))) == {"applied": 1}
    assert run(engine, here) == {"heartrate": 1}


def test_ledger_entries_of_dead_letters_are_kept(engine: Engine, settings: Settings) -> None:
    """Breaks if the ledger grows for ever, or a dead letter loses its user."""
    sent = [delivery(workout("u1")), delivery(workout("u2", "")), delivery(workout("u3"))]
    now = datetime.now(UTC)  # a message from the future would be refused
    moments = (now - 100 * DAY, now - 100 * DAY, now)
    old = [received(one, at) for one, at in zip(sent, moments, strict=True)]
    apply(engine, settings, *old)
    assert run(engine, keeping(settings, ledger=40), now) == {"deliveries": 1}
    left = rows(engine, "SELECT outcome FROM health.deliveries ORDER BY outcome")
    assert [row["outcome"] for row in left] == ["applied", "dead"]


@pytest.mark.usefixtures("stored")
def test_the_sweep_deletes_a_few_times_a_day(engine: Engine, settings: Settings, broker_url: str) -> None:
    """Breaks if nothing is deleted automatically, or every sweep reads all tables."""
    here = keeping(settings, rest=1)
    work = WorkerContext(make_celery(here, "worker"), here)
    jobs = Jobs(work)
    jobs.sweep()
    assert rows(engine, BEATS) == [{"rows": 0}]
    apply(engine, settings, delivery(heartrate("u1", {0: 60})))
    jobs.sweep()
    assert rows(engine, BEATS) == [{"rows": 1}]
    work.engine.dispose()


def test_the_sweep_creates_and_drops_partitions(engine: Engine, settings: Settings, broker_url: str) -> None:
    """Breaks if months are neither created ahead nor dropped without a command."""
    now = datetime.now(UTC)
    with engine.begin() as connection:
        connection.execute(text(f"DROP TABLE IF EXISTS headrace.samples_{now:%Y%m}"))
        connection.execute(text("SELECT headrace.create_partition('samples', :moment)"), {"moment": now - 400 * DAY})
    here = keeping(settings, rest=300)
    work = WorkerContext(make_celery(here, "worker"), here)
    jobs = Jobs(work)
    jobs.sweep()
    with engine.begin() as connection:  # six hours later
        connection.execute(text("UPDATE headrace.jobs SET due_at = now(), lease_until = '-infinity'"))
    jobs.sweep()
    work.engine.dispose()
    found = {row["name"] for row in rows(engine, "SELECT name FROM headrace.partitions WHERE parent = 'samples'")}
    assert f"samples_{now:%Y%m}" in found
    assert f"samples_{now - 400 * DAY:%Y%m}" not in found


def test_the_sweep_drops_old_changes_of_the_feed(engine: Engine, settings: Settings, broker_url: str) -> None:
    """Breaks if HEADRACE_FEED_DAYS has no effect, and the feed grows for ever."""
    apply(engine, settings, *map(delivery, (workout("u1"), workout("u1", "w2"), workout("u1", "w3"))))
    Sequencer(engine).run()
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO headrace.jobs (name, due_at) VALUES ('partitions', now())"))
        aged = "UPDATE headrace.changes SET changed_at = now() - make_interval(days => :days) WHERE record_id = :id"
        connection.execute(text(aged), [{"id": "w1", "days": 4}, {"id": "w2", "days": 1}])
    here = replace(settings, feed_days=2)
    work = WorkerContext(make_celery(here, "worker"), here)
    Jobs(work).sweep()
    work.engine.dispose()
    assert rows(engine, "SELECT id FROM health.changes ORDER BY position") == [{"id": "w2"}, {"id": "w3"}]
    assert rows(engine, "SELECT oldest_position FROM health.feed") == [{"oldest_position": 2}]


@pytest.mark.usefixtures("stored")
def test_a_job_that_postgresql_does_not_execute_is_shown(
    engine: Engine, settings: Settings, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if retention fails for ever without a word in `headrace status`, or stops the rest of the sweep."""
    here = keeping(settings, rest=1)
    work = WorkerContext(make_celery(here, "worker"), here)
    scheduled = Jobs(work)
    with engine.begin() as holder:
        holder.execute(text("LOCK TABLE headrace.workouts"))
        scheduled.sweep()
    status = status_view.read(engine, [], ())
    assert status.failed_jobs == {"retention": "PostgreSQL: LockNotAvailable (55P03)"}
    assert status.swept is not None
    monkeypatch.setattr("workers.celery.jobs.REPORTED_SECONDS", 0.0)
    with engine.begin() as holder:
        holder.execute(text("UPDATE headrace.jobs SET lease_until = '-infinity'"))
    with engine.begin() as holder:
        holder.execute(text("LOCK TABLE headrace.workouts"))
        scheduled.sweep()
    assert status_view.read(engine, [], ()).failed_jobs == {}  # the time to show it has ended
    work.engine.dispose()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HEADRACE_RETENTION", "pulse=1"),
        ("HEADRACE_RETENTION", "sleep"),
        ("HEADRACE_RETENTION", "sleep=-1"),
        ("HEADRACE_LEDGER_DAYS", "30"),
    ],
)
def test_an_invalid_setting_is_rejected(name: str, value: str) -> None:
    """Breaks if a typing error keeps everything for ever, or deletes other data."""
    with pytest.raises(Misconfigured, match=name):
        load({name: value})
    assert load({"HEADRACE_RETENTION": "sleep=3, *=0"}).retention == (("sleep", 3), ("*", 0))
