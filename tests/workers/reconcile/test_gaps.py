"""Gaps and who is responsible for them, rule by rule; in days, without a database."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.cases import Failures
from workers.aggregators.common import MAX_AHEAD
from workers.aggregators.junction.introspection import Pull, ResourceCoverage
from workers.reconcile.gaps import (
    MAX_WINDOWS,
    PROBE_EVERY,
    UNDER_WAY,
    Stored,
    of_coverage,
    of_failures,
    of_newest,
    of_pull,
    span_of_coverage,
    span_of_pull,
)
from workers.store.coverage import Fetched, Gap, ResourceKey, Window

DAY, HOUR = timedelta(days=1), timedelta(hours=1)
NOW = datetime(2026, 11, 21, 17, 30, tzinfo=UTC)
TODAY = NOW.toordinal()
EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
SINCE = datetime(2026, 10, 17, tzinfo=UTC)
KEY = ResourceKey("u1", "garmin", "heartrate")


def day(number: float) -> datetime:
    """Midnight of a day relative to today: negative numbers are in the past."""
    return datetime.combine(date.fromordinal(TODAY), time(), UTC) + number * DAY


def ordinals(*numbers: int) -> set[int]:
    """Days relative to today as stored ordinals."""
    return {TODAY + number for number in numbers}


def pull(start: float | None = -30, end: float | None = -10, **more: Any) -> Pull:
    """A successful pull of u1's heart rate."""
    fields: dict[str, Any] = {
        "status": "pulled",
        "began": day(-10),
        "status_text": "success",
        "resource": KEY.resource,
    } | more
    edges = [None if edge is None else day(edge) for edge in (start, end)]
    return Pull(KEY.user_id, KEY.provider, start=edges[0], end=edges[1], **fields)


def fetched(start: float, end: float, **more: Any) -> Fetched:
    """A window that was fetched soon after the pull because of its notice."""
    fields: dict[str, Any] = {
        "requested_by": "notice",
        "state": "done",
        "created_at": day(-9),
        "finished_at": day(-8),
    } | more
    return Fetched(day(start), day(end), **fields)


def stored(*windows: Fetched, days: Iterable[int] = (), newest: datetime | None = None, **more: Any) -> Stored:
    """Stored data of u1's heart rate."""
    return Stored({KEY: windows}, {KEY: ordinals(*days)}, {KEY: newest} if newest else {}, **more)


def spanned(windows: Sequence[Window]) -> list[tuple[int, int]]:
    """Windows as first and last day relative to today."""
    edge = timedelta(microseconds=1)
    return [(start.toordinal() - TODAY, (end - edge).toordinal() - TODAY) for start, end in windows]


def summary(gap: Gap | None) -> tuple[str, str, list[tuple[int, int]]] | None:
    """A gap in short form."""
    return (gap.whose, gap.reason, spanned(gap.windows)) if gap else None


NEVER = "pulled by the aggregator, but no event announced it"
LOST = "its backfill has failed"


# The history of a pull


@pytest.mark.parametrize(
    ("status", "said", "whose", "reason", "is_pulling"),
    [
        ("pulling", "scheduled", "aggregator", "still pulling: scheduled", True),
        ("pulling", "retrying, no_luck", "aggregator", "still pulling: retrying, no_luck", True),
        ("failed", "failure, unexpected_error", "provider", "failed, failure, unexpected_error", False),
        ("failed", "failed", "provider", "failed", False),
        ("not pulled", "", "provider", "not pulled", False),
    ],
)  # fmt: skip
def test_resources_that_are_not_pulled_are_not_fetched(
    status: str, said: str, whose: str, reason: str, *, is_pulling: bool
) -> None:
    """Breaks if history that the aggregator does not have counts as ours and is requested in vain."""
    gap = of_pull(pull(status=status, status_text=said), stored(), NOW)
    assert gap == Gap(KEY, whose, reason, (), is_pulling)  # type: ignore[arg-type]


