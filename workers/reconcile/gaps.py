"""What is missing, and whose turn it is: what Junction says it has, against what is stored. Pure, in days."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from typing import Literal

from app.catalogue import catalogue
from workers.aggregators.junction.introspection import Pull, ResourceCoverage
from workers.store.backfills import DEFAULT_HISTORY, EARLIEST_HISTORY
from workers.store.coverage import Fetched, ResourceKey
from workers.store.gaps import Gap, Window

Part = Literal["pulls", "supplies"]
Days = frozenset[int] | set[int]  # ordinals

UNDER_WAY = timedelta(hours=1)  # what is newer may still be on its way to us
MAX_WINDOWS = 8  # of one gap; nearer ones are joined
DENSE = 0.5  # with data on so many of the days, an empty day is a gap; with fewer it is a day without a workout


@dataclass(frozen=True)
class Stored:
    """What is stored of some people."""

    fetched: Mapping[ResourceKey, Sequence[Fetched]] = field(default_factory=dict)
    days: Mapping[ResourceKey, Days] = field(default_factory=dict)
    newest: Mapping[ResourceKey, datetime] = field(default_factory=dict)
    outages: Sequence[Window] = ()


def span_of_pull(pull: Pull, now: datetime) -> Window:
    """What a pull was about; Junction's default range where it does not say."""
    end = max(min(pull.end or now, now), EARLIEST_HISTORY)
    start = max(min(pull.start or end - DEFAULT_HISTORY, end), EARLIEST_HISTORY)
    return start, end


def of_pull(pull: Pull, stored: Stored, now: datetime) -> Gap | None:
    """What is missing of the history that was pulled when a person connected."""
    key = ResourceKey(pull.user_id, pull.provider, pull.resource)
    if pull.status == "pulling":
        return Gap(key, "aggregator", f"still pulling: {pull.status_text}", is_pulling=True)
    if pull.status != "pulled":
        return Gap(key, "provider", ", ".join(dict.fromkeys(part for part in (pull.status, pull.status_text) if part)))
    # A window that was fetched before this pull began belongs to the pull before a re-authorisation.
    known = [
        one
        for one in stored.fetched.get(key, ())
        if not (one.finished_at and pull.began and one.finished_at < pull.began)
    ]
    wanted = _days(*span_of_pull(pull, now))
    if missing := wanted - _covered(known, "done", "open"):
        failed = missing & _covered(known, "lost")
        reason = "its backfill has failed" if failed else "pulled, and never announced to us"
        return Gap(key, "ours", reason, _windows(missing, now))
    if not catalogue()[pull.resource].has_days or wanted & _covered(known, "open"):
        return None
    have = wanted & set(stored.days.get(key, ()))
    again = _covered([one for one in known if one.requested_by != "notice"], "done")
    return _of_days(pull, have, wanted - have - again, now)


def _of_days(pull: Pull, have: Days, empty: Days, now: datetime) -> Gap | None:
    """Fetched in full, but fewer days than Junction counted. It is asked once more, and then it is its turn."""
    key, short = ResourceKey(pull.user_id, pull.provider, pull.resource), pull.days_with_data - len(have)
    if short <= 0:
        return None
    reason = f"{len(have)} of {pull.days_with_data} days have data"
    if empty:
        return Gap(key, "ours", reason, _windows(empty, now))
    # A day more or less is a matter of time zones.
    return Gap(key, "aggregator", f"{reason}, and its API gives no more") if short > 1 else None


def of_coverage(coverages: Iterable[ResourceCoverage], stored: Stored, since: datetime, now: datetime) -> Iterator[Gap]:
    """What is missing of what came later, of one connection of one person: whatever webhooks should have brought."""
    spans = {
        ResourceKey(one.user_id, one.provider, one.resource): span
        for one in coverages
        if (span := span_of_coverage(one, since, now))
    }
    days = {key: _days(*span) for key, span in spans.items()}
    covered = {key: _covered(stored.fetched.get(key, ()), "done", "open") for key in spans}
    have = {key: set(stored.days.get(key, ())) for key in spans}
    # Days of which there is nothing of anything: nobody measured, or nobody told us.
    silent = set[int]().union(*days.values()) - set[int]().union(*covered.values(), *have.values())
    for key, span in spans.items():
        left = days[key] - covered[key]
        lost = left & silent | _days_without_deliveries(key, days[key], stored) | _tail(key, span, stored)
        rest = days[key] - lost
        is_dense = len(rest & have[key]) >= DENSE * len(rest)
        quiet = left - have[key] if is_dense else left & silent
        if catalogue()[key.resource].day_field not in (None, "calendar_date"):
            quiet -= {max(days[key])}  # what ended on that day may have begun on the day before
        if found := quiet | lost:
            yield Gap(key, "ours", _reason(found, quiet), _windows(found, now))


def span_of_coverage(coverage: ResourceCoverage, since: datetime, now: datetime) -> Window | None:
    """What there should be by now."""
    if coverage.oldest is None or coverage.newest is None:
        return None
    start, end = max(coverage.oldest, since), min(coverage.newest, now - UNDER_WAY)
    return (start, end) if start <= end else None


def _days_without_deliveries(key: ResourceKey, days: Days, stored: Stored) -> Days:
    """Days on which nobody could reach us, and that nobody has asked for since."""
    found: set[int] = set()
    for start, end in stored.outages:
        since = [one for one in stored.fetched.get(key, ()) if one.created_at >= end - UNDER_WAY]
        found |= (_days(start, end) & days) - _covered(since, "done", "open")
    return found


def _tail(key: ResourceKey, span: Window, stored: Stored) -> Days:
    """Days after the newest that is stored, if there is something newer that nobody has asked for since."""
    _, newest = span
    have = stored.newest.get(key)
    if have is not None and have >= newest:
        return set()
    since = [one for one in stored.fetched.get(key, ()) if one.created_at >= newest]
    return _days(max(have or span[0], span[0]), newest) - _covered(since, "done", "open")


def _reason(found: Days, quiet: Days) -> str:
    return f"{len(found)} days without data" if found <= quiet else f"{len(found)} days, of which something is missing"


def _days(start: datetime, end: datetime) -> set[int]:
    return set(range(start.astimezone(UTC).toordinal(), end.astimezone(UTC).toordinal() + 1))


def _covered(windows: Iterable[Fetched], *states: str) -> set[int]:
    found: set[int] = set()
    for one in windows:
        if one.state in states:
            found |= _days(one.start, one.end)
    return found


def _windows(days: Days, now: datetime) -> tuple[Window, ...]:
    """The days as a few windows, the oldest first."""
    ordered = sorted(days)
    # Where the widest distances between neighbours are: there the windows end.
    steps = sorted(range(1, len(ordered)), key=lambda n: ordered[n] - ordered[n - 1], reverse=True)
    cuts = sorted(n for n in steps[: MAX_WINDOWS - 1] if ordered[n] - ordered[n - 1] > 1)
    edges = [0, *cuts, len(ordered)]
    runs = [ordered[start:end] for start, end in itertools.pairwise(edges)]
    return tuple((_midnight(run[0]), min(_midnight(run[-1] + 1), now)) for run in runs if run)


def _midnight(ordinal: int) -> datetime:
    return datetime.combine(date.fromordinal(ordinal), time(), UTC)
