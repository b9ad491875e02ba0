"""Samples of replaced versions: every order of arrival ends in the same rows."""

import itertools
import logging
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine, text

from app.config.settings import Settings
from app.delivery import Delivery, Receipt, pack, seal
from app.sealing import Sealer
from tests.support import ENCRYPTION_KEY, rows
from tests.support.cases import Failures
from tests.support.database import emptied
from tests.support.terra import USER, event
from workers.ingest.apply import Applier
from workers.ingest.replay import replay
from workers.operate.erase import Eraser
from workers.store import retention
from workers.store.archive import ArchiveWindow
from workers.store.user_merges import merge_user

FIRST = datetime(2026, 3, 14, 12, tzinfo=UTC)
DELETED, STORED = 4, 1  # upload_type
ALWAYS = ArchiveWindow(FIRST - timedelta(days=400), datetime.now(UTC) + timedelta(days=1))
HEART = "SELECT to_char(ts, 'HH24:MI') AS at, value FROM health.heartrate ORDER BY ts"
STEPS = "SELECT sum(value) AS steps FROM health.steps"
WORKOUTS = "SELECT id, title, version FROM health.workouts ORDER BY id"
Beats = dict[str, int]  # by the time of day


def activity(
    version: int,
    *,
    beats: Beats | None = None,
    steps: Beats | None = None,
    key: str = "a",
    kind: int = STORED,
    user: str = "t1",
) -> Delivery:
    """A version of an activity. A missing array is null, as if the version had no samples of that kind."""
    metadata = {"start_time": "2026-03-14T07:00:00Z", "end_time": "2026-03-14T08:00:00Z", "summary_id": key}
    hr = [{"timestamp": f"2026-03-14T{at}:00Z", "bpm": value} for at, value in (beats or {}).items()]
    totals = [{"timestamp": f"2026-03-14T{at}:00Z", "steps": value} for at, value in (steps or {}).items()]
    body = event(
        "activity",
        {
            "metadata": metadata | {"upload_type": kind, "name": f"version {version}"},
            "heart_rate_data": {"detailed": {"hr_samples": hr if beats is not None else None}},
            "distance_data": {"detailed": {"step_samples": totals if steps is not None else None}},
        },
        user=USER | {"user_id": user},
    )
    ordering = round((FIRST + timedelta(minutes=version)).timestamp() * 1000)
    name = f"{user}-{key}-{version}-{kind}"
    return seal("terra", Receipt(name, ordering), msgspec.json.encode(body), Sealer([ENCRYPTION_KEY]))


LONG = {"07:00": 120, "07:10": 130, "07:20": 140, "07:30": 150, "07:40": 160}
SHORT = {"07:00": 121, "07:10": 131}
TRIMMED = (activity(1, beats=LONG, steps={"07:10": 10, "07:20": 30}), activity(2, beats=SHORT, steps={"07:15": 7}))
VERSIONS = (
    *TRIMMED,
    activity(3, kind=DELETED),
    activity(4, beats={"07:30": 99}),
    activity(5, beats={}, steps={"07:05": 3}),
)
OTHER = activity(2, beats={"07:20": 80, "07:50": 81}, key="b")  # overlaps with the first version of `a`


def stored(engine: Engine) -> list[Any]:
    return [rows(engine, query) for query in (HEART, STEPS, WORKOUTS)]


def apply_all(
    engine: Engine, settings: Settings, deliveries: Sequence[Delivery], *, together: bool = False
) -> list[Any]:
    applier = Applier(engine, settings)
    for message in [deliveries] if together else [[one] for one in deliveries]:
        assert not applier.apply(pack(message)).outcomes["dead"]
    return stored(engine)


def hours(found: list[Any]) -> dict[str, float]:
    """The heart rates, by the time of day."""
    return {row["at"]: row["value"] for row in found[0]}


def test_a_trimmed_activity_keeps_only_its_own_samples(engine: Engine, settings: Settings) -> None:
    """Breaks if samples outlive the version that they came with, or the sum of two grids is stored."""
    found = apply_all(engine, settings, TRIMMED)
    assert hours(found) == SHORT
    assert found[1] == [{"steps": 7.0}]


@pytest.mark.parametrize(
    ("newer", "left"),
    [
        (activity(2, beats={}), LONG),
        (activity(2), LONG),
        (activity(2, beats={"07:50": 1}), {"07:50": 1}),
        (activity(2, kind=DELETED), {}),
        (activity(2, beats=LONG, kind=DELETED), {}),
    ],
    ids=["empty", "null", "apart", "deleted", "deleted with samples"],
)
def test_a_newer_version_replaces_the_series_that_it_has(
    engine: Engine, settings: Settings, newer: Delivery, left: Beats
) -> None:
    """Breaks if an empty array deletes samples (Terra: snapshots may have none), or a deletion leaves some."""
    for order in itertools.permutations([activity(1, beats=LONG), newer]):
        with emptied(engine):
            assert hours(apply_all(engine, settings, order)) == left