def test_the_windows_of_a_pull() -> None:
    """Breaks if announced history is fetched again, or lost or unannounced history is not fetched."""
    failures = Failures()
    for windows, gap in (
        ([], ("ours", NEVER, [(-30, -10)])),
        ([fetched(-30, -10)], None),
        ([fetched(-40, 0)], None),
        ([fetched(-29, -10)], ("ours", NEVER, [(-30, -30)])),
        ([fetched(-30, -11)], ("ours", NEVER, [(-10, -10)])),
        # A window covers every day it touches, because a margin of one day is fetched at both ends.
        ([fetched(-29.01, -10)], None),
        ([fetched(-30, -9.999)], None),
        ([fetched(-30, -20), fetched(-19, -10)], None),
        ([fetched(-30, -20), fetched(-18, -10)], ("ours", NEVER, [(-19, -19)])),
        ([fetched(-30, -25), fetched(-22, -20), fetched(-15, -10)], ("ours", NEVER, [(-24, -23), (-19, -16)])),
        ([fetched(-60, -40)], ("ours", NEVER, [(-30, -10)])),
        ([fetched(-30, -10, state="open", finished_at=None)], None),
        ([fetched(-30, -20), fetched(-19, -10, state="open", finished_at=None)], None),
        ([fetched(-30, -10, requested_by="operator")], None),
        ([fetched(-30, -10, requested_by="reconcile")], None),
        # Failed or cancelled
        ([fetched(-30, -10, state="lost")], ("ours", LOST, [(-30, -10)])),
        ([fetched(-30, -10, state="lost"), fetched(-30, -21)], ("ours", LOST, [(-20, -10)])),
        ([fetched(-30, -20, state="lost"), fetched(-30, -21)], ("ours", LOST, [(-20, -10)])),
        ([fetched(-30, -25, state="lost"), fetched(-30, -21)], ("ours", NEVER, [(-20, -10)])),
        ([fetched(-30, -10, state="lost"), fetched(-30, -10)], None),
        # The pull before a re-authorisation
        ([fetched(-30, -10, finished_at=day(-10) - HOUR)], ("ours", NEVER, [(-30, -10)])),
        ([fetched(-30, -10, finished_at=day(-10))], None),
        ([fetched(-30, -10, finished_at=day(-10) - HOUR), fetched(-20, -10)], ("ours", NEVER, [(-30, -21)])),
        ([fetched(-30, -10, state="lost", finished_at=day(-11))], ("ours", NEVER, [(-30, -10)])),
        ([fetched(-30, -10, finished_at=None)], None),
    ):
        with failures.of(windows, gap):
            assert summary(of_pull(pull(), stored(*windows), NOW)) == gap
    assert failures == {}


def test_a_pull_that_does_not_say_when_it_began_is_as_old_as_any() -> None:
    """Breaks if a pull without a timeline has all history fetched with each reconciliation."""
    windows = [fetched(-30, -10, finished_at=EPOCH)]
    assert of_pull(pull(began=None), stored(*windows), NOW) is None


def test_the_scope_of_a_pull() -> None:
    """Breaks if an open, reversed or future range makes an invalid window."""
    failures = Failures()
    for start, end, span in (
        (-30, -10, (day(-30), day(-10))),
        (-30, None, (day(-30), NOW)),
        (-30, 99, (day(-30), NOW)),
        (None, -10, (day(-190), day(-10))),
        (None, None, (NOW - 180 * DAY, NOW)),
        (-10, -30, (day(-30), day(-30))),
        (5, 7, (NOW, NOW)),
        (-10, -10, (day(-10), day(-10))),
    ):
        with failures.of(start, end, span):
            assert span_of_pull(pull(start, end), NOW) == span
            gap = of_pull(pull(start, end), stored(), NOW)
            assert gap
            (window,) = gap.windows
            assert window[0] <= span[0]
            assert window[0] < window[1] <= NOW
            assert window[1] > span[1] or window[1] == NOW
    assert failures == {}


ABSURD = [
    datetime.fromisoformat(text)
    for text in (
        "0001-01-01T00:00:00+00:00",
        "0001-01-01T00:00:00-05:00",
        "9999-12-31T23:59:59+00:00",
        "9999-12-31T23:59:59.999999-05:00",
        "1970-01-01T00:00:00+00:00",
    )
]
BEFORE_TIME = datetime.fromisoformat("0001-01-01T00:00:00+05:00")


def check_absurd(start: datetime | None, end: datetime | None) -> None:
    """A pull of such a range has one window in the past."""
    gap = of_pull(Pull(*KEY, "pulled", start, end, None, 3, "success"), stored(), NOW)
    assert gap
    (window,) = gap.windows
    assert window[0] < window[1] <= NOW


def test_an_absurd_range_has_a_window() -> None:
    """Breaks if an absurd date ends the whole reconciliation."""
    failures = Failures()
    for start in (*ABSURD, None):
        for end in (*ABSURD[2:], None):
            with failures.of(start, end):
                check_absurd(start, end)
    assert failures == {}


