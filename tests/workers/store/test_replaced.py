"""Samples of replaced versions: every order of arrival ends in the same rows."""

import contextlib
import itertools
import logging
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import msgspec
import pytest
from sqlalchemy import Engine, text

from app.catalogue import catalogue
from app.config.settings import Settings
from app.delivery import Delivery, Receipt, pack, seal
from app.errors import RetryAlone
from app.sealing import Sealer
from tests.support import ENCRYPTION_KEY, rows
from tests.support.cases import Failures
from tests.support.database import emptied
from tests.support.terra import USER, event
from workers.actions import Sample, Samples
from workers.aggregators.terra.api import read_page
from workers.ingest.apply import Applier
from workers.ingest.replay import replay
from workers.operate.erase import Eraser
from workers.store import replaced, retention
from workers.store.archive import ArchiveWindow
from workers.store.engine import make_writer, transaction
from workers.store.feed import Sequencer
from workers.store.replaced import ReplacedRange
from workers.store.series import SeriesNumbers
from workers.store.user_merges import merge_user
from workers.store.writer import BatchItem, write

FIRST = datetime(2026, 3, 14, 12, tzinfo=UTC)
DELETED, STORED = 4, 1  # upload_type
ALWAYS = ArchiveWindow(FIRST - timedelta(days=400), datetime.now(UTC) + timedelta(days=1))
HEART = "SELECT to_char(ts, 'HH24:MI') AS at, value FROM health.heartrate ORDER BY ts"
STEPS = "SELECT sum(value) AS steps FROM health.steps"
WORKOUTS = "SELECT id, title, version FROM health.workouts ORDER BY id"
CHANGES = """
SELECT op, rows, to_char(ts_min, 'HH24:MI') AS first, to_char(ts_max, 'HH24:MI') AS last FROM health.changes
WHERE resource = 'heartrate' AND position > :after ORDER BY position"""
Beats = dict[str, int]  # by the time of day


@dataclass(frozen=True)
class Page:
    """A page of history with these objects of one type."""

    name: str
    version: int
    objects: tuple[Any, ...]


Arrival = Delivery | Page


def at(version: int) -> datetime:
    """The time of a version."""
    return FIRST + timedelta(minutes=version)


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
    given = item(key, beats, steps)
    given["metadata"] |= {"upload_type": kind, "name": f"version {version}"}
    return sent("activity", version, given, key=f"{user}-{key}-{version}-{kind}", user=user)


def item(key: str, beats: Beats | None = None, steps: Beats | None = None) -> dict[str, Any]:
    """An object of Terra's."""
    hr = [{"timestamp": f"2026-03-14T{time}:00Z", "bpm": value} for time, value in (beats or {}).items()]
    totals = [{"timestamp": f"2026-03-14T{time}:00Z", "steps": value} for time, value in (steps or {}).items()]
    heart = {"detailed": {"hr_samples": hr if beats is not None else None}}
    return {
        "metadata": {"start_time": "2026-03-14T07:00:00Z", "end_time": "2026-03-14T08:00:00Z", "summary_id": key},
        "heart_rate_data": heart,
        "heart_data": {"heart_rate_data": heart},  # of a body object
        "distance_data": {"detailed": {"step_samples": totals if steps is not None else None}},
    }


def sent(name: str, version: int, *objects: Any, key: str, user: str = "t1") -> Delivery:
    """A delivery with objects of one type."""
    body = msgspec.json.encode(event(name, *objects, user=USER | {"user_id": user}))
    return seal("terra", Receipt(key, round(at(version).timestamp() * 1000)), body, Sealer([ENCRYPTION_KEY]))


LONG = {"07:00": 120, "07:10": 130, "07:20": 140, "07:30": 150, "07:40": 160}
SHORT = {"07:00": 121, "07:10": 131}
TRIMMED = (activity(1, beats=LONG, steps={"07:10": 10, "07:20": 30}), activity(2, beats=SHORT, steps={"07:15": 7}))
VERSIONS = (
    *TRIMMED,
    activity(3, kind=DELETED),
    activity(4, beats={"07:30": 99}),
    activity(5, beats={}, steps={"07:05": 3}),
)


