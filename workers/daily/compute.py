"""Computes the days of stretches from stored rows: reads, applies the rules, and writes the values that differ."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from sqlalchemy import Connection

from app.catalogue import catalogue
from workers.daily.counters import counter_days
from workers.daily.gauges import gauge_days, last_days
from workers.daily.metrics import SESSIONS, parts_of
from workers.daily.model import DaySample
from workers.daily.neighbours import offsets_at
from workers.daily.queue import Stretch
from workers.daily.read import Inputs, read
from workers.daily.sessions import KeptSession, kept_nights, kept_workouts, sleep_days, workout_days
from workers.daily.state import users_of
from workers.daily.write import Computed, write_days, write_sessions

OWN_OFFSET = 0  # the place of `sample` in ZONE_SOURCES


def recompute(connection: Connection, stretches: Sequence[Stretch], expired: Mapping[str, datetime]) -> int:
    """Computes stretches of different people or resources, and writes what differs. Returns the number of rows.

    Idempotent. Days before `expired`, by resource, are kept if fewer rows are stored than they were computed from.
    Announces the written days in the change feed, in the caller's transaction.
    """
    users = users_of(connection, sorted({one.person for one in stretches}))
    found = compute(connection, stretches, users)
    changed = write_days(connection, found, users, expired)
    write_sessions(connection, [one for one in found if one.inputs.stretch.resource in SESSIONS], expired)
    return changed


def compute(connection: Connection, stretches: Sequence[Stretch], users: Mapping[str, Sequence[str]]) -> list[Computed]:
    """Computes stretches and writes nothing."""
    return [_apply_rules(connection, one, users) for one in read(connection, stretches, users)]


def _apply_rules(connection: Connection, inputs: Inputs, users: Mapping[str, Sequence[str]]) -> Computed:
    stretch = inputs.stretch
    if stretch.resource in SESSIONS:
        kept = _kept(connection, inputs, users)
        return Computed(inputs, sleep_days(kept) if stretch.resource == "sleep" else workout_days(kept), kept)
    resource = catalogue()[stretch.resource]
    days = []
    for metric, samples in samples_of(connection, inputs, users).items():
        if resource.day == "counter":
            days += counter_days(metric, samples, inputs.summaries, resource.unit)
        else:
            rule = gauge_days if resource.day == "gauge" else last_days
            days += rule(metric, samples, resource.unit)
    return Computed(inputs, [one for one in days if stretch.has(one.day)])


def samples_of(
    connection: Connection, inputs: Inputs, users: Mapping[str, Sequence[str]]
) -> dict[str, list[DaySample]]:
    """The samples of a stretch by metric, each with an offset. Those whose number is unusable are left out."""
    person = inputs.stretch.person
    missing = {
        start
        for series in inputs.samples
        for start, offset in zip(series.starts, series.offsets, strict=True)
        if offset is None
    }
    offsets = offsets_at(connection, person, users.get(person, ()), missing)
    found: dict[str, list[DaySample]] = {}
    for metric, field in parts_of(catalogue()[inputs.stretch.resource]).items():
        found[metric] = rows = []
        for series in inputs.samples:
            numbers = series.numbers(field)
            columns = zip(series.starts, series.stops, numbers, series.offsets, series.units, strict=True)
            for start, stop, value, offset, unit in columns:
                if value is not None:
                    at, zone = offsets[start] if offset is None else (offset, OWN_OFFSET)
                    rows.append(DaySample(series.source, start, stop, value, at, zone, unit, series.user_id))
    return found


def _kept(connection: Connection, inputs: Inputs, users: Mapping[str, Sequence[str]]) -> list[KeptSession]:
    """The sessions that are kept on the dates of a stretch. A night has the offset of its end."""
    stretch, is_sleep = inputs.stretch, inputs.stretch.resource == "sleep"
    sessions = [(one, has_offset, one.stop if is_sleep else one.start) for one, has_offset in inputs.sessions]
    missing = {moment for _, has_offset, moment in sessions if not has_offset}
    offsets = offsets_at(connection, stretch.person, users.get(stretch.person, ()), missing)
    given = []
    for one, has_offset, moment in sessions:
        offset, zone = (one.offset, OWN_OFFSET) if has_offset else offsets[moment]
        given.append(one._replace(offset=offset, zone=zone))
    rule = kept_nights if is_sleep else kept_workouts
    return [one for one in rule(given) if stretch.has(one.day)]