@pytest.mark.parametrize("edges", [(None, ABSURD[0]), (None, ABSURD[1]), (None, BEFORE_TIME)])
def test_a_range_that_ends_with_the_year_one_has_a_window(edges: tuple[datetime | None, datetime]) -> None:
    """Breaks if the zero value of a date ends the whole reconciliation."""
    check_absurd(*edges)


@pytest.mark.parametrize("edges", [(BEFORE_TIME, NOW), (BEFORE_TIME, BEFORE_TIME)])
def test_a_range_before_time_has_a_window(edges: tuple[datetime, datetime]) -> None:
    """Breaks if the first moment of a local calendar ends the whole reconciliation."""
    check_absurd(*edges)


# Days with data. The pull covers 21 days, -30 to -10.

EVERY = range(-30, -9)


def counted(days_with_data: int, *windows: Fetched, days: Iterable[int] = (), **more: Any) -> Any:
    """The gap if Junction counts `days_with_data` and `days` are stored."""
    return summary(of_pull(pull(days_with_data=days_with_data, **more), stored(*windows, days=days), NOW))


def test_days_that_are_short_are_fetched() -> None:
    """Breaks if lost rows of a fetched page are never found, or an empty day is requested forever."""
    failures = Failures()
    for count, days, gap in (
        (0, (), None),
        (21, EVERY, None),
        (20, EVERY, None),
        (99, EVERY, ("aggregator", "21 of 99 days have data, and its API returns no more", [])),
        (22, EVERY, None),  # one day may be missing because of time zones
        (3, (-30, -20, -10), None),
        (4, (-30, -20, -10), ("ours", "3 of 4 days have data", [(-29, -21), (-19, -11)])),
        (21, (*range(-30, -20), *range(-19, -9)), ("ours", "20 of 21 days have data", [(-20, -20)])),
        (21, (), ("ours", "0 of 21 days have data", [(-30, -10)])),
        (1, (), ("ours", "0 of 1 days have data", [(-30, -10)])),
        (1, (-31, -9, -5), ("ours", "0 of 1 days have data", [(-30, -10)])),  # of other days
        (2, (-31, -30, -9), ("ours", "1 of 2 days have data", [(-29, -10)])),
    ):
        with failures.of(count, days, gap):
            assert counted(count, fetched(-30, -10), days=days) == gap
    assert failures == {}


GIVES_NO_MORE = "of 21 days have data, and its API returns no more"


def test_missing_days_are_fetched_once_more_and_then_reported() -> None:
    """Breaks if days that the API does not return are requested with each reconciliation, or are not reported."""
    failures = Failures()
    for windows, days, gap in (
        # Fetched again in full: the gap is the aggregator's, unless time zones explain it.
        ([fetched(-30, -10, requested_by="reconcile")], (), ("aggregator", f"0 {GIVES_NO_MORE}", [])),
        ([fetched(-30, -10, requested_by="operator")], EVERY[:19], ("aggregator", f"19 {GIVES_NO_MORE}", [])),
        ([fetched(-30, -10, requested_by="reconcile")], EVERY[:20], None),
        # Fetched again in part
        ([fetched(-30, -20, requested_by="reconcile")], (), ("ours", "0 of 21 days have data", [(-19, -10)])),
        (
            [fetched(-29, -11, requested_by="reconcile")],
            (),
            ("ours", "0 of 21 days have data", [(-30, -30), (-10, -10)]),
        ),
        # Being fetched, or fetched without success
        ([fetched(-30, -10, requested_by="reconcile", state="open", finished_at=None)], (), None),
        ([fetched(-12, -10, requested_by="operator", state="open", finished_at=None)], (), None),
        ([fetched(-9, 0, requested_by="operator", state="open")], (), ("ours", "0 of 21 days have data", [(-30, -10)])),
        (
            [fetched(-30, -10, requested_by="reconcile", state="lost")],
            (),
            ("ours", "0 of 21 days have data", [(-30, -10)]),
        ),
        # Fetched again, but for the pull before
        (
            [fetched(-30, -10, requested_by="reconcile", finished_at=day(-11))],
            (),
            ("ours", "0 of 21 days have data", [(-30, -10)]),
        ),
    ):
        with failures.of(windows, days, gap):
            assert counted(21, fetched(-30, -10), *windows, days=days) == gap
    assert failures == {}


