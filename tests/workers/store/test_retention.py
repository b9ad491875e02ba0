"""Retention: what is older than its kind may be goes, in batches, and nothing else does."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from sqlalchemy import Engine

from app.broker.celery import make_celery
from app.config.settings import Settings, load
from app.errors import Misconfigured
from tests.support import START, apply, delivery, event, heartrate, rows, workout
from workers.celery.context import WorkerContext
from workers.celery.jobs import Jobs
from workers.store import retention

DAY = timedelta(days=1)
NOW = START + 400 * DAY
BEATS = "SELECT count(*) AS rows FROM health.heartrate"
WORKOUTS = "SELECT id FROM health.workouts ORDER BY id"


def keeping(settings: Settings, ledger: int = 0, **days: int) -> Settings:
    """The settings with these days by resource; `rest` is for all others."""
    return replace(
        settings, retention=tuple((name.replace("rest", "*"), n) for name, n in days.items()), ledger_days=ledger
    )


def run(engine: Engine, settings: Settings, now: datetime = NOW) -> dict[str, int]:
    """Removes what is to go then, and says how much; what a dry run says must be the same."""
    edges, gone = retention.limits(settings, now), dict[str, int]()
    told = retention.count(engine, edges)
    for name, number in retention.remove(engine, edges):
        gone[name] = gone.get(name, 0) + number
    assert gone == told
    return gone


@pytest.fixture
def stored(engine: Engine, settings: Settings) -> None:
    """Ten days of heart rates of two people, a workout a day, and a profile."""
    for user in ("u1", "u2"):
        apply(engine, settings, delivery(heartrate(user, {1440 * n: 60 for n in range(10)})))
    for n in range(10):
        day = (START + n * DAY).date().isoformat()
        apply(engine, settings, delivery(workout("u1", f"w{n}", calendar_date=day)))
    profile = {"id": "p1", "user_id": "u1", "height": 180, "source": {"provider": "garmin", "type": "watch"}}
    apply(engine, settings, delivery(event("daily.data.profile.created", "u1", profile)))


@pytest.mark.usefixtures("stored")
def test_nothing_goes_unless_it_is_said(engine: Engine, settings: Settings) -> None:
    """Breaks if an installation that sets nothing loses data."""
    assert run(engine, settings) == {}
    assert run(engine, keeping(settings, heartrate=0, rest=0)) == {}


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("batch", [3, 10_000])
def test_each_kind_has_its_own_time(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """Breaks if a kind is kept for longer or shorter than was said, or a batch's end is the end."""
    monkeypatch.setattr(retention, "BATCH", batch)
    monkeypatch.setattr(retention, "SERIES_PAGE", 1)
    assert run(engine, keeping(settings, heartrate=396, workouts=399)) == {"heartrate": 8, "workouts": 2}
    assert rows(engine, BEATS) == [{"rows": 12}]
    assert [row["id"] for row in rows(engine, WORKOUTS)] == [f"w{n}" for n in range(2, 10)]


@pytest.mark.usefixtures("stored")
def test_all_others_and_exceptions(engine: Engine, settings: Settings) -> None:
    """Breaks if an exception from the rule goes with the rest."""
    now = datetime.now(UTC)
    assert run(engine, keeping(settings, rest=10, workouts=0), now) == {"heartrate": 20}
    assert len(rows(engine, WORKOUTS)) == 10
    assert len(rows(engine, "SELECT 1 FROM health.profile")) == 1  # which has no day, and was written just now
    assert "profile" in run(engine, keeping(settings, rest=10, workouts=0), now + 11 * DAY)


def test_what_comes_late_goes_with_the_next_round(engine: Engine, settings: Settings) -> None:
    """Breaks if an old event cannot be stored, or stays for ever because it came after its time."""
    here = keeping(settings, heartrate=10)
    assert apply(engine, here, delivery(heartrate("u1", {0: 60}))) == {"applied": 1}
    assert run(engine, here) == {"heartrate": 1}
    assert apply(engine, here, delivery(heartrate("u1", {0: 60}))) == {"applied": 1}
    assert run(engine, here) == {"heartrate": 1}


def test_the_ledger_forgets_but_for_dead_letters(engine: Engine, settings: Settings) -> None:
    """Breaks if the ledger grows for ever, or a dead letter is left without whose it is."""
    sent = [delivery(workout("u1")), delivery(workout("u2", title="no\u0000good")), delivery(workout("u3"))]
    moments = (START, START, NOW)
    old = [msgspec.structs.replace(one, received_at=at.timestamp()) for one, at in zip(sent, moments, strict=True)]
    apply(engine, settings, *old)
    assert run(engine, keeping(settings, ledger=40)) == {"deliveries": 1}
    left = rows(engine, "SELECT outcome FROM health.deliveries ORDER BY outcome")
    assert [row["outcome"] for row in left] == ["applied", "dead"]


@pytest.mark.usefixtures("stored")
def test_the_sweep_sees_to_it_a_few_times_a_day(engine: Engine, settings: Settings, broker_url: str) -> None:
    """Breaks if nothing goes by itself, or every sweep looks at all tables."""
    here = keeping(settings, rest=1)
    work = WorkerContext(make_celery(here, "worker"), here)
    jobs = Jobs(work)
    jobs.sweep()
    assert rows(engine, BEATS) == [{"rows": 0}]
    apply(engine, settings, delivery(heartrate("u1", {0: 60})))
    jobs.sweep()
    assert rows(engine, BEATS) == [{"rows": 1}]
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
def test_a_wrong_setting_is_refused(name: str, value: str) -> None:
    """Breaks if a typing error keeps everything for ever, or removes what it should not."""
    with pytest.raises(Misconfigured, match=name):
        load({name: value})
    assert load({"HEADRACE_RETENTION": "sleep=3, *=0"}).retention == (("sleep", 3), ("*", 0))
