"""What is done from time to time: when it is due, who is at it, how far it has come."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine, text

from tests.support import rows
from workers.store import jobs

NAME = "reconcile"


class Place(msgspec.Struct):
    """How far it has come."""

    page: int
    name: str = 'it\'s "here", 100 %: \N{GREEK SMALL LETTER ALPHA}'


def execute(engine: Engine, query: str) -> None:
    """Changes the database behind everybody's back."""
    with engine.begin() as connection:
        connection.execute(text(query))


def hurry(engine: Engine, **columns: str) -> None:
    """Lets the time pass until a chore is due, and leases run out."""
    changes = {"due_at": "now()"} | columns
    execute(engine, f"UPDATE headrace.jobs SET {', '.join(f'{name} = {to}' for name, to in changes.items())}")


def chore(engine: Engine) -> dict[str, Any]:
    """The one chore there is: in how many seconds it is due, and for how many it is held."""
    query = """
        SELECT name, position, extract(epoch FROM due_at - now())::float8 AS due,
               CASE WHEN lease_until > now() THEN extract(epoch FROM lease_until - now())::float8 ELSE 0 END AS held
        FROM headrace.jobs"""
    (row,) = rows(engine, query)
    return row


def test_a_chore_is_due_after_a_period(engine: Engine) -> None:
    """Breaks if it is done at once after the installation, or each plan puts it off."""
    assert not jobs.ensure_job(engine, NAME, 3600)
    assert 3590 < chore(engine)["due"] <= 3600
    assert chore(engine)["position"] is None
    hurry(engine, due_at="now() + interval '10 seconds'")
    assert not jobs.ensure_job(engine, NAME, 3600)
    assert chore(engine)["due"] <= 10
    hurry(engine)
    assert jobs.ensure_job(engine, NAME, 3600)
    assert jobs.ensure_job(engine, NAME, 3600)  # to say so is not to take it


@pytest.mark.parametrize(
    ("due", "lease", "free"),
    [
        ("now()", "'-infinity'", True),
        ("now() - interval '9 days'", "now() - interval '1 second'", True),
        ("now() + interval '5 seconds'", "'-infinity'", False),
        ("now()", "now() + interval '5 seconds'", False),
    ],
)
def test_only_what_is_due_and_free_is_taken(engine: Engine, due: str, lease: str, *, free: bool) -> None:
    """Breaks if a chore is done too early, or taken from somebody who is at it."""
    jobs.ensure_job(engine, NAME, 0)
    hurry(engine, due_at=due, lease_until=lease)
    assert jobs.ensure_job(engine, NAME, 0) is free
    before = chore(engine)
    taken = jobs.claim(engine, NAME)
    assert taken == (jobs.Job(NAME, None, None) if free else None)
    assert (59 < chore(engine)["held"] <= 60) or (not free and chore(engine)["held"] <= before["held"])
    assert jobs.claim(engine, NAME) is None


def test_a_chore_that_nobody_planned_is_not_taken(engine: Engine) -> None:
    """Breaks if a message about a chore of yesterday's database stops a worker."""
    assert jobs.claim(engine, NAME) is None
    jobs.save(engine, NAME, Place(1), 0)
    assert rows(engine, "SELECT 1 FROM headrace.jobs") == []


def test_chores_do_not_know_each_other(engine: Engine) -> None:
    """Breaks if one chore's place, lease or time is another's."""
    for name in ("a", "b"):
        jobs.ensure_job(engine, name, 0)
    hurry(engine)
    assert jobs.claim(engine, "a")
    jobs.save(engine, "a", Place(7), 50)
    assert jobs.claim(engine, "b") == jobs.Job("b", None, None)
    assert jobs.claim(engine, "a") is None


@pytest.mark.parametrize("held", [True, False])
def test_the_place_is_kept(engine: Engine, *, held: bool) -> None:
    """Breaks if an interrupted chore begins again, or is given to two while somebody goes on with it."""
    jobs.ensure_job(engine, NAME, 0)
    hurry(engine)
    jobs.claim(engine, NAME)
    jobs.save(engine, NAME, Place(3), 0, held=held)
    assert (chore(engine)["held"] > 59) is held
    assert (jobs.claim(engine, NAME) is None) is held
    hurry(engine, lease_until="now() - interval '1 second'")
    taken = jobs.claim(engine, NAME)
    assert taken
    assert taken.position
    assert msgspec.json.decode(taken.position, type=Place) == Place(3)


def test_a_place_may_wait(engine: Engine) -> None:
    """Breaks if a chore that was told to wait comes too early, or is held meanwhile."""
    jobs.ensure_job(engine, NAME, 0)
    hurry(engine)
    jobs.claim(engine, NAME)
    jobs.save(engine, NAME, Place(3), 120.5)
    assert 119 < chore(engine)["due"] <= 120.5
    assert chore(engine)["held"] == 0
    assert not jobs.ensure_job(engine, NAME, 0)
    assert jobs.claim(engine, NAME) is None


def test_the_end_forgets_the_place(engine: Engine) -> None:
    """Breaks if the next time begins where the last one ended."""
    jobs.ensure_job(engine, NAME, 0)
    hurry(engine)
    jobs.claim(engine, NAME)
    jobs.save(engine, NAME, Place(3), 0, held=True)
    jobs.save(engine, NAME, None, 3600)
    assert chore(engine)["position"] is None
    hurry(engine)
    taken = jobs.claim(engine, NAME)
    assert taken is not None
    assert taken.position is None
    assert taken.done_at is not None  # when it was


def test_only_one_of_many_takes_it(engine: Engine) -> None:
    """Breaks if workers that come at once all do the same."""
    jobs.ensure_job(engine, NAME, 0)
    for _ in range(10):
        hurry(engine, lease_until="'-infinity'")
        with ThreadPoolExecutor(3) as pool:
            taken = list(pool.map(lambda _: jobs.claim(engine, NAME), range(3)))
        assert sum(one is not None for one in taken) == 1


# The account
