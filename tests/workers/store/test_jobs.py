"""Scheduled jobs: due times, leases and positions."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine

from tests.support import rows
from tests.support.database import run
from workers.store import jobs
from workers.store.engine import transaction

NAME = "reconcile"


class Position(msgspec.Struct):
    page: int
    name: str = 'it\'s "here", 100 %: \N{GREEK SMALL LETTER ALPHA}'


def update_job(engine: Engine, **columns: str) -> None:
    """Makes jobs due, and changes other columns."""
    changes = {"due_at": "now()"} | columns
    run(engine, f"UPDATE headrace.jobs SET {', '.join(f'{name} = {to}' for name, to in changes.items())}")


def job_row(engine: Engine) -> dict[str, Any]:
    """The one job, with the seconds until it is due and until its lease ends."""
    query = """
        SELECT name, position, extract(epoch FROM due_at - now())::float8 AS due,
               CASE WHEN lease_until > now() THEN extract(epoch FROM lease_until - now())::float8 ELSE 0 END AS held
        FROM headrace.jobs"""
    (row,) = rows(engine, query)
    return row


def test_a_job_is_due_after_a_period(engine: Engine) -> None:
    """Breaks if a job runs right after the installation, or every call delays it."""
    assert not jobs.ensure_job(engine, NAME, 3600)
    assert 3590 < job_row(engine)["due"] <= 3600
    assert job_row(engine)["position"] is None
    update_job(engine, due_at="now() + interval '10 seconds'")
    assert not jobs.ensure_job(engine, NAME, 3600)
    assert job_row(engine)["due"] <= 10
    update_job(engine)
    assert jobs.ensure_job(engine, NAME, 3600)
    assert jobs.ensure_job(engine, NAME, 3600)  # does not claim it


@pytest.mark.parametrize(
    ("due", "lease", "free"),
    [
        ("now()", "'-infinity'", True),
        ("now() - interval '9 days'", "now() - interval '1 second'", True),
        ("now() + interval '5 seconds'", "'-infinity'", False),
        ("now()", "now() + interval '5 seconds'", False),
    ],
)
def test_only_a_due_and_free_job_is_claimed(engine: Engine, due: str, lease: str, *, free: bool) -> None:
    """Breaks if a job runs too early, or while another process holds it."""
    jobs.ensure_job(engine, NAME, 0)
    update_job(engine, due_at=due, lease_until=lease)
    assert jobs.ensure_job(engine, NAME, 0) is free
    before = job_row(engine)
    claimed = jobs.claim(engine, NAME)
    assert claimed == (jobs.Job(NAME, None, None) if free else None)
    assert (59 < job_row(engine)["held"] <= 60) or (not free and job_row(engine)["held"] <= before["held"])
    assert jobs.claim(engine, NAME) is None


def test_an_unknown_job_is_not_claimed(engine: Engine) -> None:
    """Breaks if a message about a job of a former database crashes a worker."""
    assert jobs.claim(engine, NAME) is None
    jobs.save(engine, NAME, Position(1), 0)
    assert rows(engine, "SELECT 1 FROM headrace.jobs") == []


def test_jobs_are_independent(engine: Engine) -> None:
    """Breaks if a job has another job's position, lease or time."""
    for name in ("a", "b"):
        jobs.ensure_job(engine, name, 0)
    update_job(engine)
    assert jobs.claim(engine, "a")
    jobs.save(engine, "a", Position(7), 50)
    assert jobs.claim(engine, "b") == jobs.Job("b", None, None)
    assert jobs.claim(engine, "a") is None


@pytest.mark.parametrize("held", [True, False])
def test_the_position_is_saved(engine: Engine, *, held: bool) -> None:
    """Breaks if an interrupted job starts again, or is claimed while another process holds it."""
    jobs.ensure_job(engine, NAME, 0)
    update_job(engine)
    jobs.claim(engine, NAME)
    jobs.save(engine, NAME, Position(3), 0, held=held)
    assert (job_row(engine)["held"] > 59) is held
    assert (jobs.claim(engine, NAME) is None) is held
    update_job(engine, lease_until="now() - interval '1 second'")
    claimed = jobs.claim(engine, NAME)
    assert claimed
    assert claimed.position
    assert msgspec.json.decode(claimed.position, type=Position) == Position(3)


def test_a_saved_job_may_wait(engine: Engine) -> None:
    """Breaks if a delayed job is due too early, or stays leased."""
    jobs.ensure_job(engine, NAME, 0)
    update_job(engine)
    jobs.claim(engine, NAME)
    jobs.save(engine, NAME, Position(3), 120.5)
    assert 119 < job_row(engine)["due"] <= 120.5
    assert job_row(engine)["held"] == 0
    assert not jobs.ensure_job(engine, NAME, 0)
    assert jobs.claim(engine, NAME) is None


def test_completion_clears_the_position(engine: Engine) -> None:
    """Breaks if the next run starts where the last one ended."""
    jobs.ensure_job(engine, NAME, 0)
    update_job(engine)
    jobs.claim(engine, NAME)
    jobs.save(engine, NAME, Position(3), 0, held=True)
    jobs.save(engine, NAME, None, 3600)
    assert job_row(engine)["position"] is None
    update_job(engine)
    claimed = jobs.claim(engine, NAME)
    assert claimed is not None
    assert claimed.position is None
    assert claimed.done_at is not None


def test_only_one_concurrent_claim_succeeds(engine: Engine) -> None:
    """Breaks if concurrent workers run the same job."""
    jobs.ensure_job(engine, NAME, 0)
    for _ in range(10):
        update_job(engine, lease_until="'-infinity'")
        with ThreadPoolExecutor(3) as pool:
            claimed = list(pool.map(lambda _: jobs.claim(engine, NAME), range(3)))
        assert sum(one is not None for one in claimed) == 1


def test_a_run_that_was_not_completed_leaves_the_time_of_the_last_one(engine: Engine) -> None:
    """Breaks if a failed run counts as complete, so that the next one compares nothing before it."""
    jobs.ensure_job(engine, NAME, 0)
    jobs.save(engine, NAME, None, 3600)
    (before,) = rows(engine, "SELECT done_at FROM headrace.jobs")
    jobs.save(engine, NAME, None, 7200, completed=False)
    assert rows(engine, "SELECT done_at FROM headrace.jobs") == [before]
    assert job_row(engine)["due"] > 7100


def test_a_job_is_held_whether_or_not_it_is_due(engine: Engine) -> None:
    """Breaks if a command and a worker run one job together, or a command that waits loses its lease."""
    assert not jobs.hold(engine, NAME)  # there is no such job
    jobs.ensure_job(engine, NAME, 3600)
    assert jobs.hold(engine, NAME)
    assert 55 < job_row(engine)["held"] <= 60
    assert not jobs.hold(engine, NAME)
    assert jobs.hold(engine, NAME, 30, renew=True)
    assert 85 < job_row(engine)["held"] <= 90
    update_job(engine)
    assert jobs.claim(engine, NAME) is None
    jobs.release(engine, NAME)
    assert jobs.claim(engine, NAME) is not None


def test_notes_are_merged(engine: Engine) -> None:
    """Breaks if one value of a note removes another, or a note is claimed as a job."""
    with transaction(engine) as connection:
        assert jobs.noted(connection, "token") is None
    jobs.note(engine, "token", {"expires_at": "2026-12-01", "fault": ""})
    jobs.note(engine, "token", {"fault": "refused"})
    with transaction(engine) as connection:
        noted = jobs.noted(connection, "token")
    assert noted is not None
    assert msgspec.json.decode(noted) == {"expires_at": "2026-12-01", "fault": "refused"}