@pytest.mark.parametrize("resource", ["profile", "workout_stream"])
def test_resources_without_days_are_not_counted(resource: str) -> None:
    """Breaks if a profile or a workout's stream, which have no day, are requested repeatedly."""
    key = KEY._replace(resource=resource)
    short = pull(days_with_data=21, resource=resource)
    assert of_pull(short, Stored({key: [fetched(-30, -10)]}), NOW) is None
    gap = of_pull(short, Stored(), NOW)
    assert summary(gap) == ("ours", NEVER, [(-30, -10)])


def test_a_pull_is_compared_with_its_own_key() -> None:
    """Breaks if data of another user, provider or resource counts as this one's."""
    others = [KEY._replace(user_id="u2"), KEY._replace(provider="oura"), KEY._replace(resource="steps")]
    elsewhere = Stored({key: [fetched(-30, -10)] for key in others}, {key: ordinals(*EVERY) for key in others})
    assert summary(of_pull(pull(days_with_data=21), elsewhere, NOW)) == ("ours", NEVER, [(-30, -10)])


# Data after the pull


def supply(oldest: float | None = -30, newest: float | None = -0.5, resource: str = KEY.resource) -> ResourceCoverage:
    """The coverage of a resource of u1."""
    edges = [None if edge is None else day(edge) for edge in (oldest, newest)]
    return ResourceCoverage(KEY.user_id, KEY.provider, resource, edges[0], edges[1])


def missing(given: Stored, *supplies: ResourceCoverage, since: datetime = SINCE) -> dict[str, Any]:
    """The gaps by resource."""
    gaps = list(of_coverage(supplies or [supply()], given, since, NOW))
    assert len({gap.key for gap in gaps}) == len(gaps)
    assert {(gap.whose, gap.is_pulling) for gap in gaps} <= {("ours", False)}
    return {gap.key.resource: (gap.reason, spanned(gap.windows)) for gap in gaps}


def test_the_expected_days() -> None:
    """Breaks if data that is on its way, or too old to be compared, counts as missing."""
    failures = Failures()
    for oldest, newest, span in (
        (-30, -5, (day(-30), day(-5))),
        (-300, -5, (SINCE, day(-5))),
        (-30, 0.99, (day(-30), NOW - UNDER_WAY)),
        (-30, 20, (day(-30), NOW - UNDER_WAY)),
        (-5, -5, (day(-5), day(-5))),
        (-5, -6, None),
        (-300, -200, None),
        (3, 4, None),
        (None, -5, None),
        (-30, None, None),
        (None, None, None),
    ):
        with failures.of(oldest, newest, span):
            assert span_of_coverage(supply(oldest, newest), SINCE, NOW) == span
            assert bool(missing(Stored(), supply(oldest, newest))) == bool(span)
    assert failures == {}


def test_absurd_coverage_is_ignored() -> None:
    """Breaks if an absurd date ends the whole reconciliation."""
    for oldest in (*ABSURD, BEFORE_TIME):
        for newest in (*ABSURD, BEFORE_TIME):
            for gap in of_coverage([ResourceCoverage(*KEY, oldest, newest)], Stored(), SINCE, NOW):
                assert all(SINCE - DAY < start < end <= NOW for start, end in gap.windows)


LAST = range(-30, 0)  # the coverage; its newest data is from yesterday noon
NOON = day(-0.5)


def test_nothing_stored_is_all_missing() -> None:
    """Breaks if a user without any delivery counts as a user without data."""
    assert missing(Stored()) == {"heartrate": ("30 days without data", [(-30, -1)])}
    long = supply(-3000, -0.5)
    assert missing(Stored(), long) == {"heartrate": ("35 days without data", [(-35, -1)])}


def test_nothing_is_missing_where_all_is_there() -> None:
    """Breaks if stored data is fetched again."""
    assert missing(stored(days=LAST, newest=NOON)) == {}
    assert missing(stored(days=LAST, newest=NOON + 9 * HOUR)) == {}  # a clock that is ahead
    assert missing(stored(fetched(-40, 0))) != {}  # not fetched since, see the tails
    assert missing(stored(fetched(-40, 0, created_at=NOW - HOUR))) == {}


def with_steps(*windows: Fetched, days: Iterable[int] = (), newest: datetime | None = NOON) -> Stored:
    """Stored heart rate of u1, with steps on every day, so that no day is silent."""
    other = KEY._replace(resource="steps")
    moments = {KEY: newest, other: NOON} if newest else {other: NOON}
    return Stored({KEY: windows}, {KEY: ordinals(*days), other: ordinals(*LAST)}, moments)