@pytest.mark.parametrize("together", [True, False])
def test_every_order_of_versions_ends_in_the_same_rows(engine: Engine, settings: Settings, *, together: bool) -> None:
    """Breaks if a late version, a deletion or a restored object brings back samples, in any of the 120 orders."""
    failures, expected = Failures(), apply_all(engine, settings, VERSIONS)
    assert hours(expected) == {"07:30": 99}
    assert expected[1] == [{"steps": 3.0}]
    for order in itertools.permutations(VERSIONS):
        with failures.of(*(one.message_id for one in order)), emptied(engine):
            assert apply_all(engine, settings, order, together=together) == expected
    assert failures == {}


def test_overlapping_objects_end_in_the_same_rows(engine: Engine, settings: Settings) -> None:
    """Breaks if an object that overlaps with a replaced one ends in other rows, depending on the order."""
    some = (*TRIMMED, OTHER, activity(3, beats=SHORT))
    expected = apply_all(engine, settings, some)
    assert hours(expected) == SHORT | {"07:50": 81}
    for order in itertools.permutations(some):
        with emptied(engine):
            assert apply_all(engine, settings, order) == expected


def test_workers_that_run_side_by_side_end_in_the_same_rows(engine: Engine, settings: Settings) -> None:
    """Breaks if two workers that apply versions of one object at the same moment leave samples of the older one."""
    expected = apply_all(engine, settings, VERSIONS)
    for seed in range(20):
        shuffled = random.Random(seed).sample(VERSIONS, len(VERSIONS))
        appliers = [Applier(engine, settings) for _ in shuffled]
        with emptied(engine), ThreadPoolExecutor(3) as pool:
            list(pool.map(Applier.apply, appliers, [pack([one]) for one in shuffled]))
            assert stored(engine) == expected, seed


def test_a_repetition_and_a_replay_change_nothing(engine: Engine, settings: Settings) -> None:
    """Breaks if a replayed older version brings its samples back, or a repetition deletes those of the newer one."""
    expected = apply_all(engine, settings, VERSIONS)
    assert apply_all(engine, settings, VERSIONS) == expected
    for order in ("newest", "oldest", "random"):
        replay(engine, Applier(engine, settings), ALWAYS, order, lambda _: None)
        assert stored(engine) == expected


LEFT_BEHIND = text("""
INSERT INTO headrace.samples (ts, value, version, stored_at, series_id, origin, unit)
SELECT ts + interval '30 minutes', 1, version - interval '1 minute', stored_at, series_id, origin, unit
FROM headrace.samples JOIN headrace.series ON id = series_id WHERE resource = 'heartrate'""")


def test_a_replay_removes_what_the_former_release_has_left_behind(engine: Engine, settings: Settings) -> None:
    """Breaks if an update leaves wrong sums for ever."""
    expected = apply_all(engine, settings, TRIMMED)
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM headrace.sample_ranges"))
        connection.execute(LEFT_BEHIND)
    assert len(hours(stored(engine))) == len(SHORT) * 2
    replay(engine, Applier(engine, settings), ALWAYS, "oldest", lambda _: None)
    assert stored(engine) == expected


@pytest.mark.parametrize("order", list(itertools.permutations(["old", "new", "merge"])))
def test_a_reconnection_replaces_too(engine: Engine, settings: Settings, order: Sequence[str]) -> None:
    """Breaks if the version under the former user_id adds its samples to those of the newer one."""
    applier = Applier(engine, settings)
    for step in order:
        if step == "merge":
            with engine.begin() as connection:
                merge_user(connection, "old", "new")
        else:
            version, beats = (1, LONG) if step == "old" else (2, SHORT)
            applier.apply(pack([activity(version, beats=beats, user=step)]))
    assert hours(stored(engine)) == SHORT
    assert rows(engine, "SELECT DISTINCT user_id FROM health.heartrate") == [{"user_id": "new"}]


def test_an_erasure_and_retention_remove_the_ranges(engine: Engine, settings: Settings) -> None:
    """Breaks if the ids of a person's records stay behind, or the ranges grow for ever."""
    count = "SELECT count(*) AS n FROM headrace.sample_ranges"
    apply_all(engine, settings, [*VERSIONS, activity(1, beats=LONG, user="t2")])
    assert rows(engine, count) == [{"n": 3}]
    Eraser(engine, settings).erase("t1", lambda _: None)
    assert rows(engine, count) == [{"n": 1}]
    for _ in retention.remove(engine, {"heartrate": FIRST}):
        pass
    assert rows(engine, count) == [{"n": 0}]


def test_removed_samples_are_counted(engine: Engine, settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """Breaks if the count of removed samples makes another count negative, so that the message is applied twice."""
    caplog.set_level(logging.INFO)
    apply_all(engine, settings, TRIMMED)
    assert "one by one" not in caplog.text
