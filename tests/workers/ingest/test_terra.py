"""Terra's events as rows: what a reader finds, whatever the order, and what became of each delivery."""

import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine

from app.catalogue import catalogue
from app.config.settings import Settings
from app.delivery import Delivery, Receipt, pack, seal
from app.sealing import Sealer
from tests.support import ENCRYPTION_KEY, apply, rows
from tests.support.cases import Failures
from tests.support.database import emptied
from tests.support.terra import METADATA, RECORDED, USER, event, item, recorded
from workers.actions import Record, Samples
from workers.aggregators.terra import parse
from workers.ingest.apply import Applier

FIRST = datetime(2026, 3, 14, 12, tzinfo=UTC)
EVENTS = sorted(path.stem for path in (RECORDED / "events").glob("*.json"))
COUNTER = itertools.count()
CONNECTIONS = "SELECT user_id, provider, status, error FROM health.connections"


def sent(body: dict[str, Any], minute: float = 0, *, name: str | None = None) -> Delivery:
    """A delivery that Terra made at a minute."""
    ordering = round((FIRST + timedelta(minutes=minute)).timestamp() * 1000)
    receipt = Receipt(name or f"trace-{next(COUNTER)}", ordering)
    return seal("terra", receipt, msgspec.json.encode(body), Sealer([ENCRYPTION_KEY]))


def day(steps: int, **more: Any) -> dict[str, Any]:
    """A day on which somebody walked."""
    return event("daily", item(distance_data={"steps": steps}, **more))


def ride(name: str, upload_type: int, summary_id: str = "s1", beats: list[Any] | None = None) -> dict[str, Any]:
    """A workout, or its deletion."""
    metadata = METADATA | {"name": name, "upload_type": upload_type, "summary_id": summary_id}
    return event("activity", {"metadata": metadata, "heart_rate_data": {"detailed": {"hr_samples": beats}}})


def test_every_event_leaves_what_it_says(engine: Engine, settings: Settings) -> None:
    """Breaks if an event dies, or a record or sample of it does not reach its view as it was sent."""
    failures = Failures()
    for name in [name for name in EVENTS if name != "s3_payload"]:
        with failures.of(name), emptied(engine):
            delivery = sent(recorded(f"events/{name}"))
            (outcome,) = apply(engine, settings, delivery)
            assert outcome != "dead"
            raw = msgspec.json.encode(recorded(f"events/{name}"))
            found = parse(delivery, raw, settings)
            for action in found.actions:
                if isinstance(action, Record):
                    query = f'SELECT * FROM health."{action.resource}" WHERE user_id = :user AND id = :id'
                    (row,) = rows(engine, query, user=action.user_id, id=action.id)
                    assert row["payload"] == msgspec.json.decode(action.payload)
                    assert (row["client_user_id"], row["version"]) == (found.client_user_id, action.version)
                    filled = {field for field, value in row.items() if value is not None}
                    assert {
                        key for key, value in msgspec.json.decode(action.columns or b"").items() if value is not None
                    } <= filled
                elif isinstance(action, Samples):
                    query = f'SELECT ts, ts_end, value FROM health."{action.resource}" '
                    query += "WHERE source_type = :type AND subtype = :of"
                    stored = rows(engine, query, type=action.source_type, of=action.subtype)
                    assert sorted((row["ts"], row["value"]) for row in stored) == sorted(
                        (one.ts, one.value) for one in action.rows
                    )
    assert failures == {}


def test_there_is_something_of_every_type(engine: Engine, settings: Settings) -> None:
    """Breaks if one of Terra's types leaves nothing in its view."""
    apply(engine, settings, *(sent(recorded(f"events/{name}")) for name in EVENTS))
    views = {one.name for one in catalogue().values() if one.holds_terra} | {"terra_scores"}
    counts = {name: rows(engine, f'SELECT count(*) AS n FROM health."{name}"')[0]["n"] for name in views}
    assert len(views) == 12
    assert {name for name, count in counts.items() if not count} == set()
    assert rows(engine, "SELECT outcome, count(*) AS n FROM health.deliveries WHERE outcome = 'dead' GROUP BY 1") == []