def stored(engine: Engine) -> list[Any]:
    return [rows(engine, query) for query in (HEART, STEPS, WORKOUTS)]


def apply_all(
    engine: Engine, settings: Settings, deliveries: Sequence[Delivery], *, together: bool = False
) -> list[Any]:
    applier = Applier(engine, settings)
    for message in [deliveries] if together else [[one] for one in deliveries]:
        assert not applier.apply(pack(message)).outcomes["dead"]
    return stored(engine)


def arrive(engine: Engine, settings: Settings, arrivals: Sequence[Arrival]) -> list[Any]:
    """Applies deliveries and writes pages, one by one."""
    for one in arrivals:
        if isinstance(one, Page):
            _write_page(engine, one)
        else:
            apply_all(engine, settings, [one])
    return stored(engine)


def _write_page(engine: Engine, page: Page, *, together: bool = True) -> None:
    """Writes a page, or each of its actions alone, as after an error."""
    resource = catalogue().of_terra(page.name)
    body = msgspec.json.encode({"data": page.objects, "user": USER})
    actions = read_page(resource, USER["user_id"], body, at(page.version)).actions
    numbers = SeriesNumbers(engine).prepare("terra", actions)
    for part in [actions] if together else [[one] for one in actions]:
        with transaction(engine) as connection:
            write(connection, [BatchItem(0, one) for one in part], "backfill", numbers)


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


@pytest.mark.parametrize("name", ["daily", "sleep", "body"])
def test_every_type_is_replaced_by_deliveries_and_pages(engine: Engine, settings: Settings, name: str) -> None:
    """Breaks if a day, a night or a body object, or one that is fetched, adds its samples to those of its versions."""
    versions = (
        sent(name, 1, item("s", {"07:00": 1, "07:20": 2}, {"07:10": 10, "07:20": 30}), key="1"),
        Page(name, 2, (item("s", {"07:10": 3}, {"07:15": 25}),)),
        sent(name, 3, item("s", {"07:05": 9}, {"07:30": 7}), key="3"),
    )
    failures = Failures()
    for order in itertools.permutations(versions):
        with failures.of(*(versions.index(one) for one in order)), emptied(engine):
            found = arrive(engine, settings, order)
            assert hours(found) == {"07:05": 9}
            assert found[1] == [{"steps": 7.0 if name == "daily" else None}]
    assert failures == {}


def test_a_late_page_whose_actions_are_written_alone_brings_nothing_back(engine: Engine, settings: Settings) -> None:
    """Breaks if samples that are written without their record, because another one was refused, are not compared."""
    apply_all(engine, settings, TRIMMED)
    _write_page(engine, Page("activity", 1, (item("a", LONG),)), together=False)
    assert hours(stored(engine)) == SHORT


A, B = activity(1, beats=LONG), activity(2, beats={"07:20": 80, "07:50": 81}, key="b")
OVERLAPPING: dict[str, tuple[Sequence[Arrival], Beats]] = {
    "trimmed": ((*TRIMMED, B, activity(3, beats=SHORT)), SHORT | {"07:20": 80, "07:50": 81}),
    "sent again": ((A, B, activity(3, beats=LONG)), LONG | {"07:50": 81}),
    "withdrawn": ((A, B, activity(3, beats={"07:15": 83}, key="b")), LONG | {"07:15": 83}),
    "deleted": ((A, B, activity(3, kind=DELETED, key="b"), activity(4, kind=DELETED, key="c")), LONG),
    "emptied": (
        (
            activity(1, beats={"07:10": 1}),
            activity(2, beats={}),
            B,
            activity(3, beats={"07:00": 5, "07:30": 6}, key="b"),
        ),
        {"07:00": 5, "07:10": 1, "07:30": 6},
    ),
    "several": (
        (
            *(A, B, activity(5, beats=SHORT)),
            *(activity(3, beats={"07:20": 90, "07:30": 91}, key="c"), activity(4, beats={"07:40": 92}, key="c")),
        ),
        SHORT | {"07:20": 80, "07:40": 92, "07:50": 81},
    ),
    "of one page": (
        (
            Page("activity", 1, (item("a", {"07:00": 1, "07:20": 2}), item("b", {"07:20": 5, "07:30": 6}))),
            activity(2, beats={"07:10": 7, "07:40": 8}, key="b"),
            activity(3, beats={"07:05": 9}, key="c"),
        ),
        {"07:00": 1, "07:05": 9, "07:10": 7, "07:20": 2, "07:40": 8},
    ),
}


