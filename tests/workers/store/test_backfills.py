"""Backfills: how notices become chunks."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text

from tests.support import message_id, rows
from workers.actions import NO_NOTES, Notes, Notice, Refused
from workers.store.backfills import (
    DEFAULT_HISTORY,
    BackfillRequest,
    ChunkPosition,
    _next,
    advance,
    claim,
    open_backfill,
    release,
)
from workers.store.engine import scalars, transaction


def day(number: int) -> datetime:
    return datetime(2026, 1, number, tzinfo=UTC)


def notice(user: str, start: int | None = 10, end: int | None = 20, *, final: bool = True) -> Notice:
    """History between two days of January."""
    window = [None if number is None else day(number) for number in (start, end)]
    return Notice(user, "oura", "sleep", *window, final)


def announce(engine: Engine, given: Notice, name: str | None = None) -> bool:
    """Processes a notice under its own delivery id."""
    with transaction(engine) as connection:
        asked = BackfillRequest("junction", name or message_id(day(1)), "notice", datetime.now(UTC))
        return bool(open_backfill(connection, asked, given))


def backfills(engine: Engine, user: str) -> list[dict[str, Any]]:
    return rows(engine, "SELECT * FROM health.backfills WHERE user_id = :user ORDER BY chunks_total", user=user)


def test_a_notice_opens_a_backfill(shared: Engine) -> None:
    """Breaks if a notice opens no backfill."""
    assert announce(shared, notice("opens"))
    (row,) = backfills(shared, "opens")
    assert (row["provider"], row["resource"], row["status"]) == ("oura", "sleep", "pending")
    assert (row["window_start"], row["window_end"], row["is_final_seen"]) == (day(10), day(20), True)
    assert (row["chunks_total"], row["chunks_done"], row["records"]) == (1, 0, 0)


def test_a_repeated_notice_is_ignored(shared: Engine) -> None:
    """Breaks if a redelivered message fetches history twice."""
    assert announce(shared, notice("again"), "msg_again")
    assert not announce(shared, notice("again"), "msg_again")
    assert backfills(shared, "again")[0]["chunks_total"] == 1


@pytest.mark.parametrize(
    ("windows", "whole"),
    [
        ([(10, 20), (1, 10)], (1, 20)),
        ([(10, 20), (12, 15)], (10, 20)),
        ([(10, 12), (20, 25)], (10, 25)),
    ],
)
def test_the_next_notice_extends_the_open_backfill(
    shared: Engine, windows: list[tuple[int, int]], whole: tuple[int, int]
) -> None:
    """Breaks if a chunk narrows the window, or opens a backfill of its own."""
    user = f"extends {windows}"
    for window in windows:
        assert announce(shared, notice(user, *window))
    (row,) = backfills(shared, user)
    assert row["chunks_total"] == len(windows)
    assert (row["window_start"], row["window_end"]) == (day(whole[0]), day(whole[1]))


def test_a_notice_without_a_window_means_the_default_range(shared: Engine) -> None:
    """Breaks if the history of a provider that states no window is not fetched."""
    before = datetime.now(UTC)
    assert announce(shared, notice("default", None, None))
    (row,) = backfills(shared, "default")
    assert before <= row["window_end"] <= datetime.now(UTC) + timedelta(days=1)
    assert row["window_end"] - row["window_start"] == DEFAULT_HISTORY >= timedelta(days=30)


@pytest.mark.parametrize(
    ("finals", "seen"), [((False,), False), ((False, True), True), ((True, False), True), ((False, False), False)]
)
def test_the_final_notice_is_remembered_in_any_order(shared: Engine, finals: tuple[bool, ...], *, seen: bool) -> None:
    """Breaks if a backfill whose final notice arrived early never completes, or one completes too soon."""
    user = f"final {finals}"
    for final in finals:
        announce(shared, notice(user, final=final))
    assert backfills(shared, user)[0]["is_final_seen"] is seen


@pytest.mark.parametrize("change", [{"user_id": "apart 2"}, {"provider": "garmin"}, {"resource": "workouts"}])
def test_another_user_provider_or_resource_is_another_backfill(shared: Engine, change: dict[str, str]) -> None:
    """Breaks if one backfill waits for another, or counts the other's chunks."""
    user = f"apart {change}"
    announce(shared, notice(user))
    announce(shared, replace(notice(user), **change))
    found = [*backfills(shared, user), *(backfills(shared, change["user_id"]) if "user_id" in change else [])]
    assert [row["chunks_total"] for row in found] == [1, 1]


