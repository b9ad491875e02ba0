"""What is done from time to time: when it is due, who is at it, how far it has come; and the account of gaps."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine, text

from tests.support import rows
from workers.store import gaps, jobs
from workers.store.coverage import ResourceKey
from workers.store.engine import transaction
from workers.store.gaps import Gap

START = datetime(2026, 3, 10, tzinfo=UTC)
DAY = timedelta(days=1)
NAME = "reconcile"
SLEEP = ResourceKey("u1", "garmin", "sleep")


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


def keep(engine: Engine, *found: Gap, users: tuple[str, ...] = ("u1",), part: str = "pulls") -> None:
    """Puts down what was found of these people, two days after the last time."""
    execute(engine, "UPDATE headrace.gaps SET since = since - interval '2 days', seen_at = seen_at - interval '2 days'")
    with transaction(engine) as connection:
        gaps.keep_gaps(connection, part, users, found)


def account(engine: Engine) -> list[tuple[Any, ...]]:
    """What is kept: whose sleep, whose turn, and for how many days."""
    query = """SELECT user_id, part, whose, (extract(epoch FROM now() - since) / 86400)::int AS days
               FROM headrace.gaps ORDER BY 1, 2"""
    return [tuple(row.values()) for row in rows(engine, query)]


OURS, THEIRS = Gap(SLEEP, "ours", "why", ((START, START + DAY),)), Gap(SLEEP, "aggregator", "why", (), is_pulling=True)


def test_a_gap_is_kept_as_it_was_found(engine: Engine) -> None:
    """Breaks if an edge, a reason or whose turn it is gets lost."""
    windows = ((START, START + DAY), (START + 5 * DAY, START + 7 * DAY))
    keep(engine, OURS, Gap(SLEEP._replace(resource="hrv"), "ours", "holes", windows))
    query = "SELECT resource, whose, reason, is_pulling, window_start, window_end FROM headrace.gaps ORDER BY 1"
    assert [tuple(row.values()) for row in rows(engine, query)] == [
        ("hrv", "ours", "holes", False, START, START + 7 * DAY),
        ("sleep", "ours", "why", False, START, START + DAY),
    ]
    keep(engine, THEIRS)
    assert [tuple(row.values()) for row in rows(engine, query)] == [("sleep", "aggregator", "why", True, None, None)]


def test_since_when_is_kept_while_it_is_the_same_turn(engine: Engine) -> None:
    """Breaks if a gap looks new each time, or is blamed for longer on somebody whose turn it has just become."""
    keep(engine, OURS)
    assert account(engine) == [("u1", "pulls", "ours", 0)]
    keep(engine, Gap(SLEEP, "ours", "another reason"))
    assert account(engine) == [("u1", "pulls", "ours", 2)]
    keep(engine, THEIRS)
    assert account(engine) == [("u1", "pulls", "aggregator", 0)]
    keep(engine, THEIRS)
    keep(engine, THEIRS)
    assert account(engine) == [("u1", "pulls", "aggregator", 4)]


def test_a_gap_that_is_over_goes(engine: Engine) -> None:
    """Breaks if what was mended is still shown."""
    keep(engine, OURS)
    keep(engine)
    assert account(engine) == []


def test_only_what_was_looked_at_is_replaced(engine: Engine) -> None:
    """Breaks if a page about some people forgets the others, or one part the other's account."""
    other = Gap(SLEEP._replace(user_id="u2"), "provider", "why")
    keep(engine, OURS, other, users=("u1", "u2"))
    keep(engine, OURS, part="supplies")
    keep(engine, users=("u1",), part="supplies")
    assert account(engine) == [("u1", "pulls", "ours", 4), ("u2", "pulls", "provider", 4)]
    keep(engine, users=("u1", "u3"))
    assert account(engine) == [("u2", "pulls", "provider", 6)]
    keep(engine, users=())
    assert account(engine) == [("u2", "pulls", "provider", 8)]


def test_one_gap_found_twice_is_one(engine: Engine) -> None:
    """Breaks if somebody who is on a page twice ends the comparison of all."""
    keep(engine, OURS, THEIRS)
    assert account(engine) == [("u1", "pulls", "aggregator", 0)]


def test_what_is_still_being_pulled_is_known(engine: Engine) -> None:
    """Breaks if a pull that goes on is forgotten, or one that is over, or another's, holds something up."""
    pulling = [Gap(SLEEP._replace(user_id=user), "aggregator", "retrying", is_pulling=True) for user in ("u1", "u2")]
    keep(engine, *pulling, Gap(SLEEP._replace(resource="hrv"), "aggregator", "gives no more"), users=("u1", "u2"))
    with transaction(engine) as connection:
        assert gaps.still_pulling(connection, ["u1", "u3"]) == {SLEEP}
        assert gaps.still_pulling(connection, []) == set()
    keep(engine, OURS)
    with transaction(engine) as connection:
        assert gaps.still_pulling(connection, ["u1", "u2"]) == {SLEEP._replace(user_id="u2")}
