"""The account of gaps: what is kept of them, since when, and what a page about some people replaces."""

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Engine, text

from tests.support import rows
from workers.store import gaps
from workers.store.coverage import ResourceKey
from workers.store.engine import transaction
from workers.store.gaps import Gap

START = datetime(2026, 3, 10, tzinfo=UTC)
DAY = timedelta(days=1)
SLEEP = ResourceKey("u1", "garmin", "sleep")


def keep(engine: Engine, *found: Gap, users: tuple[str, ...] = ("u1",), part: str = "pulls") -> None:
    """Puts down what was found of these people, two days after the last time."""
    earlier = "UPDATE headrace.gaps SET since = since - interval '2 days', seen_at = seen_at - interval '2 days'"
    with transaction(engine) as connection:
        connection.execute(text(earlier))
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