@pytest.mark.parametrize("together", [True, False])
def test_all_orders_of_five_versions_end_in_the_newest(engine: Engine, settings: Settings, *, together: bool) -> None:
    """Breaks if any of the 120 orders, in one message or in five, ends otherwise: updates, a deletion, a revival."""
    versions = [("first", 1), ("second", 3), ("third", 4), ("fourth", 3), ("fifth", 4)]
    applier = Applier(engine, settings)
    waves: list[list[Delivery]] = [[] for _ in versions]
    for number, order in enumerate(itertools.permutations(range(5))):
        for position, version in enumerate(order):
            name, upload_type = versions[version]
            waves[position].append(sent(ride(name, upload_type, f"deleted-{number}"), version))
            revived = 1 if version == 4 else upload_type
            waves[position].append(sent(ride(name, revived, f"revived-{number}"), version))
    for message in [list(itertools.chain(*waves))] if together else waves:
        applier.apply(pack(message))
    query = "SELECT split_part(id, '-', 1) AS kind, title, count(*) AS n FROM health.workouts GROUP BY 1, 2"
    assert rows(engine, query) == [{"kind": "revived", "title": "fifth", "n": 120}]
    assert rows(engine, "SELECT count(*) AS n FROM headrace.workouts WHERE deleted") == [{"n": 120}]


def test_a_deletion_and_a_revival_as_they_come(engine: Engine, settings: Settings) -> None:
    """Breaks if a deletion is not a version like any other."""
    seen = []
    for minute, upload_type in ((1, 1), (3, 4), (2, 3), (3, 4), (4, 1)):
        (outcome,) = apply(engine, settings, sent(ride("ride", upload_type), minute))
        seen.append((outcome, len(rows(engine, "SELECT 1 FROM health.workouts"))))
    assert seen == [("applied", 1), ("applied", 0), ("stale", 0), ("duplicate", 0), ("applied", 1)]


def test_a_retracted_observation_is_gone(engine: Engine, settings: Settings) -> None:
    """Breaks if what somebody entered in error is still shown."""
    told = recorded("events/health_observation")
    apply(engine, settings, sent(told, 0))
    assert len(rows(engine, "SELECT 1 FROM health.terra_health_observation")) == 1
    told["data"][0]["observation_data"]["status"] = 3
    apply(engine, settings, sent(told, 1))
    assert rows(engine, "SELECT 1 FROM health.terra_health_observation") == []


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_scores_that_are_null_later_do_not_erase(engine: Engine, settings: Settings, order: tuple[int, int]) -> None:
    """Breaks if an update that brings no scores takes those that were there, in either order."""
    days = [
        day(1, data_enrichment={"strain_index": 9.5, "immune_index": 3}),
        day(2, data_enrichment={"strain_index": None}),
    ]
    for minute in order:
        apply(engine, settings, sent(days[minute], minute))
    assert rows(engine, "SELECT steps FROM health.activity") == [{"steps": 2}]
    scores = rows(engine, "SELECT subtype, value, source_type FROM health.terra_scores ORDER BY 1")
    assert [(row["subtype"], row["value"]) for row in scores] == [("immune_index", 3), ("strain_index", 9.5)]


def test_empty_arrays_do_not_delete(engine: Engine, settings: Settings) -> None:
    """Breaks if a snapshot without samples takes those that are stored."""
    beats = [{"timestamp": "2026-03-14T08:00:00Z", "bpm": 70}]
    for minute, given in enumerate((beats, [], None)):
        apply(engine, settings, sent(ride("ride", 1, beats=given), minute))
    assert rows(engine, "SELECT value FROM health.heartrate") == [{"value": 70.0}]


