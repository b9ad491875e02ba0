"""Sessions of several sources: which are one, which one is kept, and the night and the naps of a date."""

from collections import defaultdict
from datetime import UTC, date, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.daily import Clock, timed_sessions
from workers.daily.model import MINUTE, TimedSession, as_date, as_moment, as_time
from workers.daily.sessions import kept_nights, kept_workouts, merged, sleep_days, workout_days

EVENING = datetime(2026, 3, 28, 22, tzinfo=UTC)
NIGHT = (27000.0, 7200.0, 5400.0, 14400.0, 900.0)


def session(minute: int, minutes: int, source: int = 0, name: str = "s1", **changes: object) -> TimedSession:
    """A session of Paris in winter, minutes after EVENING."""
    start = as_moment(EVENING) + minute * MINUTE
    one = TimedSession(source, start, start + minutes * MINUTE, 3600, 0, "u1", name, NIGHT)
    return one._replace(**changes)


def is_same(one: TimedSession, other: TimedSession) -> bool:
    """Whether they share half of the minutes of the shorter one."""
    mine, its = ({*range(s.start // MINUTE, s.stop // MINUTE)} for s in (one, other))
    return 2 * len(mine & its) >= min(len(mine), len(its))


@given(st.lists(st.tuples(st.integers(0, 600), st.integers(1, 300), st.integers(0, 3)), max_size=12))
def test_no_two_kept_sessions_are_one_and_every_other_one_has_a_kept_better_one(
    rows: list[tuple[int, int, int]],
) -> None:
    """Breaks if a session is counted twice, is lost, or a worse one is kept instead of a better one."""
    given_ = [session(start, length, source, f"s{n}") for n, (start, length, source) in enumerate(rows)]
    kept = merged(given_)
    assert sorted(s.id for one in kept for s in (one.session, *one.others)) == sorted(s.id for s in given_)
    ids = {one.session.id for one in kept}
    order = lambda s: (s.source, s.start - s.stop, s.start, s.user_id, s.id)  # noqa: E731
    assert [s.session.start for s in kept] == sorted(s.session.start for s in kept)
    for one in given_:
        better = [k.session for k in kept if k.session.id != one.id and order(k.session) < order(one)]
        assert (one.id in ids) == (not any(is_same(one, other) for other in better))


@given(timed_sessions())
def test_sessions_count_on_the_date_that_the_clock_showed(drawn: tuple[Clock, list[TimedSession]]) -> None:
    """Breaks if a clock change, a flight or half an hour moves a night or a workout to another date."""
    clock, given_ = drawn
    kept: list[TimedSession] = []
    for one in sorted(given_, key=lambda s: (s.source, s.start - s.stop, s.start, s.id)):
        if not any(is_same(one, other) for other in kept):
            kept.append(one)
    minutes: dict[tuple[str, date], list[float]] = defaultdict(list)
    for one in kept:
        minutes["slept", clock.shown(one.stop)].append((one.stop - one.start) / MINUTE)
        minutes["trained", clock.shown(one.start)].append((one.stop - one.start) / MINUTE)
    expected = {("sleep_total", day): max(of) for (what, day), of in minutes.items() if what == "slept"}
    naps = {("nap_total", day): sum(of) - max(of) for (what, day), of in minutes.items() if what == "slept"}
    expected |= {key: value for key, value in naps.items() if value}
    nights = kept_nights(s._replace(offset=clock.offset(as_time(s.stop))) for s in given_)
    assert {(one.metric, as_date(one.day)): one.value for one in sleep_days(nights)} == expected
    workouts = kept_workouts(s._replace(offset=clock.offset(as_time(s.start)), values=(None, None)) for s in given_)
    found = {(one.metric, as_date(one.day)): one.value for one in workout_days(workouts)}
    trained = {day: of for (what, day), of in minutes.items() if what == "trained"}
    durations = {("workouts_duration", day): 60 * sum(of) for day, of in trained.items()}
    assert found == durations | {("workouts_count", day): len(of) for day, of in trained.items()}


def test_the_longest_session_of_a_date_is_the_night_and_the_others_are_naps() -> None:
    """Breaks if a nap replaces the night, or is added to it."""
    nap = session(16 * 60, 40, 1, "nap", values=(1800.0, None, None, None, None))
    kept = kept_nights([session(0, 480), session(10, 450, 1, "other"), nap])
    assert [(one.session.id, one.is_night, [s.id for s in one.others]) for one in kept] == [
        ("s1", True, ["other"]),
        ("nap", False, []),
    ]
    found = {one.metric: one for one in sleep_days(kept)}
    assert {name: one.value for name, one in found.items()} == {
        "sleep_total": 27000,
        "sleep_deep": 7200,
        "sleep_rem": 5400,
        "sleep_light": 14400,
        "sleep_awake": 900,
        "nap_total": 1800,
    }
    assert (found["sleep_total"].covered_minutes, found["nap_total"].source, found["nap_total"].samples) == (480, 1, 3)


@pytest.mark.parametrize(
    ("minute", "offset", "ends_on"),
    [(120, 3600, 29), (119, 3600, 28), (120, 0, 29), (119, 0, 28), (120, -36000, 29), (119, 45900, 28)],
)
def test_a_night_counts_on_the_local_date_of_its_end(minute: int, offset: int, ends_on: int) -> None:
    """Breaks if the date is that of UTC, or of the start; 00:00 belongs to the new date."""
    (one,) = kept_nights([session(minute - 600 - offset // 60, 600, offset=offset)])
    assert as_date(one.day) == date(2026, 3, ends_on)


def test_workouts_count_on_the_local_date_of_their_start() -> None:
    """Breaks if a workout across midnight counts on the next date, or twice where two providers deliver it."""
    run = session(30, 90, 0, values=(8000.0, 600.0))
    same = run._replace(source=1, user_id="u2", id="same", start=run.start + 3 * MINUTE, values=(8100.0, None))
    walk = session(200, 30, 1, "walk", values=(None, 120.0))
    kept = kept_workouts([same, walk, run])
    found = {(as_date(one.day).day, one.metric): one.value for one in workout_days(kept)}
    assert found == {
        (28, "workouts_count"): 1,
        (28, "workouts_duration"): 5400,
        (28, "workouts_distance"): 8000,
        (28, "workouts_calories"): 600,
        (29, "workouts_count"): 1,
        (29, "workouts_duration"): 1800,
        (29, "workouts_calories"): 120,
    }
    assert {one.users for one in workout_days(kept) if one.day == kept[0].day} == {frozenset({"u1", "u2"})}