def test_a_hole_in_dense_data() -> None:
    """Breaks if a lost day of a daily resource is not found, or an empty one is requested twice."""
    failures = Failures()
    for days, windows, gap in (
        ([one for one in LAST if one != -10], (), ("1 days without data", [(-10, -10)])),
        ([one for one in LAST if not -12 <= one <= -10], (), ("3 days without data", [(-12, -10)])),
        ([one for one in LAST if one not in (-20, -10)], (), ("2 days without data", [(-20, -20), (-10, -10)])),
        (LAST[::2], (), ("15 days without data", None)),  # half of the days count as daily data
        # A day that was fetched since is known to be empty; so is one that is being fetched.
        ([one for one in LAST if one != -10], (fetched(-11, -9),), None),
        ([one for one in LAST if one != -10], (fetched(-10, -10, state="open", finished_at=None),), None),
        ([one for one in LAST if one != -10], (fetched(-11, -9, state="lost"),), ("1 days without data", [(-10, -10)])),
        # All days count, including fetched ones.
        ([-1, -2], (fetched(-30, -5),), None),
        ([-1], (fetched(-30, -3),), None),
        ([*range(-30, -4), -1], (fetched(-30, -5),), ("3 days without data", [(-4, -2)])),
        (LAST[2::3], (), None),  # a third of the days do not
    ):
        with failures.of(days, windows, gap):
            given = with_steps(*windows, days=days)
            found = missing(given, supply(), supply(resource="steps")).get("heartrate")
            if gap and gap[1] is None:
                assert found
                assert found[0] == gap[0]
            else:
                assert found == gap
    assert failures == {}


def with_workouts(workouts: Iterable[int], heartrate: Iterable[int], newest: datetime = NOON) -> Stored:
    """Stored data of two resources of one connection."""
    other = KEY._replace(resource="workouts")
    return Stored({}, {KEY: ordinals(*heartrate), other: ordinals(*workouts)}, {KEY: newest, other: newest})


@pytest.mark.parametrize(
    ("workouts", "heartrate", "gaps"),
    [
        # A day without a workout is not lost ...
        ((-29, -20, -3), LAST, {}),
        ((), LAST, {}),
        # ... unless the connection has no data at all on that day.
        (
            (-29, -20, -3),
            [one for one in LAST if not -15 <= one <= -13],
            {"heartrate": ("3 days without data", [(-15, -13)]), "workouts": ("3 days without data", [(-15, -13)])},
        ),
        (
            (-14,),
            [one for one in LAST if not -15 <= one <= -13],
            {
                "heartrate": ("3 days without data", [(-15, -13)]),
                "workouts": ("2 days without data", [(-15, -15), (-13, -13)]),
            },
        ),
    ],
)
def test_a_silent_day_of_a_connection(workouts: Iterable[int], heartrate: Iterable[int], gaps: dict[str, Any]) -> None:
    """Breaks if a rest day is fetched repeatedly, or a day without any data is not."""
    given = with_workouts(workouts, heartrate)
    assert missing(given, supply(), supply(resource="workouts")) == gaps


def test_a_fetched_day_is_not_silent() -> None:
    """Breaks if an empty day that was fetched for another resource is requested again."""
    other = KEY._replace(resource="workouts")
    heartrate = [one for one in LAST if one != -10]
    given = Stored({KEY: [fetched(-11, -9)]}, {KEY: ordinals(*heartrate)}, {KEY: NOON, other: NOON})
    assert missing(given, supply(), supply(resource="workouts")) == {}


@pytest.mark.parametrize("workouts", [[*range(-30, -17), -1], [*range(-30, -16)]])
def test_repaired_gaps_do_not_count_as_missing(workouts: list[int]) -> None:
    """Breaks if, after silent days have been fetched, days without a workout count as lost."""
    heartrate = [one for one in LAST if not -15 <= one <= -11]
    both, given = (supply(), supply(resource="workouts")), with_workouts(workouts, heartrate)
    gaps = list(of_coverage(both, given, SINCE, NOW))
    assert {gap.key.resource for gap in gaps} == {"heartrate", "workouts"}
    windows = {gap.key: [Fetched(*one, "reconcile", "done", NOW, NOW) for one in gap.windows] for gap in gaps}
    assert missing(replace(with_workouts(workouts, LAST), fetched=windows), *both) == {}


# Tails


