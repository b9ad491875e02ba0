"""Applying messages: stored rows and outcomes."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine

from app.catalogue import catalogue
from app.config.settings import Settings
from app.delivery import Delivery, pack
from tests.support import ROOT, START, apply, delivery, event, heartrate, message_id, rows, workout
from tests.support.cases import Failures
from tests.support.database import emptied
from tests.support.poison import RAISE, fault
from workers.aggregators.junction.events import EXHAUSTED
from workers.aggregators.registry import AGGREGATORS
from workers.ingest import parse
from workers.ingest.apply import Applier

LATER = START + timedelta(minutes=1)
WORKOUT = b'{"event_type":"daily.data.workouts.created","user_id":"u1","data":%s}'


def test_a_workout_is_stored_with_typed_columns(engine: Engine, settings: Settings) -> None:
    """Breaks if a scalar of the schema does not reach its column, or the payload is not the object as received."""
    sent = workout("u1", title="Morning", average_hr=146.0)
    assert apply(engine, settings, delivery(sent)) == {"applied": 1}
    (row,) = rows(engine, "SELECT * FROM health.workouts")
    assert (row["user_id"], row["client_user_id"], row["id"]) == ("u1", "member-1", "w1")
    assert (row["provider"], row["source_type"], row["origin"]) == ("garmin", "watch", "webhook")
    assert (row["average_hr"], row["distance"], row["title"], row["max_hr"]) == (146, 8000.5, "Morning", None)
    assert row["time_start"] == START
    assert row["calendar_date"].isoformat() == "2026-03-14"
    assert row["payload"] == sent["data"]
    assert row["version"] == START


@pytest.mark.parametrize("together", [True, False])
def test_five_versions_end_in_the_newest_in_all_orders(engine: Engine, settings: Settings, *, together: bool) -> None:
    """Breaks if any of the 120 orders, in one message or in five, leaves an older version."""
    applier = Applier(engine, settings)
    waves: list[list[Delivery]] = [[] for _ in range(5)]
    for number, order in enumerate(itertools.permutations(range(5))):
        for position, version in enumerate(order):
            changes = {"calories": version, "updated_at": f"2026-05-0{version + 1}T00:00:00Z"}
            waves[position].append(delivery(workout("u1", f"w{number}", **changes)))
    for message in [list(itertools.chain(*waves))] if together else waves:
        applier.apply(pack(message))
    assert rows(engine, "SELECT calories, count(*) FROM health.workouts GROUP BY 1") == [{"calories": 4, "count": 120}]


def test_samples_are_ordered_by_the_time_inside_the_delivery_id(engine: Engine, settings: Settings) -> None:
    """Breaks if a late retry of an old event overwrites the newer value."""
    newer, older = delivery(heartrate("u1", {0: 80}), LATER), delivery(heartrate("u1", {0: 70}), START)
    assert apply(engine, settings, newer) == {"applied": 1}
    assert apply(engine, settings, older) == {"stale": 1}
    assert rows(engine, "SELECT value, version FROM health.heartrate") == [{"value": 80.0, "version": LATER}]


def test_a_newer_version_with_equal_content_updates_only_the_version(engine: Engine, settings: Settings) -> None:
    """Breaks if A (first), A (third), B (second, late) ends as B, or the repetition counts as a write."""
    apply(engine, settings, delivery(heartrate("u1", {0: 70}), START))
    before = rows(engine, "SELECT stored_at FROM health.heartrate")
    assert apply(engine, settings, delivery(heartrate("u1", {0: 70}), LATER + timedelta(minutes=1))) == {"duplicate": 1}
    assert rows(engine, "SELECT stored_at FROM health.heartrate") == before
    assert apply(engine, settings, delivery(heartrate("u1", {0: 99}), LATER)) == {"stale": 1}
    assert rows(engine, "SELECT value FROM health.heartrate") == [{"value": 70.0}]


@pytest.mark.parametrize("values", [(70.0, 80.0), (80.0, 70.0)])
def test_a_tie_ends_the_same_in_both_orders(engine: Engine, settings: Settings, values: tuple[float, float]) -> None:
    """Breaks if two versions of one timestamp end differently in different orders."""
    for value in values:
        apply(engine, settings, delivery(heartrate("u1", {0: value}), START))
        apply(engine, settings, delivery(workout("u1", distance=value)))
    assert rows(engine, "SELECT value FROM health.heartrate") == [{"value": 80.0}]
    assert rows(engine, "SELECT distance FROM health.workouts") == [{"distance": 80.0}]


def test_the_same_message_again_changes_nothing(engine: Engine, settings: Settings) -> None:
    """Breaks if a redelivered message is applied twice."""
    message = [delivery(workout("u1")), delivery(heartrate("u1", {0: 70, 1: 71}))]
    apply(engine, settings, *message)
    samples, workouts = (f"SELECT xmin::text, ctid::text FROM headrace.{table}" for table in ("samples", "workouts"))
    query = f"{samples} UNION ALL {workouts}"
    before = rows(engine, query)
    apply(engine, settings, *message)
    assert rows(engine, query) == before
    ledger = rows(engine, "SELECT outcome, attempts FROM health.deliveries")
    assert ledger == [{"outcome": "applied", "attempts": 2}] * 2


def test_one_id_fifty_times_in_one_message_is_one_delivery(engine: Engine, settings: Settings) -> None:
    """Breaks if the ledger row of one id is written twice in a statement, which PostgreSQL rejects."""
    one = delivery(heartrate("u1", {0: 70}))
    assert apply(engine, settings, *[one] * 50) == {"applied": 1}
    assert rows(engine, "SELECT attempts FROM health.deliveries") == [{"attempts": 50}]


def test_large_deliveries_of_a_message_are_not_parsed_together(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if many bodies that are small when sealed fill the memory of a worker, or some are lost."""
    monkeypatch.setattr(parse, "MAX_MESSAGE_BYTES", 50_000)
    sent = [delivery(workout("u1", f"w{n}", notes="x" * 20_000)) for n in range(8)]
    applied = Applier(engine, settings).apply(pack(sent))
    assert applied.outcomes == {"applied": 3}
    assert [one.delivery for one in applied.unsettled] == sent[3:]
    assert {(one.failures, one.error) for one in applied.unsettled} == {(0, None)}
    assert Applier(engine, settings).replay(sent).outcomes == {"applied": 5, "duplicate": 3}


