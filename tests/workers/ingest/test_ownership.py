"""A user belongs to the aggregator that named them first: another one can neither write, move nor retract."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine

from app.config.settings import Settings
from app.delivery import Delivery
from tests.support import START, apply, delivery, event, heartrate, rows, workout
from tests.support.backfills import announce, make_due, notice, status
from tests.support.database import run
from tests.support.provider import Provider, daily, heartrates
from tests.support.reconnections import ride, terra
from workers.ingest.apply import Applier
from workers.ingest.replay import replay_dead_letters
from workers.operate.erase import Eraser
from workers.store import backfill_admin, dead_letters
from workers.store.backfill_admin import Filter

U, OTHER = "u1", "u2"  # of one aggregator; OTHER is the neighbour, of the aggregator that sends the tested delivery
LATER = START + timedelta(hours=1)
REASON = "the user belongs to {}, and this delivery came from {}"
FORMER = "the former user_id belongs to {}, and this delivery came from {}"


def terra_user(user_id: str) -> dict[str, str]:
    return {"user_id": user_id, "provider": "GARMIN", "reference_id": "another-member"}


def from_terra(body: dict[str, Any], of: str = "") -> Delivery:
    """A delivery about u1 that Terra created an hour after START, so that it is newer than all stored data."""
    return terra(60, {"user": terra_user(U)} | body, of)


def deletion() -> dict[str, Any]:
    """Terra's retraction of the workout w1."""
    body = ride(U, "w1", "deleted")
    body["data"][0]["metadata"]["upload_type"] = 4
    return body


def reauth(old: str, new: str) -> dict[str, Any]:
    ids = {"old_user": terra_user(old), "new_user": terra_user(new)}
    return {"type": "user_reauth", "status": "warning", "user": terra_user(new)} | ids


LIFECYCLE = {"status": "success", "message": "revoked"}
LARGE = {"type": "large_request_sending", "reference": "r1", "expected_payloads": 3}
# Each writes something about u1, whom Junction owns.
TERRA: dict[str, Callable[[], Delivery]] = {
    "record and samples": lambda: from_terra(ride(U, "w1", "forged")),
    "new series": lambda: from_terra(ride(U, "w9", "forged")),
    "retraction": lambda: from_terra(deletion()),
    "connection and backfills": lambda: from_terra({"type": "auth"} | LIFECYCLE),
    "disconnection": lambda: from_terra({"type": "deauth"} | LIFECYCLE),
    "connection error": lambda: from_terra({"type": "connection_error"} | LIFECYCLE),
    "large request": lambda: from_terra(LARGE),
}
CONNECTED = {"provider": {"slug": "garmin"}, "resource_availability": {"sleep": {"status": "available"}}}
# Each writes something about u1, whom Terra owns.
JUNCTION: dict[str, Callable[[], Delivery]] = {
    "record": lambda: delivery(workout(U, "r1", title="forged", updated_at=LATER.isoformat()), LATER),
    "samples": lambda: delivery(heartrate(U, {1: 200, 2: 200}, provider="peloton", type="activity"), LATER),
    "retraction": lambda: delivery(event("daily.data.workouts.deleted", U, {"id": "r1"}, "m"), LATER),
    "connection and grants": lambda: delivery(event("provider.connection.created", U, CONNECTED, "m"), LATER),
    "connection error": lambda: delivery(
        event("provider.connection.error", U, {"provider": "garmin", "error_type": "x"}, "m"), LATER
    ),
    "backfill": lambda: notice(U),
    "lost delivery": lambda: delivery(
        {"type": "message.attempt.exhausted", "user_id": U, "data": {"msgId": "m1"}}, datetime.now(UTC)
    ),
    "client_user_id": lambda: delivery(event("daily.data.unknown.created", U, {}, "another-member"), LATER),
}


def owned(engine: Engine, settings: Settings, owner: str) -> None:
    """Stores u1 with a workout, samples, a connection and a backfill, as a user of this aggregator."""
    if owner == "terra":
        auth = {"type": "auth", "status": "success", "user": terra_user(U)}
        assert "dead" not in apply(engine, settings, terra(1, auth), terra(2, ride(U, "r1", "mine")))
        return
    connected = event("provider.connection.created", U, {"provider": {"slug": "garmin"}})
    mine = (workout(U, title="mine"), heartrate(U, {1: 60, 2: 61}), connected)
    assert "dead" not in apply(engine, settings, *map(delivery, mine), notice(U))


def state(engine: Engine) -> dict[str, list[Any]]:
    """Every row of u1, and of users who may have been merged with u1, except dead letters and the ledger."""
    tables = rows(
        engine,
        """SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a
        ON a.attrelid = c.oid AND a.attname = 'user_id' WHERE n.nspname = 'headrace' AND c.relkind IN ('r', 'p')
        AND NOT c.relispartition AND c.relname NOT IN ('deliveries', 'dead_letters')""",
    )
    found = {
        row["relname"]: rows(
            engine, f'SELECT to_jsonb(t) AS row FROM headrace."{row["relname"]}" t WHERE user_id <> :n', n=OTHER
        )
        for row in tables
    }
    samples = "SELECT to_jsonb(s) AS row FROM headrace.samples s JOIN headrace.series n ON n.id = s.series_id"
    return found | {"samples": rows(engine, f"{samples} WHERE user_id <> :n ORDER BY 1", n=OTHER)}