@pytest.mark.parametrize("case", OVERLAPPING)
def test_an_object_never_costs_the_samples_of_another(engine: Engine, settings: Settings, case: str) -> None:
    """Breaks if overlapping objects do not end, in every order, in the samples of their newest versions."""
    arrivals, expected = OVERLAPPING[case]
    failures = Failures()
    for order in itertools.permutations(arrivals):
        with failures.of(*(arrivals.index(one) for one in order)), emptied(engine):
            assert hours(arrive(engine, settings, order)) == expected
    assert failures == {}


SIDE_BY_SIDE = (
    *(activity(1, beats=LONG), activity(3, beats=SHORT)),
    *(activity(2, beats={"07:05": 1, "07:35": 2}, key="b"), activity(4, beats={"07:15": 3}, key="b")),
)


def test_a_replacement_is_one_change(engine: Engine, settings: Settings) -> None:
    """Breaks if the feed has a change for each range, or none for samples that were restored."""
    sequencer = Sequencer(engine)
    b = activity(2, beats={"07:20": 80, "07:30": 81}, key="b")
    apply_all(engine, settings, [A, b, activity(2, beats={"07:50": 1, "07:55": 2}, key="c")])
    sequencer.run()
    (newest,) = rows(engine, "SELECT newest_position AS n FROM health.feed")
    newer = [activity(3, beats={"07:31": 82}, key="b"), activity(3, beats={"07:56": 3}, key="c")]
    found = hours(apply_all(engine, settings, newer, together=True))
    assert found == LONG | {"07:31": 82, "07:56": 3}
    sequencer.run()
    assert rows(engine, CHANGES, after=newest["n"]) == [
        {"op": "remove", "rows": 4, "first": "07:20", "last": "07:55"},
        {"op": "put", "rows": 4, "first": "07:20", "last": "07:56"},
    ]


def _apply_finally(applier: Applier, message: str) -> None:
    """Applies a message, again if another worker held a lock for too long."""
    for _ in range(9):
        with contextlib.suppress(RetryAlone):
            if not applier.apply(message).unsettled:
                return
    pytest.fail("never applied")


@pytest.mark.parametrize("versions", [VERSIONS, SIDE_BY_SIDE], ids=["one object", "two that overlap"])
def test_workers_that_run_side_by_side_end_in_the_same_rows(
    engine: Engine, settings: Settings, versions: Sequence[Delivery]
) -> None:
    """Breaks if two workers that apply objects at the same moment leave samples of an older version, or lose some."""
    expected = apply_all(engine, settings, versions)
    for seed in range(20):
        shuffled = random.Random(seed).sample(versions, len(versions))
        appliers = [Applier(engine, settings) for _ in shuffled]
        with emptied(engine), ThreadPoolExecutor(3) as pool:
            list(pool.map(_apply_finally, appliers, [pack([one]) for one in shuffled]))
            assert stored(engine) == expected, seed