def test_series_of_different_origins_are_not_mixed(engine: Engine, settings: Settings) -> None:
    """Breaks if a workout's heart rate overwrites the day's, or steps of both are one series."""
    beats = {"detailed": {"hr_samples": [{"timestamp": "2026-03-14T08:00:00Z", "bpm": 70}]}}
    names = ("activity", "daily", "sleep")
    apply(engine, settings, *(sent(event(name, item(heart_rate_data=beats))) for name in names))
    query = "SELECT source_type, provider FROM health.heartrate ORDER BY 1"
    assert rows(engine, query) == [{"source_type": name, "provider": "garmin"} for name in names]


def test_one_id_of_two_connections_is_two_workouts(engine: Engine, settings: Settings) -> None:
    """Breaks if Terra's summary_id, which is unique for a user only, is taken for unique."""
    other = ride("other", 1) | {"user": USER | {"user_id": "t2"}}
    apply(engine, settings, sent(ride("one", 1)), sent(other))
    query = "SELECT user_id, title, client_user_id FROM health.workouts ORDER BY 1"
    assert [tuple(row.values()) for row in rows(engine, query)] == [
        ("t1", "one", "member-1"),
        ("t2", "other", "member-1"),
    ]


def test_the_same_again_is_a_duplicate(engine: Engine, settings: Settings) -> None:
    """Breaks if a retry, or the same content under another id, is written again or counts as news."""
    body = day(5, data_enrichment={"strain_index": 1})
    rows_of = "SELECT xmin::text, ctid::text FROM headrace."
    query = f"{rows_of}activity UNION ALL {rows_of}samples"
    assert apply(engine, settings, sent(body, name="trace")) == {"applied": 1}
    before = rows(engine, query)
    assert apply(engine, settings, sent(body, name="trace")) == {"duplicate": 1}
    assert rows(engine, query) == before
    assert apply(engine, settings, sent(body, 1)) == {"duplicate": 1}
    ledger = rows(engine, "SELECT message_id, outcome, attempts FROM health.deliveries ORDER BY attempts DESC")
    assert [(row["outcome"], row["attempts"]) for row in ledger] == [("applied", 2), ("duplicate", 1)]


# Connections


def told(name: str, minute: float, status: str = "success", **more: Any) -> Delivery:
    """An event about the connection."""
    return sent({"type": name, "status": status, "message": "words", "user": USER} | more, minute)


def test_data_of_an_unknown_connection_makes_it_known(engine: Engine, settings: Settings) -> None:
    """Breaks if data that came before `auth` belongs to no connection, or the connection alone counts as news."""
    assert apply(engine, settings, sent(day(1))) == {"applied": 1}
    assert rows(engine, CONNECTIONS) == [{"user_id": "t1", "provider": "garmin", "status": "connected", "error": None}]
    assert apply(engine, settings, sent(event("activity"))) == {"duplicate": 1}
    unknown = event("activity") | {"user": USER | {"user_id": "t2"}}
    assert apply(engine, settings, sent(unknown)) == {"duplicate": 1}
    assert len(rows(engine, CONNECTIONS)) == 2


def test_late_data_does_not_reconnect(engine: Engine, settings: Settings) -> None:
    """Breaks if data that comes after the end of a connection brings it back, in any order.

    Each order of each end is a person of its own, so that all of them go through the store together.
    """
    ends = {"deauth": "disconnected", "access_revoked": "disconnected", "connection_error": "error"}
    cases = {f"t{n}": case for n, case in enumerate(itertools.product(ends, itertools.permutations(range(4))))}
    waves: list[list[Delivery]] = [[] for _ in range(4)]
    for user, (name, order) in cases.items():
        of = {"user": USER | {"user_id": user}}
        sequence = [
            told("auth", 0, **of),
            sent(day(1) | of, 1),
            told(name, 2, "warning", **of),
            sent(day(2) | of, 3),
        ]
        for position, number in enumerate(order):
            waves[position].append(sequence[number])
    for wave in waves:
        apply(engine, settings, *wave)
    found = {row["user_id"]: row["status"] for row in rows(engine, CONNECTIONS)}
    assert {case: found[user] for user, case in cases.items() if found[user] != ends[case[0]]} == {}
    steps = rows(engine, "SELECT steps, count(DISTINCT user_id) AS people, count(*) FROM health.activity GROUP BY 1")
    assert steps == [{"steps": 2, "people": len(cases), "count": len(cases)}]