def test_concurrent_workers_agree_and_do_not_deadlock(engine: Engine, settings: Settings) -> None:
    """Breaks if rows are not written in key order (deadlocks), or the guard has a race (an older version wins)."""
    messages = []
    for version in range(24):
        users = [f"u{n}" for n in (range(12) if version % 2 else reversed(range(12)))]
        created = START + timedelta(seconds=version)
        changes = {"calories": version, "updated_at": created.isoformat()}
        message = [delivery(workout(user, "w", **changes), created) for user in users]
        message += [delivery(heartrate(user, dict.fromkeys(range(30), float(version))), created) for user in users]
        messages.append(pack(message))
    applier = Applier(engine, settings)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(applier.apply, messages))
    assert rows(engine, "SELECT DISTINCT calories FROM health.workouts") == [{"calories": 23.0}]
    assert rows(engine, "SELECT value, count(*) FROM health.heartrate GROUP BY 1") == [{"value": 23.0, "count": 360}]


def test_one_rejected_delivery_of_many_becomes_a_dead_letter(engine: Engine, settings: Settings) -> None:
    """Breaks if data that PostgreSQL rejects affects the other deliveries, is lost, or is retried for ever."""
    sent = [delivery(workout("u1")), delivery(heartrate("u2", {0: 1})), delivery(heartrate("u3", {0: 1}))]
    with fault(engine, RAISE.format("54000"), "NEW.user_id = 'u2'", "series"):  # an index row that is too large
        assert apply(engine, settings, *sent) == {"applied": 2, "dead": 1}
    (dead,) = rows(engine, "SELECT reason, sealed FROM headrace.dead_letters")
    assert dead["reason"].startswith("PostgreSQL refuses it")
    stored = rows(engine, "SELECT user_id FROM health.workouts UNION ALL SELECT user_id FROM health.heartrate")
    assert [row["user_id"] for row in stored] == ["u1", "u3"]
    ledger = "SELECT user_id, event_type FROM headrace.deliveries WHERE outcome = 'dead'"
    assert rows(engine, ledger) == [{"user_id": "u2", "event_type": "daily.data.heartrate.created"}]


def test_an_invalid_user_id_becomes_a_dead_letter(engine: Engine, settings: Settings) -> None:
    """Breaks if a delivery whose user_id PostgreSQL rejects is retried for ever, together with its neighbours."""
    bad = workout(token_hex(5000))
    assert apply(engine, settings, delivery(workout("u1")), delivery(bad)) == {"applied": 1, "dead": 1}
    assert rows(engine, "SELECT user_id FROM headrace.deliveries WHERE outcome = 'dead'") == [{"user_id": None}]


