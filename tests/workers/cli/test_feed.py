"""`headrace feed`: named consumers keep their position, and never skip changes silently."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine

from tests.support import rows, until
from tests.support.cli import Headrace, error_line
from tests.support.database import run
from workers.store import consumers, feed
from workers.store.engine import transaction
from workers.store.feed import Change, Sequencer, announce

Fill = Callable[..., None]


@pytest.fixture
def fill(engine: Engine) -> Fill:
    """Adds changes with these record ids to the feed."""

    def add(*names: str) -> None:
        with transaction(engine) as connection:
            announce(
                connection,
                [Change("put", "u1", "workouts", "garmin", "watch", one, None, None, 1, "webhook") for one in names],
            )
        Sequencer(engine).run()

    return add


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def read(headrace: Headrace, *words: str) -> list[str]:
    done = headrace("feed", "read", "--consumer", "c1", "--json", *words)
    assert done.exit_code == 0, done.stderr
    return [one["id"] for one in lines(done.stdout)]


def test_a_consumer_reads_until_it_acknowledges(headrace: Headrace, fill: Fill) -> None:
    """Breaks if reading moves the position, or acknowledging does not."""
    fill("w1", "w2", "w3")
    assert read(headrace, "--limit", "2") == read(headrace, "--limit", "2") == ["w1", "w2"]
    assert headrace("feed", "ack", "--consumer", "c1", 2).exit_code == 0
    assert read(headrace) == ["w3"]
    assert headrace("feed", "ack", "--consumer", "c1", 3).exit_code == 0
    assert read(headrace) == []
    shown = headrace("feed", "read", "--consumer", "c2").stdout.splitlines()
    assert shown[0].split("  ", 2)[2] == "put  u1  workouts  garmin/watch  w1  1 rows"


def test_positions_that_do_not_exist_are_refused(headrace: Headrace, fill: Fill) -> None:
    """Breaks if a typing error skips changes for good, or moves a consumer back unnoticed."""
    fill("w1", "w2")
    read(headrace)
    assert "position 3 does not exist yet" in error_line(headrace("feed", "ack", "--consumer", "c1", 3))
    assert headrace("feed", "ack", "--consumer", "c1", 2).exit_code == 0
    assert headrace("feed", "ack", "--consumer", "c1", 2).exit_code == 0  # again, after a lost answer
    assert "reset --consumer c1 --to 1" in error_line(headrace("feed", "ack", "--consumer", "c1", 1))
    assert "unknown consumer other" in error_line(headrace("feed", "ack", "--consumer", "other", 1), 4)
    assert "does not exist yet" in error_line(headrace("feed", "reset", "--consumer", "c1", "--to", "9"))


def test_a_consumer_can_be_reset_listed_and_removed(headrace: Headrace, fill: Fill) -> None:
    """Breaks if `reset` goes to another place, or `list` shows another lag."""
    fill("w1", "w2", "w3")
    for to, left, told in (
        ("now", [], "3"),
        ("start", ["w1", "w2", "w3"], "0, it was at 3"),
        ("1", ["w2", "w3"], "1, it was at 0"),
    ):
        done = headrace("feed", "reset", "--consumer", "c1", "--to", to)
        assert done.stdout == f"consumer c1 continues after position {told}\n"
        assert read(headrace) == left
    (listed,) = json.loads(headrace("feed", "list", "--json").stdout)
    assert (listed["consumer"], listed["position"], listed["lag"], listed["state"]) == ("c1", 1, 2, "ok")
    assert 0 < listed["lag_seconds"] < 60
    assert headrace("feed", "remove", "--consumer", "c1").stdout == "removed consumer c1, which was at position 1\n"
    assert json.loads(headrace("feed", "list", "--json").stdout) == []
    assert "unknown consumer" in error_line(headrace("feed", "remove", "--consumer", "c1"), 4)


def test_dropped_changes_end_with_status_3(headrace: Headrace, fill: Fill, engine: Engine) -> None:
    """Breaks if a consumer that fell behind continues behind a gap, or one that has read all gets an error."""
    fill("w1", "w2")
    read(headrace)
    headrace("feed", "reset", "--consumer", "current", "--to", "now")
    run(engine, "UPDATE headrace.changes SET changed_at = now() - interval '20 days'")
    fill("w3")
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    feed.drop_older(engine, today - timedelta(days=14))
    assert rows(engine, "SELECT * FROM health.feed") == [{"oldest_position": 3, "newest_position": 3}]
    done = headrace("feed", "read", "--consumer", "c1")
    assert "changes from 1 to 2 are dropped" in error_line(done, 3)
    listed = json.loads(headrace("feed", "list", "--json").stdout)
    assert {one["consumer"]: one["state"] for one in listed} == {"c1": "dropped", "current": "ok"}
    shown = headrace("feed", "read", "--consumer", "current", "--json")
    assert [one["id"] for one in lines(shown.stdout)] == ["w3"]
    assert "dropped" in error_line(headrace("feed", "reset", "--consumer", "c1", "--to", "1"), 3)
    assert headrace("feed", "reset", "--consumer", "c1", "--to", "start").exit_code == 0
    assert read(headrace) == ["w3"]


@pytest.mark.parametrize("to", ["", "-1", "yesterday", "1.5", "²"])
def test_a_wrong_place_is_refused(headrace: Headrace, to: str) -> None:
    """Breaks if a word that is no position ends in a traceback or moves the consumer."""
    assert headrace("feed", "reset", "--consumer", "c1", "--to", to).exit_code == 2


def test_a_follower_is_woken_by_new_changes(engine: Engine, fill: Fill, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if `read --follow` misses a change, or learns of it only by its next poll, which is too late here."""
    monkeypatch.setattr(consumers, "POLL_SECONDS", 60.0)
    fill("w1")
    pages = consumers.follow(engine, "c1", 0, 10)
    assert [one["id"] for one in next(pages)] == ["w1"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, pages)
        until(lambda: rows(engine, "SELECT 1 FROM pg_stat_activity WHERE query LIKE 'LISTEN headrace_changes%'"))
        fill("w2")
        assert [one["id"] for one in waiting.result(20)] == ["w2"]
    pages.close()