def test_data_newer_than_the_stored_data() -> None:
    """Breaks if the missing end of webhook data is not found, or is requested again when nothing is newer."""
    failures = Failures()
    for newest, windows, gap in (
        (NOON, (), None),
        (NOON - timedelta(seconds=1), (), (-1, -1)),
        (day(-4.5), (), (-5, -1)),
        (day(-4.5), (fetched(-6, 0, created_at=NOON),), None),
        (day(-4.5), (fetched(-6, 0, created_at=NOON - HOUR),), (-5, -1)),  # before newer data existed
        (day(-4.5), (fetched(-6, -3, created_at=NOW),), (-2, -1)),
        (day(-4.5), (fetched(-6, 0, created_at=NOW, state="open"),), None),
        (day(-4.5), (fetched(-6, 0, created_at=NOW, state="lost"),), (-5, -1)),
        (None, (), (-30, -1)),
        (None, (fetched(-40, 0, created_at=NOW),), None),
        (day(-100), (), (-30, -1)),
    ):
        with failures.of(newest, windows, gap):
            given = with_steps(fetched(-40, -1), *windows, newest=newest)
            found = missing(given, supply(), supply(resource="steps"))
            assert found.keys() <= {"heartrate"}
            assert found.get("heartrate", (None, None))[1] == ([gap] if gap else None)
    assert failures == {}


def test_the_hour_that_is_under_way_is_not_missing() -> None:
    """Breaks if an event that is on its way has its whole day fetched with each reconciliation."""
    today = [*LAST, 0]
    fresh = ResourceCoverage(*KEY, day(-30), NOW)
    assert missing(stored(days=today, newest=NOW - UNDER_WAY), fresh) == {}
    late = missing(stored(days=today, newest=NOW - UNDER_WAY - timedelta(seconds=1)), fresh)
    assert late == {"heartrate": ("1 days with missing data", [(0, 0)])}
    (gap,) = of_coverage([fresh], stored(days=today, newest=day(0)), SINCE, NOW)
    assert gap.windows == ((day(0), NOW),)


# The future

AHEAD = ResourceCoverage(*KEY, day(-30), datetime(2105, 1, 1, tzinfo=UTC))


def test_data_of_the_future_does_not_hide_missing_days() -> None:
    """Breaks if one record of 2105 at Junction hides that the last month is missing."""
    given = stored(fetched(-60, -31, created_at=day(-31)), days=range(-30, -20), newest=day(-20.5))
    assert missing(given, AHEAD) == {"heartrate": ("22 days with missing data", [(-21, 0)])}


def test_data_of_the_future_is_looked_for_once_a_week() -> None:
    """Breaks if a device with a wrong clock that is no longer worn opens a gap with each reconciliation."""
    for age, gap in ((0, {}), (6.9, {}), (7.1, {"heartrate": ("8 days without data", [(-7, 0)])})):
        fetch = fetched(-30, -age, created_at=NOW - age * DAY, requested_by="reconcile")
        given = stored(fetch, days=range(-30, -20), newest=day(-20.5))
        assert missing(given, AHEAD) == gap, age
    near = ResourceCoverage(*KEY, day(-30), NOW + MAX_AHEAD)
    assert missing(stored(days=range(-30, 1), newest=NOW + MAX_AHEAD), near) == {}


# Deliveries that failed, and newer data, at Terra


def failures_of(*ago: float, store: Stored) -> Any:
    """The gap of deliveries that failed so many days ago."""
    return summary(of_failures(KEY, [NOW - each * DAY for each in ago], store, NOW))


def test_the_days_of_failed_deliveries() -> None:
    """Breaks if the days that a failed delivery may have been about are not fetched, or are fetched with each run."""
    known = stored(newest=day(-0.1))
    one, two = "1 deliveries failed", "2 deliveries failed"
    for ago, store, gap in (
        ((1,), known, ("ours", one, [(-3, -1)])),
        ((1, 1.1), known, ("ours", two, [(-3, -1)])),
        ((1, 9), known, ("ours", two, [(-11, -9), (-3, -1)])),
        ((1,), Stored(), ("ours", one, [(-29, -1)])),  # nothing is stored
        ((1,), stored(newest=day(-10)), ("ours", one, [(-10, -1)])),  # nothing is stored since
        ((1,), stored(fetched(-4, 0, created_at=NOW), newest=day(0)), None),
        ((1,), stored(fetched(-4, 0, created_at=NOW, state="open"), newest=day(0)), None),
        ((1,), stored(fetched(-4, 0, created_at=NOW, state="lost"), newest=day(0)), ("ours", one, [(-3, -1)])),
        ((1,), stored(fetched(-4, 0, created_at=NOW - 2 * DAY), newest=day(0)), ("ours", one, [(-3, -1)])),
        ((1,), stored(fetched(-2, 0, created_at=NOW), newest=day(0)), ("ours", one, [(-3, -3)])),
    ):
        assert failures_of(*ago, store=store) == gap, (ago, store)


