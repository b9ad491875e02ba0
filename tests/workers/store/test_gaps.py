"""The table of gaps: contents, age, and replacement by a page of users."""

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Engine, text

from tests.support import rows
from workers.store import coverage
from workers.store.coverage import Gap, ResourceKey
from workers.store.engine import transaction

START = datetime(2026, 3, 10, tzinfo=UTC)
DAY = timedelta(days=1)
SLEEP = ResourceKey("u1", "garmin", "sleep")


def keep(engine: Engine, *found: Gap, users: tuple[str, ...] = ("u1",), part: str = "pulls") -> None:
    """Stores the gaps of these users, two days after the last call."""
    earlier = "UPDATE headrace.gaps SET since = since - interval '2 days', seen_at = seen_at - interval '2 days'"
    with transaction(engine) as connection:
        connection.execute(text(earlier))
        coverage.keep_gaps(connection, part, users, found)


def account(engine: Engine) -> list[tuple[Any, ...]]:
    """The stored gaps: user, part, responsible party, and age in days."""
    query = """SELECT user_id, part, whose, (extract(epoch FROM now() - since) / 86400)::int AS days
               FROM headrace.gaps ORDER BY 1, 2"""
    return [tuple(row.values()) for row in rows(engine, query)]


OURS, THEIRS = Gap(SLEEP, "ours", "why", ((START, START + DAY),)), Gap(SLEEP, "aggregator", "why", (), is_pulling=True)


def test_a_gap_is_stored_as_found(engine: Engine) -> None:
    """Breaks if an edge, a reason or the responsible party is lost."""
    windows = ((START, START + DAY), (START + 5 * DAY, START + 7 * DAY))
    keep(engine, OURS, Gap(SLEEP._replace(resource="hrv"), "ours", "holes", windows))
    query = "SELECT resource, whose, reason, is_pulling, window_start, window_end FROM headrace.gaps ORDER BY 1"
    assert [tuple(row.values()) for row in rows(engine, query)] == [
        ("hrv", "ours", "holes", False, START, START + 7 * DAY),
        ("sleep", "ours", "why", False, START, START + DAY),
    ]
    keep(engine, THEIRS)
    assert [tuple(row.values()) for row in rows(engine, query)] == [("sleep", "aggregator", "why", True, None, None)]


def test_since_is_kept_for_the_same_responsible_party(engine: Engine) -> None:
    """Breaks if a gap looks new each time, or a new responsible party inherits its age."""
    keep(engine, OURS)
    assert account(engine) == [("u1", "pulls", "ours", 0)]
    keep(engine, Gap(SLEEP, "ours", "another reason"))
    assert account(engine) == [("u1", "pulls", "ours", 2)]
    keep(engine, THEIRS)
    assert account(engine) == [("u1", "pulls", "aggregator", 0)]
    keep(engine, THEIRS)
    keep(engine, THEIRS)
    assert account(engine) == [("u1", "pulls", "aggregator", 4)]


def test_a_closed_gap_is_deleted(engine: Engine) -> None:
    """Breaks if a closed gap is still shown."""
    keep(engine, OURS)
    keep(engine)
    assert account(engine) == []


def test_only_gaps_of_the_page_are_replaced(engine: Engine) -> None:
    """Breaks if a page of users deletes other users' gaps, or one part the other part's gaps."""
    other = Gap(SLEEP._replace(user_id="u2"), "provider", "why")
    keep(engine, OURS, other, users=("u1", "u2"))
    keep(engine, OURS, part="supplies")
    keep(engine, users=("u1",), part="supplies")
    assert account(engine) == [("u1", "pulls", "ours", 4), ("u2", "pulls", "provider", 4)]
    keep(engine, users=("u1", "u3"))
    assert account(engine) == [("u2", "pulls", "provider", 6)]
    keep(engine, users=())
    assert account(engine) == [("u2", "pulls", "provider", 8)]


def test_a_gap_found_twice_is_stored_once(engine: Engine) -> None:
    """Breaks if a user who is on a page twice fails the reconciliation."""
    keep(engine, OURS, THEIRS)
    assert account(engine) == [("u1", "pulls", "aggregator", 0)]


def test_open_pulls_are_found(engine: Engine) -> None:
    """Breaks if an open pull is forgotten, or a closed one, or another user's, is returned."""
    pulling = [Gap(SLEEP._replace(user_id=user), "aggregator", "retrying", is_pulling=True) for user in ("u1", "u2")]
    keep(engine, *pulling, Gap(SLEEP._replace(resource="hrv"), "aggregator", "gives no more"), users=("u1", "u2"))
    with transaction(engine) as connection:
        assert coverage.still_pulling(connection, ["u1", "u3"]) == {SLEEP}
        assert coverage.still_pulling(connection, []) == set()
    keep(engine, OURS)
    with transaction(engine) as connection:
        assert coverage.still_pulling(connection, ["u1", "u2"]) == {SLEEP._replace(user_id="u2")}