def test_a_dead_letter_names_its_event_and_its_user(engine: Engine, settings: Settings) -> None:
    """Breaks if an operator cannot see whose data is missing although the delivery says so."""
    body = b'{"event_type": "daily.data.workouts.created", "user_id": "U", "client_user_id": 7, "data": [1]}'
    assert apply(engine, settings, delivery(body)) == {"dead": 1}
    query = "SELECT event_type, user_id FROM headrace.{} "
    named = [{"event_type": "daily.data.workouts.created", "user_id": "U"}]
    assert [rows(engine, query.format(table)) for table in ("dead_letters", "deliveries")] == [named, named]


class Broken:
    """An aggregator module with a fault that every body shows."""

    def parse(self, *_: Any) -> Any:
        raise ZeroDivisionError

    identify = parse


def test_a_fault_of_a_parser_stops_no_neighbour(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a body that makes our code fail is retried for ever, together with the deliveries of its message."""
    monkeypatch.setitem(AGGREGATORS, "broken", Broken())  # type: ignore[arg-type, misc]
    broken = delivery(b"{}", aggregator="broken")
    assert apply(engine, settings, broken, delivery(workout("u1"))) == {"dead": 1, "applied": 1}
    (row,) = rows(engine, "SELECT reason FROM headrace.dead_letters")
    assert row["reason"].startswith("unexpected ZeroDivisionError")


def test_an_invalid_body_becomes_a_dead_letter(engine: Engine, settings: Settings) -> None:
    """Breaks if an invalid body raises, is retried for ever, or is stored with a reason that quotes a value."""
    failures = Failures()
    for body, reason in (
        (b"hello", "not a Junction event"),
        (b"", "not a Junction event"),
        (b"[]", "not a Junction event"),
        (b'{"event_type":', "not a Junction event"),
        (b'{"event_type":"x","data":' + b"[" * 100_000, "not a Junction event: nested too deep"),
        (b'{"user_id":"u1"}', "it has no event_type"),
        (b'{"event_type":"daily.data.workouts.created","data":{"id":"x"}}', "no user"),
        (WORKOUT % b"null", "workouts: Expected an object"),
        (WORKOUT % b"{}", "workouts: id: expected an id"),
        (WORKOUT % b'{"id":["fast"]}', "workouts: id: expected an id"),
    ):
        with failures.of(body, reason), emptied(engine):
            assert apply(engine, settings, delivery(body)) == {"dead": 1}
            (row,) = rows(engine, "SELECT outcome, error FROM health.deliveries")
            assert reason in row["error"]
            assert "fast" not in row["error"]
            assert rows(engine, "SELECT reason FROM headrace.dead_letters") == [{"reason": row["error"]}]
            assert rows(engine, "SELECT 1 FROM health.workouts") == []
    assert failures == {}


def test_a_dead_delivery_is_resolved_by_a_later_attempt(engine: Engine, settings: Settings) -> None:
    """Breaks if the ledger still says `dead` after a later attempt was applied."""
    name = message_id(START)
    apply(engine, settings, delivery(b"half", name=name))
    apply(engine, settings, delivery(workout("u1"), name=name))
    assert rows(engine, "SELECT outcome, error, attempts FROM health.deliveries") == [
        {"outcome": "applied", "error": None, "attempts": 2}
    ]


def test_ignored_events_are_recorded_with_their_reason(engine: Engine, settings: Settings) -> None:
    """Breaks if an unknown event type is rejected or not recorded."""
    assert apply(engine, settings, delivery(event("raw.garmin.dailies", "u1", {}))) == {"ignored": 1}
    (row,) = rows(engine, "SELECT event_type, outcome, error FROM health.deliveries")
    assert row == {"event_type": "raw.garmin.dailies", "outcome": "ignored", "error": "an unknown event type"}
    assert rows(engine, "SELECT user_id FROM health.users") == [{"user_id": "u1"}]  # so that the user can be erased


def test_connections_follow_the_newest_event(engine: Engine, settings: Settings) -> None:
    """Breaks if a late `created` hides an error, or an error does not show."""
    created = event("provider.connection.created", "u1", {"provider": {"slug": "oura", "name": "Oura", "logo": ""}})
    broken = event("provider.connection.error", "u1", {"provider": "oura", "error_type": "token_refresh_failed"})
    apply(engine, settings, delivery(broken, LATER))
    apply(engine, settings, delivery(created, START))
    (row,) = rows(engine, "SELECT provider, status, error FROM health.connections")
    assert row == {"provider": "oura", "status": "error", "error": "token_refresh_failed"}


def test_a_notice_opens_a_backfill_and_the_next_extends_it(engine: Engine, settings: Settings) -> None:
    """Breaks if every chunk opens a backfill, a window is not ordered, or a repeated notice counts twice."""

    def notice(start: str, end: str, *, final: bool) -> dict[str, object]:
        data = {"user_id": "u1", "start_date": start, "end_date": end, "is_final": final, "provider": "zwift"}
        return event("historical.data.workouts.created", "u1", data)

    first = delivery(notice("2026-02-01T00:00:00Z", "2026-01-01T00:00:00Z", final=False))
    apply(engine, settings, first, delivery(notice("2025-12-01T00:00:00Z", "2026-01-01T00:00:00Z", final=True)))
    apply(engine, settings, first)
    (row,) = rows(engine, "SELECT * FROM health.backfills")
    assert (row["status"], row["chunks_total"], row["is_final_seen"]) == ("pending", 2, True)
    assert row["window_start"] == datetime(2025, 12, 1, tzinfo=UTC)
    assert row["window_end"] == datetime(2026, 2, 1, tzinfo=UTC)


def test_a_later_event_without_client_user_id_does_not_clear_it(engine: Engine, settings: Settings) -> None:
    """Breaks if events of the old shape, which lack it, clear the client_user_id."""
    apply(engine, settings, delivery(workout("u1")))
    bare = workout("u1", "w2")
    del bare["client_user_id"]
    apply(engine, settings, delivery(bare))
    assert rows(engine, "SELECT client_user_id FROM health.users") == [{"client_user_id": "member-1"}]


RECORDED = sorted((ROOT / "tests" / "recorded" / "junction").glob("*.json"))


def test_every_recorded_example_is_stored(engine: Engine, settings: Settings) -> None:
    """Breaks if an example from the public documentation, of any year, is rejected, or leaves no row in its view."""
    failures = Failures()
    for file in RECORDED:
        with failures.of(file), emptied(engine):
            sent = msgspec.json.decode(file.read_bytes())
            name = sent.get("event_type") or sent["type"]
            (outcome,) = apply(engine, settings, delivery(file.read_bytes()))
            known = catalogue().event(name)
            is_ignored = known.does in ("unknown", "lab", "query") and name != EXHAUSTED
            assert outcome == ("ignored" if is_ignored else "applied")
            view = {"historical": "backfills", "connection": "connections"}.get(known.does)
            if view or known.resource:
                assert rows(engine, f"SELECT 1 FROM health.{view or (known.resource and known.resource.name)}")
    assert failures == {}


WITHINGS_SAMPLES = ["blood_oxygen", "blood_pressure", "calories_active", "distance", "fat", "heartrate", "hrv"]
WITHINGS_SAMPLES += ["hypnogram", "respiratory_rate", "steps", "vo2_max", "weight"]
WITHINGS_HISTORY = [*WITHINGS_SAMPLES, "activity", "body", "sleep", "workouts"]


def test_a_withings_example_of_the_old_shape_is_stored(engine: Engine, settings: Settings) -> None:
    """Breaks if samples with a source slug, and with the user inside `data`, do not reach their view."""
    failures = Failures()
    for resource in WITHINGS_SAMPLES:
        with failures.of(resource), emptied(engine):
            sample = {"id": None, "timestamp": START.isoformat(), "type": "automatic", "unit": "x", "value": 7}
            sample |= {"systolic": 122, "diastolic": 78} if resource == "blood_pressure" else {}
            source = {"name": "Withings", "slug": "withings", "logo": "x"}
            data = {"user_id": "u1", "source_id": 5, "source": source, "data": [sample]}
            sent = msgspec.json.encode({"event_type": f"daily.data.{resource}.created", "data": data})
            assert apply(engine, settings, delivery(sent)) == {"applied": 1}
            (row,) = rows(engine, f"SELECT user_id, provider, ts, unit FROM health.{resource}")
            assert row == {"user_id": "u1", "provider": "withings", "ts": START, "unit": "x"}
    assert failures == {}


def test_the_withings_history_is_announced_with_inverted_dates(engine: Engine, settings: Settings) -> None:
    """Breaks if a window whose end is before its start, as in the public examples, opens no backfill."""
    window = {"start_date": "2020-06-21T08:23:01+00:00", "end_date": "1996-11-02T14:39:28+00:00"}
    notices = [
        delivery(event(f"historical.data.{name}.created", "u1", window | {"is_final": True, "provider": "withings"}))
        for name in WITHINGS_HISTORY
    ]
    assert apply(engine, settings, *notices) == {"applied": len(WITHINGS_HISTORY)}
    found = rows(
        engine, "SELECT resource FROM health.backfills WHERE provider = 'withings' AND window_start < window_end"
    )
    assert {row["resource"] for row in found} == set(WITHINGS_HISTORY)