def newest_of(ago: float, given: Stored, *keys: ResourceKey) -> dict[str, list[tuple[int, int]]]:
    """The windows by resource, if the aggregator has data as new as that."""
    gaps = of_newest(keys or [KEY], NOW - ago * DAY, given, day(-5), NOW)
    return {gap.key.resource: spanned(gap.windows) for gap in gaps}


def test_data_that_is_newer_than_the_stored_data_is_fetched() -> None:
    """Breaks if newer data is not fetched, data on its way is, or it is fetched with each run."""
    sleep = KEY._replace(resource="sleep")
    assert newest_of(1, stored(newest=day(-3))) == {"heartrate": [(-3, -1)]}
    assert newest_of(1, stored(newest=NOW - DAY)) == {}
    assert newest_of(0.01, stored(newest=NOW - UNDER_WAY)) == {}
    assert newest_of(1, Stored()) == {"heartrate": [(-5, -1)]}
    assert newest_of(1, stored(newest=day(-3)), KEY, sleep) == {"heartrate": [(-3, -1)]}  # sleep was never stored
    assert newest_of(1, Stored(newest={KEY: day(-3), sleep: day(0)}), KEY, sleep) == {}
    assert newest_of(1, stored(fetched(-3, 0, created_at=NOW), newest=day(-3))) == {}
    assert newest_of(1, stored(fetched(-3, 0, created_at=NOW - 2 * DAY), newest=day(-3))) == {"heartrate": [(-3, -1)]}
    assert newest_of(1, stored(fetched(-9, 0, created_at=day(-9), state="open"))) == {}  # history is being fetched
    assert list(of_newest([KEY], None, Stored(), day(-5), NOW)) == []


def test_a_newest_date_in_the_future_hides_no_gap() -> None:
    """Breaks if a wrong clock hides days that are missing, or opens a gap with each run."""
    assert newest_of(-3, Stored()) == {"heartrate": [(-5, 0)]}
    assert newest_of(-3, stored(newest=day(-3))) == {"heartrate": [(-3, 0)]}
    assert newest_of(-3, stored(newest=NOW)) == {}
    recent, earlier = NOW - PROBE_EVERY + HOUR, NOW - PROBE_EVERY - HOUR
    assert newest_of(-3, stored(fetched(-3, -2, created_at=recent), newest=day(-3))) == {}
    assert newest_of(-3, stored(fetched(-3, -2, created_at=earlier), newest=day(-3))) == {"heartrate": [(-1, 0)]}
    assert newest_of(-3, stored(fetched(-3, 0, created_at=earlier), newest=day(-3))) == {}


# Outages

OUTAGE = (day(-12) + 5 * HOUR, day(-10) + 20 * HOUR)


def test_days_of_an_outage() -> None:
    """Breaks if half a lost day counts as whole, or an outage is fetched with each reconciliation."""
    failures = Failures()
    for windows, gap in (
        ((), (-12, -10)),
        ((fetched(-20, -5, created_at=OUTAGE[1]),), None),
        ((fetched(-20, -5, created_at=OUTAGE[1] - UNDER_WAY),), None),  # near the end of the outage
        ((fetched(-20, -5, created_at=OUTAGE[1] - UNDER_WAY - DAY),), (-12, -10)),
        ((fetched(-20, -11, created_at=NOW),), (-10, -10)),
        ((fetched(-20, -5, created_at=NOW, state="open"),), None),
        ((fetched(-20, -5, created_at=NOW, state="lost"),), (-12, -10)),
    ):
        with failures.of(windows, gap):
            found = missing(stored(*windows, days=LAST, newest=NOON, outages=[OUTAGE]))
            reason = f"{gap[1] - gap[0] + 1} days with missing data" if gap else ""
            assert found == ({"heartrate": (reason, [gap])} if gap else {})
    assert failures == {}


@pytest.mark.parametrize(
    ("outage", "span"),
    [
        ((day(-40), day(-29)), (-30, -29)),  # before the first data
        ((day(-2), NOW), (-2, -1)),  # still lasting, without newer data
        ((day(-60), day(-50)), None),
    ],
)
def test_an_outage_counts_where_there_is_something(outage: Window, span: tuple[int, int] | None) -> None:
    """Breaks if days of an outage are requested for which Junction has no data."""
    found = missing(stored(days=LAST, newest=NOON, outages=[outage])).get("heartrate")
    assert (found and found[1]) == (span and [span])