def neighbour(sender: str) -> Delivery:
    return terra(3, ride(OTHER, "n1", "neighbour")) if sender == "terra" else delivery(workout(OTHER, "n1"))


CASES = [("terra", name, make) for name, make in TERRA.items()]
CASES += [("junction", name, make) for name, make in JUNCTION.items()]


@pytest.mark.parametrize(("sender", "make"), [pytest.param(s, make, id=f"{s} {name}") for s, name, make in CASES])
def test_the_other_aggregator_changes_nothing(
    engine: Engine, settings: Settings, sender: str, make: Callable[[], Delivery]
) -> None:
    """Breaks if one secret suffices to write, move or retract data of the other aggregator's user."""
    owner = "junction" if sender == "terra" else "terra"
    owned(engine, settings, owner)
    before, forged = state(engine), make()
    assert apply(engine, settings, forged, neighbour(sender)) == {"dead": 1, "applied": 1}
    assert apply(engine, settings, forged) == {"dead": 1}
    assert state(engine) == before
    assert [row["id"] for row in rows(engine, "SELECT id FROM health.workouts WHERE user_id = :n", n=OTHER)] == ["n1"]
    (letter,) = rows(engine, "SELECT aggregator, user_id, reason FROM headrace.dead_letters")
    assert letter == {"aggregator": sender, "user_id": U, "reason": REASON.format(owner, sender)}
    assert Applier(engine, settings).replay([forged]).outcomes == {"dead": 1}
    assert replay_dead_letters(engine, Applier(engine, settings), dead_letters.listed(engine)) == {"dead": 1}
    assert state(engine) == before


@pytest.mark.parametrize(("old", "new", "reason"), [(U, "t1", FORMER), ("t1", U, REASON)])
def test_a_new_user_id_moves_no_user_of_another_aggregator(
    engine: Engine, settings: Settings, old: str, new: str, reason: str
) -> None:
    """Breaks if one `user_reauth` moves a Junction user's data to Terra's user, or Terra's to Junction's."""
    owned(engine, settings, "junction")
    apply(engine, settings, terra(1, ride("t1", "r1", "mine")))
    before = state(engine)
    assert apply(engine, settings, from_terra(reauth(old, new)), neighbour("terra")) == {"dead": 1, "applied": 1}
    assert {name: found for name, found in state(engine).items() if before[name] != found}.keys() <= {"users"}
    owners = rows(engine, f"SELECT user_id, aggregator, merged_into FROM headrace.users WHERE user_id <> '{OTHER}'")
    assert {tuple(row.values()) for row in owners} == {(U, "junction", None), ("t1", "terra", None)}
    (letter,) = rows(engine, "SELECT reason FROM headrace.dead_letters")
    assert letter["reason"] == reason.format("junction", "terra")


def test_a_merged_user_still_belongs_to_its_aggregator(engine: Engine, settings: Settings) -> None:
    """Breaks if a former user_id, or the new one, can be written by another aggregator after a reconnection."""
    owned(engine, settings, "terra")
    assert apply(engine, settings, from_terra(reauth(U, "t1"))) == {"applied": 1}
    before = state(engine)
    forged = [delivery(workout(user, title="forged"), LATER) for user in (U, "t1")]
    late = terra(70, ride(U, "r2", "late"))
    assert apply(engine, settings, *forged) == {"dead": 2}
    assert state(engine) == before
    assert apply(engine, settings, late, delivery(workout(U, title="forged"), LATER)) == {"applied": 1, "dead": 1}
    found = rows(engine, "SELECT user_id, id, title FROM health.workouts ORDER BY id")
    assert [tuple(row.values()) for row in found] == [("t1", "r1", "mine"), ("t1", "r2", "late")]


@pytest.mark.parametrize("first", ["junction", "terra"])
@pytest.mark.parametrize("body", [workout(U), heartrate(U, {1: 60})])
def test_one_message_of_both_aggregators(engine: Engine, settings: Settings, first: str, body: dict[str, Any]) -> None:
    """Breaks if a message in which both name a new user fails, or lets both write."""
    both = [delivery(body), terra(1, ride(U, "r1", "a"))]
    both = both if first == "junction" else both[::-1]
    assert apply(engine, settings, *both, neighbour(first)) == {"applied": 2, "dead": 1}
    (owner,) = rows(engine, "SELECT aggregator FROM headrace.users WHERE user_id = :u", u=U)
    (applied,) = rows(engine, "SELECT aggregator FROM headrace.archive WHERE user_id = :u", u=U)
    assert owner == applied
    sources = "SELECT provider FROM health.workouts WHERE user_id = :u UNION SELECT provider FROM headrace.series"
    found = {row["provider"] for row in rows(engine, f"{sources} WHERE user_id = :u", u=U)}
    assert found == {"garmin" if owner["aggregator"] == "junction" else "peloton"}


