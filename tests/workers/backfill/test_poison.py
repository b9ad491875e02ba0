"""Pages that PostgreSQL does not execute: a backfill ends with a dead letter or a reason, and never loops."""

from sqlalchemy import Engine

from app.config.settings import Settings
from tests.support import rows
from tests.support.backfills import backfill, fetch_history, notice, settle, status
from tests.support.poison import RAISE, fault
from tests.support.provider import Provider, daily, heartrates, hourly, workouts
from workers.ingest.apply import Applier
from workers.ingest.outcomes import MAX_TRIES
from workers.ingest.replay import replay_dead_letters
from workers.store import backfill_admin, dead_letters


def test_a_record_that_cannot_be_stored_becomes_a_dead_letter(engine: Engine, settings: Settings) -> None:
    """Breaks if one workout that meets a damaged page has its page fetched for ever, or costs the other workouts."""
    provider = Provider(workouts(daily(5)), limit=100)
    with fault(engine, RAISE.format("XX001"), "NEW.id = 'u1-010312'"):
        fetch_history(engine, settings, provider, notice(resource="workouts"))
    assert status(engine) == [("complete", 1, 1)]
    assert len(rows(engine, "SELECT 1 FROM health.workouts")) == 4
    (dead,) = dead_letters.listed(engine)
    assert "damaged page" in dead.reason
    assert replay_dead_letters(engine, Applier(engine, settings), [dead]) == {"applied": 1}
    assert len(rows(engine, "SELECT 1 FROM health.workouts")) == 5


def test_samples_that_cannot_be_stored_fail_the_backfill(engine: Engine, settings: Settings) -> None:
    """Breaks if samples that time out are lost, or fetched for ever; `resume` fetches them when the cause is gone."""
    provider = Provider(heartrates(hourly(3)), limit=100)
    with fault(engine, RAISE.format("57014"), "NEW.value = 60", "samples"):
        fetch_history(engine, settings, provider, notice(days=(0, 3)))
    assert (status(engine), len(provider.requests)) == ([("failed", 0, 1)], MAX_TRIES)
    found = backfill(engine)
    assert "57014" in found["error"]
    assert f"headrace backfill resume {found['id']}" in found["error"]
    backfill_admin.resume(engine, [found["id"]])
    settle(engine, provider.fetcher(engine, settings))
    assert status(engine) == [("complete", 1, 1)]
    assert len(rows(engine, "SELECT 1 FROM health.heartrate")) == 72