def test_an_outage_is_made_up_for_of_rare_resources_too() -> None:
    """Breaks if the one workout of an outage is lost, because a day without a workout is no gap."""
    given = with_workouts((-29, -3), LAST)
    found = missing(Stored({}, given.days, given.newest, [OUTAGE]), supply(), supply(resource="workouts"))
    assert {name: spans for name, (_, spans) in found.items()} == {"heartrate": [(-12, -10)], "workouts": [(-12, -10)]}


# Windows


def test_many_holes_become_few_windows() -> None:
    """Breaks if a year with a hole in every week costs a request for each, or distant holes are joined first."""
    holes = [-30, -28, -25, -24, -20, -18, -16, -14, -12, -10, -8, -5, -2]
    found = missing(stored(days=[one for one in LAST if one not in holes], newest=NOON))["heartrate"]
    assert found[0] == f"{len(holes)} days without data"
    assert len(found[1]) == MAX_WINDOWS
    widest = {(-28, -25), (-24, -20), (-8, -5), (-5, -2)}
    assert widest <= {(left[1], right[0]) for left, right in itertools.pairwise(found[1])}


def days_of(windows: Sequence[Window]) -> set[int]:
    """Every day of these windows."""
    return {TODAY + number for first, last in spanned(windows) for number in range(first, last + 1)}


def check_windows(windows: Sequence[Window], wanted: set[int]) -> None:
    """The windows hold all wanted days, are ordered and disjoint, and begin and end with a wanted day."""
    assert wanted <= days_of(windows)
    assert len(windows) <= MAX_WINDOWS
    assert all(start < end <= NOW for start, end in windows)
    assert all(left[1] < right[0] for left, right in itertools.pairwise(windows))
    assert {number + TODAY for one in spanned(windows) for number in one} <= wanted


numbers = st.integers(-60, 0)
spans = st.tuples(numbers, numbers).map(sorted)


@given(spans, st.lists(st.tuples(spans, st.sampled_from(["done", "open", "lost"]))))
def test_all_days_of_a_pull_are_fetched(span: list[int], windows: list[tuple[list[int], str]]) -> None:
    """Breaks if a day that was not fetched is missing in the windows, or a day outside the pull is requested."""
    held = [fetched(*edges, state=state) for edges, state in windows]
    gap = of_pull(pull(*span), stored(*held), NOW)
    covered = {n for (first, last), state in windows if state != "lost" for n in range(first, last + 1)}
    wanted = ordinals(*(set(range(span[0], span[1] + 1)) - covered))
    assert bool(gap) == bool(wanted)
    if gap:
        assert gap.whose == "ours"
        check_windows(gap.windows, wanted)


@given(spans, st.sets(numbers), st.integers(0, 70))
def test_days_that_are_short_are_all_fetched(span: list[int], days: set[int], count: int) -> None:
    """Breaks if a possibly missing day is not requested, or a stored one is requested alone."""
    gap = of_pull(pull(*span, days_with_data=count), stored(fetched(*span), days=days), NOW)
    inside = set(range(span[0], span[1] + 1))
    empty = ordinals(*(inside - days))
    short = count > len(inside & days)
    assert bool(gap and gap.windows) == bool(short and empty)
    if gap and gap.windows:
        check_windows(gap.windows, empty)


@given(st.sets(numbers, min_size=0), spans, st.lists(spans, max_size=3), st.booleans())
def test_all_days_that_were_lost_are_fetched(
    days: set[int],
    span: list[int],
    outages: list[list[int]],
    asked_since: bool,
) -> None:
    """Breaks if a day of an outage, or of a hole in daily data, is not requested, or a fetched one is again."""
    newest = min(day(span[1]), NOW - UNDER_WAY)
    have = max((day(number) for number in days), default=None)
    away = [(day(first), day(last)) for first, last in outages]
    held = [fetched(-70, 0, created_at=NOW)] if asked_since else []
    given_of = stored(*held, days=days, newest=have, outages=away)
    gaps = list(of_coverage([supply(span[0], span[1])], given_of, EPOCH, NOW))
    inside = set(range(span[0], newest.toordinal() - TODAY + 1))
    wanted = {n for first, last in outages for n in range(first, last + 1)} & inside
    wanted |= inside - days  # the connection has no other data: every empty day is silent
    if asked_since or not inside:
        assert gaps == []
        return
    found = [window for gap in gaps for window in gap.windows]
    assert ordinals(*wanted) <= days_of(found)
    if found:
        check_windows(found, days_of(found) & ordinals(*inside))