@pytest.mark.parametrize("reverse", [False, True])
def test_a_large_range_is_replaced_in_parts(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch, *, reverse: bool
) -> None:
    """Breaks if a part deletes samples of another object that begin or end it, or keeps replaced ones."""
    monkeypatch.setattr(replaced, "MAX_ROWS", 1)
    arrivals, expected = OVERLAPPING["several"]
    assert hours(arrive(engine, settings, arrivals[::-1] if reverse else arrivals)) == expected


NEW_SERIES = text("""
INSERT INTO headrace.series (user_id, resource, provider, source_type, subtype)
VALUES ('t1', 'heartrate', 'GARMIN', 'activity', '') RETURNING id""")
A_THOUSAND = text("""
INSERT INTO headrace.samples (series_id, ts, value, unit, version, origin, stored_at)
SELECT :series, :first + make_interval(secs => n), n, 'bpm', :version, 'webhook', now()
FROM generate_series(1, 1000) n""")


def test_many_samples_of_other_objects_do_not_reach_the_timeout(engine: Engine, settings: Settings) -> None:
    """Breaks if each stored sample is compared with each one to keep, once those exceed work_mem."""
    impatient = make_writer(settings, session={"work_mem": "64kB", "statement_timeout": "3s"})
    with engine.begin() as connection:
        series = connection.execute(NEW_SERIES).scalar_one()
        connection.execute(A_THOUSAND, {"series": series, "first": FIRST, "version": at(1)})
    kept = [Sample(FIRST + timedelta(seconds=n / 100), None, -1.0, "bpm", None, None) for n in range(100_000)]
    one = ReplacedRange(series, "a", at(2), FIRST, FIRST + timedelta(seconds=1000))
    other = Samples("heartrate", "t1", "GARMIN", "activity", "", kept, at(1), "b")
    with transaction(impatient) as connection:
        (found,) = replaced._remove(connection, one, [replaced._Other(cast("Any", one), other)])
    assert found.rows == 1000
    impatient.dispose()


def test_overlapping_ranges_are_found_by_their_end(engine: Engine) -> None:
    """Breaks if an update reads all ranges that its series ever had."""
    none = replaced.RANGES.values([])
    with engine.connect() as connection:  # without a commit, so that no other test sees these ranges
        connection.execute(
            text("""
INSERT INTO headrace.sample_ranges (series_id, id, version, first, last)
SELECT 1, n, now(), now() - make_interval(hours => n), now() - make_interval(hours => n)
FROM generate_series(1, 5000) n""")
        )
        connection.execute(text("ANALYZE headrace.sample_ranges"))
        connection.execute(text("SET LOCAL enable_seqscan = off"))
        connection.execute(text("SET LOCAL enable_bitmapscan = off"))
        plan = "\n".join(connection.scalars(text(f"EXPLAIN {replaced.OTHERS}"), none))
    assert "Index Scan using sample_ranges_last" in plan
    assert "last >= given.first" in plan


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


def test_a_reconnection_replaces_in_slices(engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if one statement compares all ranges of a person, which reached its timeout for ten years of days."""
    sizes = list[int]()

    def remove(connection: Any, ranges: Sequence[ReplacedRange], origin: Any) -> Any:
        sizes.append(len(ranges))
        return original(connection, ranges, origin)

    original = replaced.remove
    for user, first in (("old", 1), ("new", 3)):
        for key, beats in (("a", LONG), ("b", {"07:20": 80, "07:50": 81})):
            later = {"07:15": 83} if key == "b" else SHORT
            versions = [activity(first, beats=beats, key=key, user=user)]
            versions += [activity(first + 1, beats=later, key=key, user=user)] if user == "new" else []
            apply_all(engine, settings, versions)
    monkeypatch.setattr(replaced, "remove", remove)
    monkeypatch.setattr(replaced, "MAX_RANGES", 1)
    with engine.begin() as connection:
        merge_user(connection, "old", "new")
    assert sizes == [1, 1]
    assert hours(stored(engine)) == SHORT | {"07:15": 83}


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