@pytest.mark.parametrize(
    ("status", "days_ago", "final", "opens"),
    [
        ("pending", 9, True, 1),
        ("running", 9, True, 1),
        ("paused", 9, True, 1),
        ("complete", 0, True, 2),
        ("complete", 0, False, 1),  # a late chunk of that pull
        ("complete", 2, False, 2),
        ("failed", 0, True, 2),
        ("cancelled", 0, True, 2),
    ],
)
def test_a_notice_after_the_end_is_fetched_too(
    shared: Engine, status: str, days_ago: int, opens: int, *, final: bool
) -> None:
    """Breaks if history that is announced again after a re-authorisation is not fetched."""
    user = f"{status} {days_ago} {final}"
    announce(shared, notice(user))
    end = """UPDATE headrace.backfills SET status = :status, finished_at = now() - make_interval(days => :days)
        WHERE user_id = :user"""
    with shared.begin() as connection:
        connection.execute(text(end), {"status": status, "days": days_ago, "user": user})
    assert announce(shared, notice(user, final=final))
    found = backfills(shared, user)
    assert len(found) == opens
    assert sum(row["chunks_total"] for row in found) == 2
    assert any(row["status"] in ("pending", "running", "paused") for row in found)


def test_concurrent_notices_open_one_backfill(shared: Engine) -> None:
    """Breaks if two workers open two backfills for the same history, or one of them fails."""
    together = threading.Barrier(3)

    def run(number: int) -> bool:
        together.wait(20)
        return announce(shared, notice("at once", 10 + number, 20))

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, range(3))) == [True] * 3
    (row,) = backfills(shared, "at once")
    assert (row["chunks_total"], row["window_start"]) == (3, day(10))


def test_completed_chunks_are_counted(shared: Engine) -> None:
    """Breaks if progress is not shown."""
    for start in (1, 5):
        announce(shared, notice("counted", start))
    done = """UPDATE headrace.chunks SET status = 'done' WHERE window_start = :start AND backfill_id =
        (SELECT id FROM headrace.backfills WHERE user_id = 'counted')"""
    with shared.begin() as connection:
        connection.execute(text(done), {"start": day(5)})
    (row,) = backfills(shared, "counted")
    assert (row["chunks_total"], row["chunks_done"]) == (2, 1)


def advanced(engine: Engine, number: int, *refused: str, notes: Notes = NO_NOTES) -> str | None:
    """The error of a backfill after another page, with these rejected records."""
    with transaction(engine) as connection:
        work = _next(connection, number)
        assert work is not None
        then = replace(work, cursor=f"{work.cursor or ''}x", pages=work.pages + 1)
        rejected = [Refused(one, b"{}") for one in refused]
        assert advance(connection, work, then, pages=1, records=5, refused=rejected, notes=notes)
        query = text("SELECT error FROM headrace.backfills WHERE id = :id")
        return connection.scalar(query, {"id": number})


def claimed(engine: Engine, user: str) -> ChunkPosition:
    """The chunk of a new backfill of the user."""
    announce(engine, notice(user))
    (number,) = scalars(engine, text("SELECT id FROM headrace.backfills WHERE user_id = :user"), {"user": user})
    work = claim(engine, number, 9, 9)
    assert work is not None
    return work


def test_rejections_stay_and_other_errors_are_cleared(shared: Engine) -> None:
    """Breaks if missing records are not shown; if a past error remains; or if its text decides that."""
    work = claimed(shared, "refused")
    number = work.backfill_id
    assert advanced(shared, number) is None
    release(shared, work, 0, error="7 refused, first: not a refusal of records")
    assert advanced(shared, number) is None
    assert advanced(shared, number, "no id", "no time") == "2 refused, first: no id"
    release(shared, work, 0, error="status 503")
    assert advanced(shared, number) == "2 refused, first: no id"
    assert advanced(shared, number, "no value") == "3 refused, first: no id"


def test_notes_of_all_pages_stay(shared: Engine) -> None:
    """Breaks if a later page, or an error that is over, hides what an earlier page did not store as received."""
    work = claimed(shared, "noted")
    number = work.backfill_id
    null = "stored as NULL, because they cannot be read"
    assert advanced(shared, number, notes=Notes(("title", "calories"))) == f"{null}: calories, title"
    release(shared, work, 0, error="status 503")
    assert advanced(shared, number) == f"{null}: calories, title"
    expected = f"{null}: calories, distance, title; values without a time, which are in the payload only: 3"
    assert advanced(shared, number, notes=Notes(("title", "distance"), 3)) == expected
    replaced = "characters that PostgreSQL cannot store were replaced by U+FFFD"
    expected = f"1 refused, first: no id; {expected.replace(': 3', ': 5')}; {replaced}"
    assert advanced(shared, number, "no id", notes=Notes((), 2, is_replaced=True)) == expected
