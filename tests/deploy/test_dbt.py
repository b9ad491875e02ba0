"""The dbt package in deploy/dbt, built with the rights of a reader: against stored data, and against a running stack.

Needs the environment with dbt, which `--full` and .ci/run create: `./deploy/setup examples`. Otherwise it is skipped.
"""

import shutil
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from itertools import chain, islice
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row
from sqlalchemy import Engine

from app.config.settings import Settings
from tests.deploy.support import DEPLOY, documents
from tests.support import apply, delivery, event, until, workout
from tests.support.database import run
from tests.support.dbt import Dbt, created_reader, dbt
from tests.support.stack import started
from workers.daily.derive import Deriver
from workers.daily.metrics import derived
from workers.operate.erase import Eraser
from workers.simulator import Simulator, first_events, live_events
from workers.simulator.sender import Sender
from workers.store.feed import Sequencer

PACKAGE = DEPLOY / "dbt"
DAY, YESTERDAY = date(2026, 3, 14), datetime.now(UTC).date() - timedelta(days=1)
WATCH, RING, PHONE = (
    {"provider": "garmin", "type": "watch"},
    {"provider": "oura", "type": "ring"},
    {"provider": "apple_health_kit", "type": "phone"},
)


def samples(user: str, resource: str, day: date, value: float, source: dict[str, str] = WATCH) -> dict[str, Any]:
    """A sample of an hour at noon of Paris in winter."""
    at = datetime(day.year, day.month, day.day, 11, tzinfo=UTC)
    one = {"timestamp": at.isoformat(), "start": at.isoformat(), "end": (at + timedelta(hours=1)).isoformat()}
    data = [one | {"value": value, "unit": "count", "timezone_offset": 3600}]
    return event(f"daily.data.{resource}.created", user, {"source": source, "data": data})


def night(name: str, source: dict[str, str], **more: Any) -> dict[str, Any]:
    """A sleep session of u1, from 23:00 to 7:00 in Paris."""
    times = {"bedtime_start": "2026-03-13T22:00:00+00:00", "bedtime_stop": "2026-03-14T06:00:00+00:00"}
    data = {"id": name, "user_id": "u1", "date": times["bedtime_stop"], "calendar_date": "2026-03-14"}
    data |= times | {"total": 25200, "deep": 3600, "timezone_offset": 3600, "source": source} | more
    return event("daily.data.sleep.created", "u1", data)


def connection(user: str, provider: str, client: str = "member-1") -> dict[str, Any]:
    return event("provider.connection.created", user, {"provider": {"slug": provider}}, client)


class World:
    """A person with two user ids and three sources, one without an id of their own, and one who is erased."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.deriver = Deriver(engine, settings)
        self.deriver.run(lambda: False)

    def store(self) -> None:
        nameless = workout("u3") | {"client_user_id": None}
        erased = samples("u4", "steps", DAY, 9) | {"client_user_id": "member-4"}
        events = (
            *(connection("u1", "garmin"), connection("u2", "oura"), connection("u4", "oura", "member-4")),
            event("provider.connection.error", "u1", {"provider": "fitbit", "error_type": "expired"}),
            *(samples("u1", "steps", DAY, 500), samples("u2", "steps", DAY, 480, PHONE)),
            *(samples("u1", "heartrate", DAY, 60), samples("u1", "steps", YESTERDAY, 700)),
            *(night("watch", WATCH, score=70), night("ring", RING)),
            *(nameless, erased),
        )
        apply(self.engine, self.settings, *map(delivery, events))
        Eraser(self.engine, self.settings).erase("u4", lambda _: None)
        Sequencer(self.engine).run(everything=True)
        while self.deriver.run(lambda: False):
            pass


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the package."""
    copy = tmp_path / "headrace"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("target", "logs", "dbt_packages"))
    return copy


@pytest.fixture
def process(examples: Path, source_url: str, project: Path) -> Iterator[Dbt]:
    """dbt in a copy of the package."""
    with dbt(examples, project, source_url) as one:
        yield one


# All that is left to do for a stack: open backfills, unread changes, and days to compute.
PENDING = """
SELECT EXISTS (SELECT FROM health.backfills WHERE status IN ('pending', 'running'))
    OR EXISTS (SELECT FROM headrace.daily_queue) OR EXISTS (SELECT FROM headrace.outbox)
    OR (SELECT position FROM headrace.daily_feed) < (SELECT newest_position FROM health.feed)"""
# The number of rows of each mart, and of the rows of `health` from which it is made.
MARTS = """
SELECT (SELECT count(*) FROM analytics.fct_days), (SELECT count(*) FROM analytics.fct_sleep),
       (SELECT count(*) FROM analytics.dim_people)"""
SOURCES = """
SELECT (SELECT count(DISTINCT (coalesce(client_user_id, user_id), local_date)) FROM health.daily
        WHERE metric = ANY(%s)),
       (SELECT count(*) FROM health.best_sleep), (SELECT count(DISTINCT client_user_id) FROM health.users)"""


def is_fetched(one: dict[str, Any]) -> bool:
    """Whether an event announces history of one of few resources: all together are fetched for a minute."""
    return one["event_type"].split(".")[2] in {"sleep", "activity", "heartrate"}


