"""Compares the data that an aggregator lists, or has sent, with the stored data, in whole days. Pure functions."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from typing import TYPE_CHECKING, Literal

from app.catalogue import catalogue
from workers.aggregators.common import MAX_AHEAD
from workers.store.backfills import DEFAULT_HISTORY, EARLIEST_HISTORY
from workers.store.coverage import Fetched, Gap, ResourceKey, Window

if TYPE_CHECKING:  # its decoders cost 0.05 s of CPU, which `headrace report` does not need
    from workers.aggregators.junction.introspection import Pull, ResourceCoverage

Part = Literal["pulls", "supplies"]
Days = frozenset[int] | set[int]  # ordinals in UTC

UNDER_WAY = timedelta(hours=1)  # newer data may still be on its way
PROBE_EVERY = timedelta(days=7)  # see `of_coverage` and `of_newest`
# How far before a failed delivery its data may begin. Terra recommends one or two days after an outage; a device that
# was not synchronised for a while sends older data.
MIN_LOST, MAX_LOST = timedelta(days=2), timedelta(days=28)
MAX_WINDOWS = 8  # per gap; windows that are close to each other are joined
DENSE = 0.5  # a resource with data on this share of the days has data daily: an empty day is a gap (not for workouts)


@dataclass(frozen=True)
class Stored:
    """The stored data of some users: fetched windows, days with data, newest data, periods without deliveries."""

    fetched: Mapping[ResourceKey, Sequence[Fetched]] = field(default_factory=dict)
    days: Mapping[ResourceKey, Days] = field(default_factory=dict)
    newest: Mapping[ResourceKey, datetime] = field(default_factory=dict)
    outages: Sequence[Window] = ()


def key_of(one: "Pull | ResourceCoverage") -> ResourceKey:
    return ResourceKey(one.user_id, one.provider, one.resource)


def span_of_pull(pull: "Pull", now: datetime) -> Window:
    """The window of a pull; Junction's default range if the listing has no window."""
    end = max(min(pull.end or now, now), EARLIEST_HISTORY)
    start = max(min(pull.start or end - DEFAULT_HISTORY, end), EARLIEST_HISTORY)
    return start, end


def of_pull(pull: "Pull", stored: Stored, now: datetime) -> Gap | None:
    """The gap in the history that was pulled when the user connected."""
    key = key_of(pull)
    if pull.status == "pulling":
        return Gap(key, "aggregator", f"still pulling: {pull.status_text}", is_pulling=True)
    if pull.status != "pulled":
        return Gap(key, "provider", ", ".join(dict.fromkeys(part for part in (pull.status, pull.status_text) if part)))
    # A window that was fetched before this pull began belongs to the pull before a re-authorisation.
    windows = [
        one
        for one in stored.fetched.get(key, ())
        if not (one.finished_at and pull.began and one.finished_at < pull.began)
    ]
    wanted = _days(*span_of_pull(pull, now))
    if missing := wanted - _covered(windows, "done", "open"):
        failed = missing & _covered(windows, "lost")
        reason = "its backfill has failed" if failed else "pulled by the aggregator, but no event announced it"
        return Gap(key, "ours", reason, _windows(missing, now))
    if not catalogue()[pull.resource].has_days or wanted & _covered(windows, "open"):
        return None
    have = wanted & set(stored.days.get(key, ()))
    refetched = _covered((one for one in windows if one.requested_by != "notice"), "done")
    return _gap_of_days(key, len(have), pull.days_with_data, _windows(wanted - have - refetched, now))


def _gap_of_days(key: ResourceKey, have: int, expected: int, empty: tuple[Window, ...]) -> Gap | None:
    """The gap if fewer days are stored than Junction counted: ours if `empty` days can be fetched, else Junction's."""
    if have >= expected:
        return None
    reason = f"{have} of {expected} days have data"
    if empty:
        return Gap(key, "ours", reason, empty)
    # Time zones can shift the count by one day.
    return Gap(key, "aggregator", f"{reason}, and its API returns no more") if expected - have > 1 else None


def of_coverage(
    coverages: "Iterable[ResourceCoverage]", stored: Stored, since: datetime, now: datetime
) -> Iterator[Gap]:
    """The gaps in the data that webhooks should have brought over one connection of one user.

    A newest date in the future does not say how far the data really reaches. Data until now is assumed then, and the
    days that were never fetched are fetched, at most once in PROBE_EVERY: otherwise a device that is no longer worn
    would open a gap with each run.
    """
    coverages = tuple(coverages)
    ahead = {key_of(one) for one in coverages if one.newest and one.newest > now + MAX_AHEAD}
    spans = {key_of(one): span for one in coverages if (span := span_of_coverage(one, since, now))}
    days = {key: _days(*span) for key, span in spans.items()}
    covered = {key: _covered(stored.fetched.get(key, ()), "done", "open") for key in spans}
    have = {key: set(stored.days.get(key, ())) for key in spans}
    # Days without any data of the connection: the device was not worn, or every webhook was lost.
    silent = set[int]().union(*days.values()) - set[int]().union(*covered.values(), *have.values())
    for key, span in spans.items():
        if key in ahead and any(one.created_at > now - PROBE_EVERY for one in stored.fetched.get(key, ())):
            continue
        left = days[key] - covered[key]
        fetched = covered[key] if key in ahead else _fetched_since(key, span[1], stored)
        after_newest = _days_after_newest(key, span, stored) - fetched
        lost = left & silent | _days_without_deliveries(key, days[key], stored) | after_newest
        rest = days[key] - lost
        is_dense = len(rest & have[key]) >= DENSE * len(rest)
        quiet = left - have[key] if is_dense else left & silent
        if catalogue()[key.resource].day_field not in (None, "calendar_date"):
            quiet -= {max(days[key])}  # a record that ended on that day may have begun on the day before
        if found := quiet | lost:
            kind = "days without data" if found <= quiet else "days with missing data"
            yield Gap(key, "ours", f"{len(found)} {kind}", _windows(found, now))


