"""Terra's events: stored rows, in any order, and outcomes."""

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
    """A delivery that Terra created at a minute."""
    ordering = round((FIRST + timedelta(minutes=minute)).timestamp() * 1000)
    receipt = Receipt(name or f"trace-{next(COUNTER)}", ordering)
    return seal("terra", receipt, msgspec.json.encode(body), Sealer([ENCRYPTION_KEY]))


def day(steps: int, **more: Any) -> dict[str, Any]:
    return event("daily", item(distance_data={"steps": steps}, **more))


def ride(name: str, upload_type: int, summary_id: str = "s1", beats: list[Any] | None = None) -> dict[str, Any]:
    metadata = METADATA | {"name": name, "upload_type": upload_type, "summary_id": summary_id}
    return event("activity", {"metadata": metadata, "heart_rate_data": {"detailed": {"hr_samples": beats}}})


def test_every_event_is_stored(engine: Engine, settings: Settings) -> None:
    """Breaks if an event becomes a dead letter, or a record or sample does not reach its view as sent."""
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


def test_every_type_has_rows(engine: Engine, settings: Settings) -> None:
    """Breaks if one of Terra's types leaves no row in its view."""
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


def test_a_deletion_is_a_version(engine: Engine, settings: Settings) -> None:
    """Breaks if a deletion does not follow the order of versions."""
    seen = []
    for minute, upload_type in ((1, 1), (3, 4), (2, 3), (3, 4), (4, 1)):
        (outcome,) = apply(engine, settings, sent(ride("ride", upload_type), minute))
        seen.append((outcome, len(rows(engine, "SELECT 1 FROM health.workouts"))))
    assert seen == [("applied", 1), ("applied", 0), ("stale", 0), ("duplicate", 0), ("applied", 1)]


def test_a_retracted_observation_is_deleted(engine: Engine, settings: Settings) -> None:
    """Breaks if an observation that was entered in error is still shown."""
    body = recorded("events/health_observation")
    apply(engine, settings, sent(body, 0))
    assert len(rows(engine, "SELECT 1 FROM health.terra_health_observation")) == 1
    body["data"][0]["observation_data"]["status"] = 3
    apply(engine, settings, sent(body, 1))
    assert rows(engine, "SELECT 1 FROM health.terra_health_observation") == []


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_null_scores_do_not_delete(engine: Engine, settings: Settings, order: tuple[int, int]) -> None:
    """Breaks if an update without scores deletes the stored ones, in either order."""
    scores = ({"strain_index": 9.5, "immune_index": 3}, {"strain_index": None})
    for minute in order:
        apply(engine, settings, sent(day(minute + 1, data_enrichment=scores[minute]), minute))
    assert rows(engine, "SELECT steps FROM health.activity") == [{"steps": 2}]
    stored = rows(engine, "SELECT subtype, value FROM health.terra_scores ORDER BY 1")
    assert [tuple(row.values()) for row in stored] == [("immune_index", 3), ("strain_index", 9.5)]


def test_empty_arrays_do_not_delete(engine: Engine, settings: Settings) -> None:
    """Breaks if a snapshot without samples deletes the stored ones."""
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
    """Breaks if Terra's summary_id, unique per user only, is treated as unique."""
    other = ride("other", 1) | {"user": USER | {"user_id": "t2"}}
    apply(engine, settings, sent(ride("one", 1)), sent(other))
    query = "SELECT user_id, title, client_user_id FROM health.workouts ORDER BY 1"
    found = [tuple(row.values()) for row in rows(engine, query)]
    assert found == [("t1", "one", "member-1"), ("t2", "other", "member-1")]


def test_equal_content_is_a_duplicate(engine: Engine, settings: Settings) -> None:
    """Breaks if a retry, or equal content under another id, is written again or counts as applied."""
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


def connection(name: str, minute: float, status: str = "success", **more: Any) -> Delivery:
    """A connection event."""
    return sent({"type": name, "status": status, "message": "words", "user": USER} | more, minute)


def test_data_creates_an_inferred_connection(engine: Engine, settings: Settings) -> None:
    """Breaks if data that arrives before `auth` has no connection, or the connection alone counts as a change."""
    assert apply(engine, settings, sent(day(1))) == {"applied": 1}
    assert rows(engine, CONNECTIONS) == [{"user_id": "t1", "provider": "garmin", "status": "connected", "error": None}]
    assert apply(engine, settings, sent(event("activity"))) == {"duplicate": 1}
    unknown = event("activity") | {"user": USER | {"user_id": "t2"}}
    assert apply(engine, settings, sent(unknown)) == {"duplicate": 1}
    assert len(rows(engine, CONNECTIONS)) == 2