@pytest.mark.stack
def test_the_package_builds_against_a_running_stack(examples: Path, project: Path) -> None:
    """Breaks if the marts lack rows that a stack has stored of webhooks and history, or a test of the package fails."""
    (settings,) = documents(PACKAGE / "dbt_project.yml")
    with Simulator(2, 5) as simulator, started(**simulator.environment, HEADRACE_REQUEST_RATE="100/second") as stack:
        info, events = stack.info, chain(first_events(simulator.world), islice(live_events(simulator.world), 100))
        wanted = (one for one in events if not one["event_type"].startswith("historical.") or is_fetched(one))
        with Sender(f"{info['web']}/webhooks/junction", info["junction_webhook_secret"]) as sender:
            sender.send_all(wanted, 100)
        until(lambda: stack.rows(PENDING) == [(False,)], 120, every=0.5)
        with psycopg.connect(info["database_url"], autocommit=True) as connection:
            url = created_reader(connection, info["database_url"])
        with dbt(examples, project, url) as process:
            succeeded, output = process.run("build")
            assert succeeded, output
            assert "WARN=0 ERROR=0 SKIP=0" in output
            succeeded, output = process.run("source", "freshness")
            assert succeeded, output
        (found,) = stack.rows(MARTS)
        assert [found] == stack.rows(SOURCES, settings["vars"]["headrace_metrics"])
        assert min(found) >= 2


def test_the_package_builds_three_marts(
    engine: Engine, settings: Settings, process: Dbt, emptier: psycopg.Connection
) -> None:
    """Breaks if a view loses a column that a mart reads, a value is wrong, or wrong data and late data pass."""
    world = World(engine, settings)
    succeeded, output = process.run("build")  # of nothing
    assert succeeded, output
    world.store()
    succeeded, output = process.run("build")
    assert succeeded, output
    assert "WARN=0 ERROR=0 SKIP=0" in output
    assert "Deprecat" not in output
    with emptier.cursor(row_factory=dict_row) as cursor:
        _check_days(cursor)
        _check_sleep(cursor)
        _check_people(cursor)
    run(
        engine,
        "UPDATE headrace.sleep SET stored_at = now() - interval '3 days'",
        "UPDATE headrace.days SET method = 'guessed', computed_at = now() - interval '4 days'",
    )
    succeeded, output = process.run("source", "freshness")
    assert not succeeded
    for line in (
        "PASS freshness of health.changes",
        "WARN freshness of health.sleep",
        "ERROR STALE freshness of health.daily",
    ):
        assert line in output
    succeeded, output = process.run("test", "--select", "source:health.daily")
    assert not succeeded
    assert "WARN=0 ERROR=1 SKIP=0" in output


def _check_days(cursor: psycopg.Cursor[dict[str, Any]]) -> None:
    days = cursor.execute("SELECT * FROM analytics.fct_days ORDER BY person_id, local_date").fetchall()
    assert [(one["person_id"], one["local_date"]) for one in days] == [
        ("member-1", DAY),
        ("member-1", YESTERDAY),
        ("u3", DAY),
    ]
    day = {name: value for name, value in days[0].items() if value is not None}
    assert day.pop("computed_at").date() == datetime.now(UTC).date()
    assert day == {
        "person_id": "member-1",
        "local_date": DAY,
        "steps": 500,
        "heartrate_avg": 60,
        "heartrate_min": 60,
        "heartrate_max": 60,
        "sleep_total": 25200,
        "sleep_deep": 3600,
        "heartrate_minutes": 1,
        "steps_provider": "garmin",
        "is_local_date": True,
    }
    assert (days[1]["steps"], days[1]["sleep_total"]) == (700, None)
    assert (days[2]["workouts_count"], days[2]["workouts_distance"], days[2]["is_local_date"]) == (1, 8000.5, False)


def _check_sleep(cursor: psycopg.Cursor[dict[str, Any]]) -> None:
    (night,) = cursor.execute("SELECT * FROM analytics.fct_sleep").fetchall()
    found = {name: value for name, value in night.items() if value is not None}
    assert found == {
        "person_id": "member-1",
        "local_date": DAY,
        "is_night": True,
        "user_id": "u1",
        "sleep_id": "watch",
        "provider": "garmin",
        "source_type": "watch",
        "bedtime_start": datetime(2026, 3, 13, 22, tzinfo=UTC),
        "bedtime_stop": datetime(2026, 3, 14, 6, tzinfo=UTC),
        "local_bedtime_start": datetime(2026, 3, 13, 23),  # noqa: DTZ001
        "local_bedtime_stop": datetime(2026, 3, 14, 7),  # noqa: DTZ001
        "time_in_bed": 28800,
        "total": 25200,
        "deep": 3600,
        "efficiency": 0.875,
        "other_sessions": 1,
    }


def _check_people(cursor: psycopg.Cursor[dict[str, Any]]) -> None:
    people = cursor.execute("SELECT * FROM analytics.dim_people ORDER BY person_id").fetchall()
    assert all(one.pop("first_seen") for one in people)
    assert people[0] == {
        "person_id": "member-1",
        "client_user_id": "member-1",
        "users": 2,
        "first_date": DAY,
        "last_date": YESTERDAY,
        "days_with_data": 2,
        "providers": "garmin, oura",
        "connections": 2,
        "connections_in_error": 1,
    }
    assert [tuple(one.values()) for one in people[1:]] == [("u3", None, 1, DAY, DAY, 1, None, 0, 0)]


def test_the_columns_of_fct_days_are_metrics() -> None:
    """Breaks if a metric of the package does not exist, so that its column is always empty."""
    (project,) = documents(PACKAGE / "dbt_project.yml")
    assert set(project["vars"]["headrace_metrics"]) <= {one for metrics in derived().values() for one in metrics}