def test_a_report_without_connection_belongs_to_terra(engine: Engine, settings: Settings) -> None:
    """Breaks if Junction can write laboratory reports, whose user_id is the client_user_id of Terra."""
    data = {"session_id": "s1", "reference_id": "member-1"}
    apply(engine, settings, terra(1, {"type": "lab_report.completed", "data": data}))
    assert apply(engine, settings, delivery(workout("reference:member-1"))) == {"dead": 1}
    assert rows(engine, "SELECT user_id, aggregator FROM headrace.users") == [
        {"user_id": "reference:member-1", "aggregator": "terra"}
    ]


def test_a_blocked_user_id_belongs_to_no_aggregator(engine: Engine, settings: Settings) -> None:
    """Breaks if a tombstone made in advance can be written, or keeps deliveries as dead letters."""
    Eraser(engine, settings).erase(U, lambda _: None)
    assert apply(engine, settings, delivery(workout(U)), terra(1, ride(U, "r1", "a"))) == {"ignored": 2}
    assert rows(engine, "SELECT 1 FROM headrace.workouts UNION ALL SELECT 1 FROM headrace.dead_letters") == []


def test_an_erasure_removes_what_another_aggregator_sent(engine: Engine, settings: Settings) -> None:
    """Breaks if a rejected delivery that names an erased user stays stored, or is rejected for its owner later."""
    owned(engine, settings, "junction")
    forged = from_terra(ride(U, "w1", "forged"))
    assert apply(engine, settings, forged) == {"dead": 1}
    Eraser(engine, settings).erase(U, lambda _: None)
    assert rows(engine, "SELECT 1 FROM headrace.dead_letters") == []
    assert apply(engine, settings, from_terra(ride(U, "w2", "forged"), "-2")) == {"ignored": 1}


def test_a_retry_after_the_owner_is_corrected(engine: Engine, settings: Settings) -> None:
    """Breaks if a dead letter cannot be applied once an operator has corrected the owner."""
    owned(engine, settings, "junction")
    assert apply(engine, settings, from_terra(ride(U, "w9", "right"))) == {"dead": 1}
    run(engine, f"UPDATE headrace.users SET aggregator = 'terra' WHERE user_id = '{U}'")
    assert replay_dead_letters(engine, Applier(engine, settings), dead_letters.listed(engine)) == {"applied": 1}
    assert rows(engine, "SELECT title FROM health.workouts WHERE id = 'w9'") == [{"title": "right"}]
    assert rows(engine, "SELECT 1 FROM headrace.dead_letters") == []


def test_an_archived_delivery_of_another_aggregator_is_not_applied_again(engine: Engine, settings: Settings) -> None:
    """Breaks if a replay applies again what another aggregator wrote before users had an owner."""
    run(engine, f"INSERT INTO headrace.users (user_id) VALUES ('{U}')")
    forged = from_terra(ride(U, "w1", "forged"))
    assert apply(engine, settings, forged) == {"applied": 1}
    run(engine, "UPDATE headrace.users SET aggregator = 'junction'", "DELETE FROM headrace.workouts")
    assert Applier(engine, settings).replay([forged]).outcomes == {"dead": 1}
    assert rows(engine, "SELECT 1 FROM headrace.workouts") == []
    assert rows(engine, "SELECT outcome FROM health.deliveries") == [{"outcome": "applied"}]


# History


def test_pages_of_another_aggregator_are_not_stored(engine: Engine, settings: Settings) -> None:
    """Breaks if a backfill that was opened before the user had an owner writes, resumes or never ends."""
    (number,) = announce(engine, settings, notice(U))
    run(engine, "UPDATE headrace.users SET aggregator = 'terra'")
    provider = Provider(heartrates(daily(10), 5))
    for _ in range(6):  # the worker stops each time, as if it had crashed
        make_due(engine, leases=True)
        provider.fetcher(engine, settings).run(number)
    assert rows(engine, "SELECT 1 FROM headrace.samples UNION ALL SELECT 1 FROM headrace.series") == []
    assert [one for one, *_ in status(engine, U)] == ["failed"]
    assert backfill_admin.resume(engine, [number]) == []
    assert not backfill_admin.reopen(engine, number)
    assert len(backfill_admin.listed(engine, Filter())) == 1


def test_rejected_pages_of_another_aggregator(engine: Engine, settings: Settings) -> None:
    """Breaks if a refused request about another aggregator's user leaves a response or ends the worker."""
    (number,) = announce(engine, settings, notice(U, "profile"))
    run(engine, "UPDATE headrace.users SET aggregator = 'terra'")
    Provider(lambda _: httpx.Response(400)).fetcher(engine, settings).run(number)
    assert rows(engine, "SELECT 1 FROM headrace.dead_letters") == []


def test_the_etl_pipeline_is_junctions(engine: Engine, settings: Settings) -> None:
    """Breaks if deliveries of the pipeline may write for a user of Terra: it uses the same path."""
    owned(engine, settings, "terra")
    assert apply(engine, settings, delivery(workout(U))) == {"dead": 1}