def test_late_data_does_not_reconnect(engine: Engine, settings: Settings) -> None:
    """Breaks if data that arrives after the end of a connection restores it, in any order.

    Each order of each end has a user of its own, so that one message can hold all of them.
    """
    ends = {"deauth": "disconnected", "access_revoked": "disconnected", "connection_error": "error"}
    cases = {f"t{n}": case for n, case in enumerate(itertools.product(ends, itertools.permutations(range(4))))}
    waves: list[list[Delivery]] = [[] for _ in range(4)]
    for user, (name, order) in cases.items():
        of = {"user": USER | {"user_id": user}}
        sequence = [
            connection("auth", 0, **of),
            sent(day(1) | of, 1),
            connection(name, 2, "warning", **of),
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


def test_data_of_an_ended_connection_is_not_stale(engine: Engine, settings: Settings) -> None:
    """Breaks if repeated data counts as stale because its connection has ended."""
    assert apply(engine, settings, sent(day(1), 0), connection("deauth", 1)) == {"applied": 2}
    assert apply(engine, settings, sent(day(1), 2)) == {"duplicate": 1}
    assert apply(engine, settings, sent(day(2), 3)) == {"applied": 1}


def test_an_inferred_connection_does_not_affect_the_outcome(engine: Engine, settings: Settings) -> None:
    """Breaks if the inferred connection makes a stale delivery count as applied."""
    new, old = sent(day(2), 2, name="new"), sent(day(1), 1, name="old")
    assert apply(engine, settings, new, old) == {"applied": 1, "stale": 1}
    query = "SELECT message_id, outcome FROM health.deliveries ORDER BY 1"
    assert [tuple(row.values()) for row in rows(engine, query)] == [("new", "applied"), ("old", "stale")]


def test_a_connection_opens_its_history_once(engine: Engine, settings: Settings) -> None:
    """Breaks if the history before the connection is not fetched, or a retry of `auth` fetches it again."""
    connected = connection("auth", 0)
    assert apply(engine, settings, connected) == {"applied": 1}
    query = "SELECT resource FROM health.backfills WHERE user_id = 't1' AND provider = 'garmin' ORDER BY 1"
    fetched = sorted(one.name for one in catalogue().values() if one.terra)
    assert [row["resource"] for row in rows(engine, query)] == fetched
    apply(engine, settings, connected)
    assert len(rows(engine, "SELECT 1 FROM headrace.chunks")) == len(fetched) == 7


@pytest.mark.parametrize("name", ["s3_payload", "large_request_processing", "large_request_sending", "user_reauth"])
def test_events_without_data_do_not_affect_others(engine: Engine, settings: Settings, name: str) -> None:
    """Breaks if an announcement, a count or a new id fails its delivery, or its neighbours."""
    outcomes = apply(engine, settings, sent(recorded(f"events/{name}")), sent(day(1)))
    assert "dead" not in outcomes
    assert rows(engine, "SELECT steps FROM health.activity") == [{"steps": 1}]


def test_a_report_is_found_by_its_client_user_id(engine: Engine, settings: Settings) -> None:
    """Breaks if a report, which has no connection, cannot be found with the user's other data."""
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
def test_odd_data_is_stored_beside_its_neighbours(engine: Engine, settings: Settings, body: dict[str, Any]) -> None:
    """Breaks if a value that PostgreSQL cannot store costs its object, or affects other deliveries."""
    assert apply(engine, settings, sent(body), sent(event("sleep", item()))) == {"applied": 2}
    assert rows(engine, "SELECT count(error) AS n FROM health.deliveries") == [{"n": 1}]


@pytest.mark.parametrize(("reference", "stored", "note"), [(99, "99", None), (["x"], None, "reference_id")])
def test_a_reference_id_never_costs_the_data(
    engine: Engine, settings: Settings, reference: Any, stored: str | None, note: str | None
) -> None:
    """Breaks if an odd reference_id costs the data, or is lost without a note."""
    assert apply(engine, settings, sent(day(1) | {"user": USER | {"reference_id": reference}})) == {"applied": 1}
    assert rows(engine, "SELECT steps, client_user_id FROM health.activity") == [{"steps": 1, "client_user_id": stored}]
    (entry,) = rows(engine, "SELECT error FROM health.deliveries")
    assert (entry["error"] or "").endswith(note or "")
    assert bool(entry["error"]) == bool(note)


def test_data_excluded_by_a_setting_is_ignored(engine: Engine, settings: Settings) -> None:
    """Breaks if excluded data is stored, or its delivery is not recorded as ignored."""
    narrow = replace(settings, resources=("sleep",))
    assert apply(engine, narrow, sent(day(1))) == {"ignored": 1}
    assert rows(engine, "SELECT 1 FROM health.activity") == rows(engine, CONNECTIONS) == []