def test_data_of_an_ended_connection_is_not_late(engine: Engine, settings: Settings) -> None:
    """Breaks if data that repeats what is stored counts as stale because its connection has ended."""
    assert apply(engine, settings, sent(day(1), 0), told("deauth", 1)) == {"applied": 2}
    assert apply(engine, settings, sent(day(1), 2)) == {"duplicate": 1}
    assert apply(engine, settings, sent(day(2), 3)) == {"applied": 1}


def test_in_one_message_only_what_changes_something_is_applied(engine: Engine, settings: Settings) -> None:
    """Breaks if the connection that data supposes makes a delivery that came too late count as applied."""
    new, old = sent(day(2), 2, name="new"), sent(day(1), 1, name="old")
    assert apply(engine, settings, new, old) == {"applied": 1, "stale": 1}
    query = "SELECT message_id, outcome FROM health.deliveries ORDER BY 1"
    assert [tuple(row.values()) for row in rows(engine, query)] == [("new", "applied"), ("old", "stale")]


def test_a_connection_opens_its_history_once(engine: Engine, settings: Settings) -> None:
    """Breaks if nobody fetches what was before the connection, or a retry of `auth` fetches it again."""
    connected = told("auth", 0)
    assert apply(engine, settings, connected) == {"applied": 1}
    query = "SELECT resource FROM health.backfills WHERE user_id = 't1' AND provider = 'garmin' ORDER BY 1"
    fetched = sorted(one.name for one in catalogue().values() if one.terra)
    assert [row["resource"] for row in rows(engine, query)] == fetched
    apply(engine, settings, connected)
    assert len(rows(engine, "SELECT 1 FROM headrace.chunks")) == len(fetched) == 7


@pytest.mark.parametrize("name", ["s3_payload", "large_request_processing", "large_request_sending", "user_reauth"])
def test_what_is_no_data_does_no_harm_to_data(engine: Engine, settings: Settings, name: str) -> None:
    """Breaks if an announcement, a count or a new id fails its delivery, or its neighbours."""
    outcomes = apply(engine, settings, sent(recorded(f"events/{name}")), sent(day(1)))
    assert "dead" not in outcomes
    assert rows(engine, "SELECT steps FROM health.activity") == [{"steps": 1}]


def test_a_report_is_found_by_our_own_id(engine: Engine, settings: Settings) -> None:
    """Breaks if a report, which belongs to no connection, cannot be found beside the person's other data."""
    apply(engine, settings, sent(recorded("events/lab_report.completed")))
    columns = "user_id, status, results_count, report_date::text"
    query = f"SELECT {columns} FROM health.terra_lab_report WHERE client_user_id = :id"
    assert [tuple(row.values()) for row in rows(engine, query, id="member-1004")] == [
        ("reference:member-1004", "completed", 1, "2026-03-12")
    ]
    assert rows(engine, CONNECTIONS) == []


@pytest.mark.parametrize(
    "body",
    [
        event("activity", item(metadata=METADATA | {"summary_id": "a\u0000"})),
        event("activity", item(note="a\u0000b")),
        day(10**300),
        event("daily", item(data_enrichment={"a\u0000": 1})),
    ],
)
def test_what_postgresql_refuses_dies_alone(engine: Engine, settings: Settings, body: dict[str, Any]) -> None:
    """Breaks if a body that reads well but cannot be stored takes its neighbours along."""
    assert apply(engine, settings, sent(body), sent(event("sleep", item()))) == {"dead": 1, "applied": 1}


def test_a_later_setting_takes_what_was_left_out(engine: Engine, settings: Settings) -> None:
    """Breaks if what the operator leaves out is stored, or its delivery is not told as left out."""
    narrow = replace(settings, resources=("sleep",))
    assert apply(engine, narrow, sent(day(1))) == {"ignored": 1}
    assert rows(engine, "SELECT 1 FROM health.activity") == rows(engine, CONNECTIONS) == []
