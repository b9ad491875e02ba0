"""Replays: archived deliveries, in any order and into an empty database; and dead letters."""

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, get_args
from urllib.parse import urlsplit, urlunsplit

import httpx
import psycopg
import pytest
from sqlalchemy import Engine, text

from app.config.settings import Settings
from app.delivery import Delivery, pack
from tests.support import START, apply, delivery, event, heartrate, rows, workout
from tests.support.backfills import announce, notice, settle, status
from tests.support.deliveries import OTHER_KEY, connection_event, received, sealed_with_another_key
from tests.support.provider import FIRST, Provider, daily, gone_streams, heartrates, hourly, workouts
from tests.support.servers import Servers
from workers.ingest.apply import Applier
from workers.ingest.replay import MAX_BATCH, Order, replay, replay_dead_letters
from workers.store import archive, dead_letters, schema
from workers.store.archive import ArchiveWindow
from workers.store.backfills import due
from workers.store.dead_letters import add_dead_letter
from workers.store.engine import make_writer, transaction

ORDERS: tuple[Order, ...] = get_args(Order)
NOW = datetime(2026, 3, 14, 12, tzinfo=UTC)
ALWAYS = ArchiveWindow(NOW - timedelta(days=400), NOW + timedelta(days=400))
MINUTE = timedelta(minutes=1)
LEDGER = "SELECT message_id, outcome, attempts, error, event_type FROM health.deliveries ORDER BY 1"
TABLES = text("""
SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = 'headrace' AND c.relkind IN ('r', 'p') AND NOT c.relispartition ORDER BY 1""")


def everything() -> list[Delivery]:
    """Deliveries of every kind, over some hours and in random order, with several versions."""
    found: list[Delivery] = []
    for user, version in itertools.product(("u1", "u2"), range(4)):
        at = START + version * MINUTE
        changes = {"calories": version, "updated_at": at.isoformat()}
        found.append(delivery(workout(user, "w1", **changes), at))
        found.append(delivery(heartrate(user, dict.fromkeys(range(version, 6), 60 + version)), at))
        found.append(connection_event(user, at, error="token_refresh_failed" if version % 2 else None))
    found.append(notice())
    found.append(delivery(event("raw.garmin.dailies", "u1", {})))
    found.append(delivery(b"hello"))
    random.Random(7).shuffle(found)
    return [received(one, NOW + number * timedelta(minutes=17)) for number, one in enumerate(found)]


def physical(engine: Engine) -> dict[str, list[str]]:
    """The location and the last transaction of every row of every table."""
    with engine.connect() as connection:
        tables = list(connection.scalars(TABLES))
        query = "SELECT concat_ws(' ', tableoid, ctid, xmin) FROM headrace.{} ORDER BY 1"
        return {name: list(connection.scalars(text(query.format(name)))) for name in tables}


def run(engine: Engine, settings: Settings, *, order: Order = "oldest", window: ArchiveWindow = ALWAYS) -> Counter[str]:
    """Replays a window with a new worker."""
    outcomes = replay(engine, Applier(engine, settings), window, order, lambda _: None)
    return Counter({str(outcome): count for outcome, count in outcomes.items()})