def span_of_coverage(coverage: "ResourceCoverage", since: datetime, now: datetime) -> Window | None:
    """The window in which data should be stored by now."""
    if coverage.oldest is None or coverage.newest is None:
        return None
    start, end = max(coverage.oldest, since), min(coverage.newest, now - UNDER_WAY)
    return (start, end) if start <= end else None


def of_failures(key: ResourceKey, sent: Sequence[datetime], stored: Stored, now: datetime) -> Gap | None:
    """The gap of one resource's deliveries that failed at these times, unless their days were fetched since.

    The days that a failed delivery contained are not known. The last two days are assumed, or all days since the newest
    stored data.
    """
    newest = stored.newest.get(key, EARLIEST_HISTORY)
    missing: set[int] = set()
    for at in sent:
        start = max(at - MAX_LOST, min(newest, at - MIN_LOST))
        missing |= _days(start, at) - _fetched_since(key, at, stored)
    return Gap(key, "ours", f"{len(sent)} deliveries failed", _windows(missing, now)) if missing else None


def of_newest(
    keys: Sequence[ResourceKey], newest: datetime | None, stored: Stored, first: datetime, now: datetime
) -> Iterator[Gap]:
    """The gaps of one connection for which the aggregator has newer data than is stored.

    The resource of that data is not known. Every resource that was stored before is fetched; without any stored data,
    all resources are fetched from `first` on. A date in the future is treated as in `of_coverage`.
    """
    if newest is None:
        return
    is_ahead = newest > now + MAX_AHEAD
    newest = min(newest, now - UNDER_WAY)
    known = [key for key in keys if key in stored.newest]
    if any(stored.newest[key] >= newest for key in known):
        return
    for key in known or keys:
        windows = stored.fetched.get(key, ())
        if is_ahead and any(one.created_at > now - PROBE_EVERY for one in windows):
            continue
        start = min(stored.newest.get(key, first), newest)
        fetched = _covered(windows, "open", *(["done"] if is_ahead else [])) | _fetched_since(key, newest, stored)
        if missing := _days(start, newest) - fetched:
            yield Gap(key, "ours", "newer data than is stored", _windows(missing, now))


def _days_without_deliveries(key: ResourceKey, days: Days, stored: Stored) -> Days:
    """Days in an outage of our endpoint that were not fetched after it."""
    found: set[int] = set()
    for start, end in stored.outages:
        found |= (_days(start, end) & days) - _fetched_since(key, end - UNDER_WAY, stored)
    return found


def _days_after_newest(key: ResourceKey, span: Window, stored: Stored) -> Days:
    """Days after the newest stored data, if Junction has newer data."""
    start, newest = span
    have = stored.newest.get(key)
    if have is not None and have >= newest:
        return set()
    return _days(max(have or start, start), newest)


def _fetched_since(key: ResourceKey, since: datetime, stored: Stored) -> Days:
    windows = (one for one in stored.fetched.get(key, ()) if one.created_at >= since)
    return _covered(windows, "done", "open")


def _days(start: datetime, end: datetime) -> set[int]:
    return set(range(start.astimezone(UTC).toordinal(), end.astimezone(UTC).toordinal() + 1))


def _covered(windows: Iterable[Fetched], *states: str) -> set[int]:
    return set[int]().union(*(_days(one.start, one.end) for one in windows if one.state in states))


def _windows(days: Days, now: datetime) -> tuple[Window, ...]:
    """The days as at most MAX_WINDOWS windows, the oldest first. The windows are split at the widest distances."""
    ordered = sorted(days)
    steps = sorted(range(1, len(ordered)), key=lambda n: ordered[n] - ordered[n - 1], reverse=True)
    cuts = sorted(n for n in steps[: MAX_WINDOWS - 1] if ordered[n] - ordered[n - 1] > 1)
    edges = [0, *cuts, len(ordered)]
    runs = [ordered[start:end] for start, end in itertools.pairwise(edges)]
    return tuple((_midnight(run[0]), min(_midnight(run[-1] + 1), now)) for run in runs if run)


def _midnight(ordinal: int) -> datetime:
    return datetime.combine(date.fromordinal(ordinal), time(), UTC)