@pytest.fixture
def empty(servers: Servers, settings: Settings) -> Iterator[Engine]:
    """A writer's engine on another migrated database."""

    def at(database: str, scheme: str = "postgresql") -> str:
        return urlunsplit(urlsplit(servers.database_url)._replace(scheme=scheme, path=f"/{database}"))

    with psycopg.connect(at("postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE replayed TEMPLATE headrace")
        engine = make_writer(replace(settings, database_url=at("replayed", "postgresql+psycopg")))
        yield engine
        engine.dispose()
        connection.execute("DROP DATABASE replayed WITH (FORCE)")


# The archive


@pytest.mark.parametrize("order", ORDERS)
def test_a_replay_without_a_loss_changes_nothing(engine: Engine, settings: Settings, order: Order) -> None:
    """Breaks if a replay, in any order, writes a single row where nothing was missing."""
    sent = everything()
    apply(engine, settings, *sent)
    before, stored = physical(engine), schema.digests(engine)
    assert before["samples"]
    assert before["chunks"]
    assert before["dead_letters"]
    outcomes = run(engine, settings, order=order)
    assert outcomes.total() == len(sent) - 1  # all but the dead delivery
    assert set(outcomes) <= {"duplicate", "stale", "ignored"}
    assert physical(engine) == before
    assert schema.digests(engine) == stored


def test_a_digest_notices_every_change(engine: Engine, settings: Settings) -> None:
    """Breaks if the digests in these tests miss a change."""
    apply(engine, settings, *everything())
    before = schema.digests(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE headrace.samples SET stored_at = now(), origin = 'replay'"))
    assert schema.digests(engine) == before
    for change in ("samples SET value = value + 1 WHERE value = 63", "workouts SET version = now()"):
        with engine.begin() as connection:
            connection.execute(text(f"UPDATE headrace.{change}"))
    changed = {name for name, value in schema.digests(engine).items() if before[name] != value}
    assert changed == {"health.heartrate", "health.workouts"}


@pytest.mark.parametrize("order", ORDERS)
def test_an_empty_database_is_restored(engine: Engine, settings: Settings, empty: Engine, order: Order) -> None:
    """Breaks if the stored data cannot be restored from the archive."""
    sent = everything()
    for one in sent:
        apply(engine, settings, one)
    outcomes = replay(engine, Applier(empty, settings), ALWAYS, order, lambda _: None)
    assert outcomes["applied"] > 4
    assert schema.digests(empty) == schema.digests(engine)
    for query in (
        "SELECT user_id, provider, status, error FROM health.connections ORDER BY 1, 2",
        "SELECT user_id, client_user_id FROM health.users ORDER BY 1",
        "SELECT user_id, resource, status, window_start, window_end, chunks_total FROM health.backfills",
        "SELECT message_id, event_type, received_at FROM health.deliveries WHERE outcome <> 'dead' ORDER BY 1",
        "SELECT message_id, event_type, user_id, received_at, sealed FROM headrace.archive ORDER BY 1",
    ):
        assert rows(empty, query) == rows(engine, query), query
    assert {row["origin"] for row in rows(empty, "SELECT origin FROM health.heartrate")} == {"replay"}


def test_a_replay_restores_lost_rows(engine: Engine, settings: Settings) -> None:
    """Breaks if a deleted table is not restored with the newest versions."""
    apply(engine, settings, *everything())
    before = schema.digests(engine)
    with engine.begin() as connection:
        for name in ("samples", "workouts", "connections"):
            connection.execute(text(f"DELETE FROM headrace.{name}"))
    assert schema.digests(engine) != before
    run(engine, settings, order="newest")
    assert schema.digests(engine) == before
    assert {row["origin"] for row in rows(engine, "SELECT origin FROM health.workouts")} == {"replay"}
    assert rows(engine, "SELECT status FROM health.connections") == [{"status": "error"}] * 2


@pytest.mark.parametrize("how", ["late", "in part", "newest first"])
def test_a_new_client_user_id_stays(engine: Engine, settings: Settings, how: str) -> None:
    """Breaks if an old delivery, late or replayed, restores the former client_user_id."""
    bodies = [workout("u1", f"w{number}") | {"client_user_id": name} for number, name in enumerate(("old", "new"))]
    sent = [received(delivery(body, START + n * MINUTE), NOW + n * MINUTE) for n, body in enumerate(bodies)]
    for one in sent[:: -1 if how == "late" else 1]:
        apply(engine, settings, one)
    if how == "in part":
        run(engine, settings, window=ArchiveWindow(NOW, NOW + MINUTE))
    elif how == "newest first":
        run(engine, settings, order="newest")
    found = rows(engine, "SELECT DISTINCT client_user_id FROM health.workouts")
    assert found == [{"client_user_id": "new"}]


def test_a_late_attempt_does_not_restore_an_old_client_user_id(engine: Engine, settings: Settings) -> None:
    """Breaks if the sender's retry of an old event, hours after the change, restores the former client_user_id."""
    new = delivery(workout("u1", "w1") | {"client_user_id": "new"}, START + MINUTE)
    old = delivery(workout("u1", "w0") | {"client_user_id": "old"}, START)
    apply(engine, settings, received(new, NOW))
    apply(engine, settings, received(old, NOW + MINUTE))
    assert rows(engine, "SELECT client_user_id FROM health.users") == [{"client_user_id": "new"}]


def test_only_the_window_is_applied(engine: Engine, settings: Settings) -> None:
    """Breaks if a replay exceeds its time window or event types."""
    sent = [received(delivery(workout("u1", f"w{n}")), NOW + n * timedelta(hours=1)) for n in range(5)]
    sent.append(received(delivery(heartrate("u1", {0: 60})), NOW + timedelta(hours=2)))
    apply(engine, settings, *sent)
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM headrace.workouts"))
        connection.execute(text("DELETE FROM headrace.samples"))
    window = ArchiveWindow(NOW + timedelta(hours=1), NOW + timedelta(hours=4), "daily.data.workouts.*")
    assert run(engine, settings, window=window) == {"applied": 3}
    assert [row["id"] for row in rows(engine, "SELECT id FROM health.workouts ORDER BY 1")] == ["w1", "w2", "w3"]
    assert rows(engine, "SELECT 1 FROM health.heartrate") == []


def test_several_batches_report_their_progress(engine: Engine, settings: Settings) -> None:
    """Breaks if deliveries beyond one transaction are left out, or progress is not reported."""
    count = 2 * MAX_BATCH + 1
    apply(engine, settings, *(received(delivery(workout("u1", f"w{n}")), NOW) for n in range(count)))
    progress: list[int] = []
    replay(engine, Applier(engine, settings), ALWAYS, "random", progress.append)
    assert progress == [MAX_BATCH, 2 * MAX_BATCH, count]


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_is_the_requested_one(engine: Engine, settings: Settings, order: Order) -> None:
    """Breaks if all orders are the same, so that the tests of orders show nothing."""
    sent = [received(delivery(workout("u1", f"w{n}")), NOW + n * timedelta(seconds=1)) for n in range(50)]
    apply(engine, settings, *sent)
    seen: list[str] = []

    class Recorder(Applier):
        def replay(self, deliveries: Sequence[Delivery]) -> Any:
            seen.extend(one.message_id for one in deliveries)
            return super().replay(deliveries)

    replay(engine, Recorder(engine, settings), ALWAYS, order, lambda _: None)
    names = [one.message_id for one in sent]
    assert sorted(seen) == sorted(names)
    if order == "random":
        assert seen not in (names, names[::-1])
    else:
        assert seen == (names if order == "oldest" else names[::-1])


def test_a_replay_is_not_counted_as_an_attempt(engine: Engine, settings: Settings) -> None:
    """Breaks if the ledger counts a replay as an attempt of the sender."""
    apply(engine, settings, *everything())
    before = rows(engine, LEDGER)
    for _ in range(2):
        run(engine, settings)
    assert rows(engine, LEDGER) == before


def test_no_transaction_is_open_while_an_hour_is_applied(engine: Engine, settings: Settings) -> None:
    """Breaks if an hour that takes over a minute (the session's limit) fails the replay, or its locks block others."""
    apply(engine, settings, *everything())
    query = """SELECT count(*) AS n FROM pg_locks WHERE relation = 'headrace.archive'::regclass
               AND pid <> pg_backend_pid()"""
    for _ in archive.read(engine, ALWAYS):
        assert rows(engine, query) == [{"n": 0}]


# Changed settings


def test_a_wider_setting_applies_ignored_deliveries(engine: Engine, settings: Settings) -> None:
    """Breaks if a wider HEADRACE_RESOURCES does not apply archived deliveries, or the ledger does not show it."""
    only = replace(settings, resources=("sleep",))
    assert apply(engine, only, delivery(workout("u1")), delivery(heartrate("u1", {0: 60}))) == {"ignored": 2}
    assert run(engine, only) == {"ignored": 2}
    wider = replace(settings, resources=("sleep", "workouts"))
    assert run(engine, wider) == {"applied": 1, "ignored": 1}
    assert rows(engine, "SELECT user_id, origin FROM health.workouts") == [{"user_id": "u1", "origin": "replay"}]
    query = "SELECT event_type, outcome, error FROM health.deliveries ORDER BY 1"
    left_out = {"outcome": "ignored", "error": "left out by HEADRACE_RESOURCES or HEADRACE_PROVIDERS"}
    assert rows(engine, query) == [
        {"event_type": "daily.data.heartrate.created"} | left_out,
        {"event_type": "daily.data.workouts.created", "outcome": "applied", "error": None},
    ]
    assert rows(engine, "SELECT count(*) AS n FROM headrace.archive") == [{"n": 2}]


def test_a_narrower_setting_removes_nothing(engine: Engine, settings: Settings) -> None:
    """Breaks if a replay under other settings reverts applied data."""
    apply(engine, settings, *everything())
    before = physical(engine)
    run(engine, replace(settings, resources=("sleep",)))
    assert physical(engine) == before


def test_a_replayed_notice_opens_no_backfill(engine: Engine, settings: Settings) -> None:
    """Breaks if every replay fetches the history again."""
    provider = Provider(heartrates(hourly(3)))
    given = replace(settings, junction_api_key="sk_us_tests", request_rate="1000000/second")
    apply(engine, given, notice(days=(0, 3)), notice(days=(3, 5), final=False), notice(resource="sleep", days=(0, 3)))
    backfills = "SELECT id, status, finished_at FROM headrace.backfills ORDER BY 1"
    chunks = "SELECT count(*) AS n FROM headrace.chunks"
    before = rows(engine, backfills)
    assert run(engine, given) == {"duplicate": 3}
    assert rows(engine, backfills) == before
    for one in due(engine):
        provider.fetcher(engine, given).run(one)
    settled = rows(engine, backfills)
    assert "complete" in {row["status"] for row in settled}
    assert run(engine, given, order="newest") == {"duplicate": 3}
    assert (rows(engine, backfills), rows(engine, chunks)) == (settled, [{"n": 3}])


# Dead letters


def reasons(engine: Engine) -> list[str]:
    """The reasons of the dead letters, newest first."""
    return [dead_letter.reason for dead_letter in dead_letters.listed(engine)]


def with_other_key(settings: Settings) -> Settings:
    return replace(settings, encryption_keys=(*settings.encryption_keys, OTHER_KEY))


def replay_all(engine: Engine, settings: Settings) -> Counter[str]:
    outcomes = replay_dead_letters(engine, Applier(engine, settings), dead_letters.listed(engine))
    return Counter({str(outcome): count for outcome, count in outcomes.items()})


def test_a_dead_letter_that_can_be_applied_is_resolved(engine: Engine, settings: Settings) -> None:
    """Breaks if a resolved delivery stays dead in the list or the ledger, or is not archived."""
    one, rubbish = sealed_with_another_key(workout("u1")), delivery(b"hello")
    assert apply(engine, settings, one, rubbish) == {"dead": 2}
    assert replay_all(engine, settings) == {"dead": 2}
    assert rows(engine, "SELECT 1 FROM headrace.archive") == []
    assert replay_all(engine, with_other_key(settings)) == {"applied": 1, "dead": 1}
    assert [dead_letter.message_id for dead_letter in dead_letters.listed(engine)] == [rubbish.message_id]
    (row,) = rows(engine, "SELECT * FROM headrace.deliveries WHERE message_id = :id", id=one.message_id)
    assert (row["outcome"], row["error"], row["attempts"]) == ("applied", None, 1)
    assert (row["event_type"], row["user_id"]) == ("daily.data.workouts.created", "u1")
    assert rows(engine, "SELECT message_id FROM headrace.archive") == [{"message_id": one.message_id}]
    assert rows(engine, "SELECT user_id, origin FROM health.workouts") == [{"user_id": "u1", "origin": "replay"}]
    assert replay_all(engine, with_other_key(settings)) == {"dead": 1}


@pytest.mark.parametrize(("newer", "outcome"), [(True, "stale"), (False, "applied")])
def test_a_resolved_dead_letter_does_not_replace_newer_data(
    engine: Engine, settings: Settings, outcome: str, *, newer: bool
) -> None:
    """Breaks if an old dead letter overwrites a newer value, or a newer dead letter is not applied."""
    dead = sealed_with_another_key(heartrate("u1", {0: 60}), START)
    apply(engine, settings, dead, delivery(heartrate("u1", {0: 99}), START + (1 if newer else -1) * MINUTE))
    assert replay_all(engine, with_other_key(settings)) == {outcome: 1}
    assert rows(engine, "SELECT value FROM health.heartrate") == [{"value": 99.0 if newer else 60.0}]
    query = "SELECT outcome, attempts, error, event_type FROM health.deliveries WHERE message_id = :id"
    (row,) = rows(engine, query, id=dead.message_id)
    assert tuple(row.values()) == (outcome, 1, None, "daily.data.heartrate.created")
    assert dead_letters.listed(engine) == []


def test_a_dead_letter_that_is_now_ignored_is_resolved(engine: Engine, settings: Settings) -> None:
    """Breaks if an ignored delivery stays in the list although the replay succeeded."""
    apply(engine, settings, sealed_with_another_key(workout("u1")))
    assert replay_all(engine, replace(with_other_key(settings), resources=("sleep",))) == {"ignored": 1}
    assert dead_letters.listed(engine) == []
    assert [row["outcome"] for row in rows(engine, LEDGER)] == ["ignored"]


def test_dead_letters_are_replayed_one_by_one(engine: Engine, settings: Settings) -> None:
    """Breaks if a delivery that stays dead prevents another from being applied."""
    dead = [sealed_with_another_key(workout("u1", "" if n % 2 else f"w{n}")) for n in range(6)]
    apply(engine, settings, *dead)
    assert replay_all(engine, with_other_key(settings)) == {"applied": 3, "dead": 3}
    assert [row["id"] for row in rows(engine, "SELECT id FROM health.workouts ORDER BY 1")] == ["w0", "w2", "w4"]


def test_the_list_shows_the_latest_reason(engine: Engine, settings: Settings) -> None:
    """Breaks if the first reason is still shown after its cause was fixed."""
    apply(engine, settings, sealed_with_another_key(workout("u1", "")))
    assert replay_all(engine, with_other_key(settings)) == {"dead": 1}
    assert reasons(engine)[0].startswith("workouts: id: expected")


def test_a_message_of_a_newer_version_is_applied_by_a_newer_worker(engine: Engine, settings: Settings) -> None:
    """Breaks if the dead letter of a raw message remains after its deliveries were applied."""
    applier = Applier(engine, settings)
    packed = pack([delivery(workout("u1")), delivery(b"hello")])
    applier.dead_letter_raw(packed.encode(), "a message of version 2; this worker reads version 1")
    assert replay_all(engine, settings) == {"applied": 1, "dead": 1}
    assert [reason[:20] for reason in reasons(engine)] == ["not a Junction event"]
    assert rows(engine, "SELECT user_id FROM health.workouts") == [{"user_id": "u1"}]
    assert len(rows(engine, "SELECT 1 FROM headrace.archive")) == 1


def test_a_replayed_raw_message_is_not_dead_in_the_ledger(engine: Engine, settings: Settings) -> None:
    """Breaks if `headrace status` counts an applied raw message as dead for ever."""
    Applier(engine, settings).dead_letter_raw(pack([delivery(workout("u1"))]).encode(), "not ours")
    assert replay_all(engine, settings) == {"applied": 1}
    assert {row["outcome"] for row in rows(engine, LEDGER)} == {"applied"}


# Rejected requests


@pytest.fixture
def reading(settings: Settings, broker_url: str) -> Settings:
    """A deployment that may fetch history, without a rate limit."""
    return replace(settings, broker_url=broker_url, junction_api_key="sk_us_tests", request_rate="1000000/second")


def refused(engine: Engine, settings: Settings) -> tuple[int, Provider]:
    """A backfill whose request the provider rejected, and the provider."""
    provider = Provider(lambda _: httpx.Response(422, json={"detail": "sesame"}))
    (one,) = announce(engine, settings, notice(days=(0, 3)))
    provider.fetcher(engine, settings).run(one)
    assert status(engine) == [("failed", 0, 1)]
    return one, provider


def test_a_rejected_request_resumes_its_backfill(engine: Engine, reading: Settings) -> None:
    """Breaks if the dead letter of a rejected request is applied as a delivery, or its backfill is not resumed."""
    one, provider = refused(engine, reading)
    (dead_letter,) = dead_letters.listed(engine)
    assert (dead_letter.backfill_id, dead_letter.event_type) == (one, "fetch.heartrate")
    assert replay_all(engine, reading) == {"applied": 1}
    assert dead_letters.listed(engine) == []
    assert due(engine) == [one]
    provider.answer = heartrates(hourly(3))
    settle(engine, provider.fetcher(engine, reading))
    assert status(engine) == [("complete", 1, 1)]
    assert rows(engine, "SELECT count(*) AS n FROM health.heartrate") == [{"n": 72}]


def test_a_request_rejected_again_is_a_dead_letter_again(engine: Engine, reading: Settings) -> None:
    """Breaks if a second failure of a backfill leaves no dead letter."""
    one, provider = refused(engine, reading)
    replay_all(engine, reading)
    provider.fetcher(engine, reading).run(one)
    assert status(engine) == [("failed", 0, 1)]
    assert [dead_letter.backfill_id for dead_letter in dead_letters.listed(engine)] == [one]


def test_a_dead_letter_without_its_backfill_stays(engine: Engine, reading: Settings) -> None:
    """Breaks if the evidence is deleted although nothing was requested."""
    one, _ = refused(engine, reading)
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM headrace.chunks"))
        connection.execute(text("DELETE FROM headrace.backfills"))
    assert replay_all(engine, reading) == {"dead": 1}
    assert [dead_letter.backfill_id for dead_letter in dead_letters.listed(engine)] == [one]


def test_a_rejected_stream_is_requested_although_the_rest_is_complete(engine: Engine, reading: Settings) -> None:
    """Breaks if one rejected stream is never fetched, because its backfill is complete without it."""
    provider = gone_streams(422)
    announce(engine, reading, notice(resource="workout_stream"))
    settle(engine, provider.fetcher(engine, reading))
    assert (status(engine), len(dead_letters.listed(engine))) == ([("complete", 1, 1)], 1)
    assert replay_all(engine, reading) == {"applied": 1}
    asked = len(provider.requests)
    fixed = Provider(workouts(daily(10)))
    settle(engine, fixed.fetcher(engine, reading))
    assert (dead_letters.listed(engine), len(provider.requests), len(fixed.requests)) == ([], asked, 1)
    assert len(rows(engine, "SELECT 1 FROM health.workout_stream WHERE origin = 'backfill'")) == 10
    assert status(engine) == [("complete", 1, 1)] * 2


def test_two_dead_letters_of_one_backfill_are_both_resolved(engine: Engine, reading: Settings) -> None:
    """Breaks if a replay fails, or leaves a dead letter, although the history is being fetched."""
    one, _ = refused(engine, reading)
    with transaction(engine) as connection:
        add_dead_letter(connection, delivery(b"{}", name=f"fetch-{one}-0123abcd"), "status 422", "fetch.heartrate")
    assert replay_all(engine, reading) == {"applied": 2}
    assert dead_letters.listed(engine) == []


def test_only_the_exact_form_of_a_message_id_is_a_request() -> None:
    """Breaks if a sender's message id can resume a backfill."""
    for name in ("fetch-1", "fetch-x-0a", "xfetch-1-0a", "fetch-1-0a ", "fetch-1-0A", "msg_1"):
        dead_letter = dead_letters.DeadLetter(1, "junction", name, None, None, FIRST, FIRST, "", 1, 0)
        assert dead_letter.backfill_id is None, name
    assert dead_letters.DeadLetter(1, "junction", "fetch-12-0a", None, None, FIRST, FIRST, "", 1, 0).backfill_id == 12


def test_an_invalid_raw_message_stays_dead(engine: Engine, settings: Settings) -> None:
    """Breaks if an invalid raw message is lost or duplicated by a replay."""
    applier = Applier(engine, settings)
    applier.dead_letter_raw(json.dumps([["sesame"], {}, {}]).encode(), "not ours")
    assert dict(replay_dead_letters(engine, applier, dead_letters.listed(engine))) == {"dead": 1}
    assert [dead_letter.reason for dead_letter in dead_letters.listed(engine)] == ["not ours"]
