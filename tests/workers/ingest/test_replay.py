"""Applying again: what was kept, in any order and into an empty database; and what was dead."""

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
from workers.store import archive, dead_letters, digests
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
    """Deliveries of every kind, over some hours and in no order, with versions that outdo each other."""
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
    """Where every row of every table stands and which transaction wrote it."""
    with engine.connect() as connection:
        tables = list(connection.scalars(TABLES))
        query = "SELECT concat_ws(' ', tableoid, ctid, xmin) FROM headrace.{} ORDER BY 1"
        return {name: list(connection.scalars(text(query.format(name)))) for name in tables}


def run(engine: Engine, settings: Settings, *, order: Order = "oldest", window: ArchiveWindow = ALWAYS) -> Counter[str]:
    """Applies what is kept of a window again, with a worker that has seen nothing before."""
    outcomes = replay(engine, Applier(engine, settings), window, order, lambda _: None)
    return Counter({str(outcome): count for outcome, count in outcomes.items()})


@pytest.fixture
def empty(servers: Servers, settings: Settings) -> Iterator[Engine]:
    """A writer's engine on another database, migrated and empty."""

    def at(database: str, scheme: str = "postgresql") -> str:
        return urlunsplit(urlsplit(servers.database_url)._replace(scheme=scheme, path=f"/{database}"))

    with psycopg.connect(at("postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE replayed TEMPLATE headrace")
        engine = make_writer(replace(settings, database_url=at("replayed", "postgresql+psycopg")))
        yield engine
        engine.dispose()
        connection.execute("DROP DATABASE replayed WITH (FORCE)")


# What was kept


@pytest.mark.parametrize("order", ORDERS)
def test_applying_again_changes_nothing_at_all(engine: Engine, settings: Settings, order: Order) -> None:
    """Breaks if a replay, in any order, writes as much as one row where nothing was wrong."""
    sent = everything()
    apply(engine, settings, *sent)
    before, stored = physical(engine), digests.digests(engine)
    assert before["samples"]
    assert before["chunks"]
    assert before["dead_letters"]
    outcomes = run(engine, settings, order=order)
    assert outcomes.total() == len(sent) - 1  # all but the dead one
    assert set(outcomes) <= {"duplicate", "stale", "ignored"}
    assert physical(engine) == before
    assert digests.digests(engine) == stored


def test_a_digest_notices_every_change(engine: Engine, settings: Settings) -> None:
    """Breaks if the digests of the tests around this one are blind."""
    apply(engine, settings, *everything())
    before = digests.digests(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE headrace.samples SET stored_at = now(), origin = 'replay'"))
    assert digests.digests(engine) == before
    for change in ("samples SET value = value + 1 WHERE value = 63", "workouts SET version = now()"):
        with engine.begin() as connection:
            connection.execute(text(f"UPDATE headrace.{change}"))
    changed = {name for name, value in digests.digests(engine).items() if before[name] != value}
    assert changed == {"health.heartrate", "health.workouts"}


@pytest.mark.parametrize("order", ORDERS)
def test_an_empty_database_ends_the_same(engine: Engine, settings: Settings, empty: Engine, order: Order) -> None:
    """Breaks if what is stored cannot be made again from what was kept."""
    sent = everything()
    for one in sent:
        apply(engine, settings, one)
    outcomes = replay(engine, Applier(empty, settings), ALWAYS, order, lambda _: None)
    assert outcomes["applied"] > 4
    assert digests.digests(empty) == digests.digests(engine)
    for query in (
        "SELECT user_id, provider, status, error FROM health.connections ORDER BY 1, 2",
        "SELECT user_id, client_user_id FROM health.users ORDER BY 1",
        "SELECT user_id, resource, status, window_start, window_end, chunks_total FROM health.backfills",
        "SELECT message_id, event_type, received_at FROM health.deliveries WHERE outcome <> 'dead' ORDER BY 1",
        "SELECT message_id, event_type, user_id, received_at, sealed FROM headrace.archive ORDER BY 1",
    ):
        assert rows(empty, query) == rows(engine, query), query
    assert {row["origin"] for row in rows(empty, "SELECT origin FROM health.heartrate")} == {"replay"}


def test_what_was_lost_comes_back(engine: Engine, settings: Settings) -> None:
    """Breaks if a table that somebody emptied is not filled again, with the newest versions."""
    apply(engine, settings, *everything())
    before = digests.digests(engine)
    with engine.begin() as connection:
        for name in ("samples", "workouts", "connections"):
            connection.execute(text(f"DELETE FROM headrace.{name}"))
    assert digests.digests(engine) != before
    run(engine, settings, order="newest")
    assert digests.digests(engine) == before
    assert {row["origin"] for row in rows(engine, "SELECT origin FROM health.workouts")} == {"replay"}
    assert rows(engine, "SELECT status FROM health.connections") == [{"status": "error"}] * 2


@pytest.mark.parametrize("how", ["late", "in part", "newest first"])
def test_a_new_client_user_id_stays(engine: Engine, settings: Settings, how: str) -> None:
    """Breaks if an old delivery, late or applied again, gives a person the id of before its change in every view."""
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


def test_a_late_attempt_does_not_bring_an_old_client_user_id_back(engine: Engine, settings: Settings) -> None:
    """Breaks if the sender's retry of an old event, hours after the change, gives a person the id of before."""
    new = delivery(workout("u1", "w1") | {"client_user_id": "new"}, START + MINUTE)
    old = delivery(workout("u1", "w0") | {"client_user_id": "old"}, START)
    apply(engine, settings, received(new, NOW))
    apply(engine, settings, received(old, NOW + MINUTE))
    assert rows(engine, "SELECT client_user_id FROM health.users") == [{"client_user_id": "new"}]


def test_only_the_window_is_applied(engine: Engine, settings: Settings) -> None:
    """Breaks if a replay goes beyond its hours or its event types."""
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


def test_more_than_go_together_are_told_as_they_go(engine: Engine, settings: Settings) -> None:
    """Breaks if what does not fit into one transaction is left out, or nobody is told how far it has come."""
    count = 2 * MAX_BATCH + 1
    apply(engine, settings, *(received(delivery(workout("u1", f"w{n}")), NOW) for n in range(count)))
    told: list[int] = []
    replay(engine, Applier(engine, settings), ALWAYS, "random", told.append)
    assert told == [MAX_BATCH, 2 * MAX_BATCH, count]


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_is_the_one_that_was_asked_for(engine: Engine, settings: Settings, order: Order) -> None:
    """Breaks if all orders are one, and the tests of them show nothing."""
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


def test_a_replay_is_no_attempt_of_the_senders(engine: Engine, settings: Settings) -> None:
    """Breaks if the ledger tells of attempts that nobody made."""
    apply(engine, settings, *everything())
    before = rows(engine, LEDGER)
    for _ in range(2):
        run(engine, settings)
    assert rows(engine, LEDGER) == before


def test_no_transaction_is_open_while_an_hour_is_applied(engine: Engine, settings: Settings) -> None:
    """Breaks if an hour that takes over a minute ends the replay (the session's limit), or its locks hold up others."""
    apply(engine, settings, *everything())
    query = """SELECT count(*) AS n FROM pg_locks WHERE relation = 'headrace.archive'::regclass
               AND pid <> pg_backend_pid()"""
    for _ in archive.read(engine, ALWAYS):
        assert rows(engine, query) == [{"n": 0}]


# Settings that changed


def test_what_a_setting_left_out_is_applied_once_it_is_wanted(engine: Engine, settings: Settings) -> None:
    """Breaks if a wider HEADRACE_RESOURCES does not bring back what is kept, or the ledger does not say so."""
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


def test_a_narrower_setting_takes_nothing_away(engine: Engine, settings: Settings) -> None:
    """Breaks if a replay under other settings unsays what was applied."""
    apply(engine, settings, *everything())
    before = physical(engine)
    run(engine, replace(settings, resources=("sleep",)))
    assert physical(engine) == before


def test_a_notice_that_is_applied_again_opens_nothing(engine: Engine, settings: Settings) -> None:
    """Breaks if history is fetched anew at every replay, open or complete."""
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
    """Why the dead are dead, the newest first."""
    return [letter.reason for letter in dead_letters.listed(engine)]


def lift(engine: Engine, settings: Settings) -> Counter[str]:
    """Applies every dead letter again."""
    outcomes = replay_dead_letters(engine, Applier(engine, settings), dead_letters.listed(engine))
    return Counter({str(outcome): count for outcome, count in outcomes.items()})


def test_a_dead_letter_that_can_be_applied_now_leaves_the_list(engine: Engine, settings: Settings) -> None:
    """Breaks if what was mended stays dead in the list or the ledger, or is not kept from then on."""
    one, rubbish = sealed_with_another_key(workout("u1")), delivery(b"hello")
    assert apply(engine, settings, one, rubbish) == {"dead": 2}
    assert lift(engine, settings) == {"dead": 2}
    assert rows(engine, "SELECT 1 FROM headrace.archive") == []
    mended = replace(settings, encryption_keys=(*settings.encryption_keys, OTHER_KEY))
    assert lift(engine, mended) == {"applied": 1, "dead": 1}
    assert [letter.message_id for letter in dead_letters.listed(engine)] == [rubbish.message_id]
    (row,) = rows(engine, "SELECT * FROM headrace.deliveries WHERE message_id = :id", id=one.message_id)
    assert (row["outcome"], row["error"], row["attempts"]) == ("applied", None, 1)
    assert (row["event_type"], row["user_id"]) == ("daily.data.workouts.created", "u1")
    assert rows(engine, "SELECT message_id FROM headrace.archive") == [{"message_id": one.message_id}]
    assert rows(engine, "SELECT user_id, origin FROM health.workouts") == [{"user_id": "u1", "origin": "replay"}]
    assert lift(engine, mended) == {"dead": 1}


@pytest.mark.parametrize(("newer", "outcome"), [(True, "stale"), (False, "applied")])
def test_a_mended_letter_does_not_hide_what_is_newer(
    engine: Engine, settings: Settings, outcome: str, *, newer: bool
) -> None:
    """Breaks if a letter that lay for a month brings old values back, or a newer one is passed over."""
    dead_one = sealed_with_another_key(heartrate("u1", {0: 60}), START)
    apply(engine, settings, dead_one, delivery(heartrate("u1", {0: 99}), START + (1 if newer else -1) * MINUTE))
    mended = replace(settings, encryption_keys=(*settings.encryption_keys, OTHER_KEY))
    assert lift(engine, mended) == {outcome: 1}
    assert rows(engine, "SELECT value FROM health.heartrate") == [{"value": 99.0 if newer else 60.0}]
    assert rows(engine, LEDGER.replace("ORDER", "WHERE message_id = :id ORDER"), id=dead_one.message_id) == [
        {
            "message_id": dead_one.message_id,
            "outcome": outcome,
            "attempts": 1,
            "error": None,
            "event_type": "daily.data.heartrate.created",
        }
    ]
    assert dead_letters.listed(engine) == []


def test_a_letter_that_is_now_left_out_is_dead_no_more(engine: Engine, settings: Settings) -> None:
    """Breaks if a letter that needs nobody's hand any more stays in the list, though the replay ends as a success."""
    apply(engine, settings, sealed_with_another_key(workout("u1")))
    keys = (*settings.encryption_keys, OTHER_KEY)
    assert lift(engine, replace(settings, encryption_keys=keys, resources=("sleep",))) == {"ignored": 1}
    assert dead_letters.listed(engine) == []
    assert [row["outcome"] for row in rows(engine, LEDGER)] == ["ignored"]


def test_many_letters_are_lifted_one_by_one(engine: Engine, settings: Settings) -> None:
    """Breaks if one letter that stays dead keeps another from landing."""
    letters = [sealed_with_another_key(workout("u1", f"w{n}", title="a\u0000b" if n % 2 else "x")) for n in range(6)]
    apply(engine, settings, *letters)
    mended = replace(settings, encryption_keys=(*settings.encryption_keys, OTHER_KEY))
    assert lift(engine, mended) == {"applied": 3, "dead": 3}
    assert [row["id"] for row in rows(engine, "SELECT id FROM health.workouts ORDER BY 1")] == ["w0", "w2", "w4"]


def test_the_list_says_why_a_letter_is_dead_still(engine: Engine, settings: Settings) -> None:
    """Breaks if whoever mended the first reason is told the same again, and never the one that is left."""
    apply(engine, settings, sealed_with_another_key(workout("u1", title="a\u0000b")))
    mended = replace(settings, encryption_keys=(*settings.encryption_keys, OTHER_KEY))
    assert lift(engine, mended) == {"dead": 1}
    assert reasons(engine)[0].startswith("PostgreSQL refuses it")


def test_a_message_of_a_newer_version_is_applied_by_a_newer_worker(engine: Engine, settings: Settings) -> None:
    """Breaks if a message that was set aside whole keeps its place in the list once its deliveries have landed."""
    applier = Applier(engine, settings)
    packed = pack([delivery(workout("u1")), delivery(b"hello")])
    applier.dead_letter_raw(packed.encode(), "a message of version 2; this worker reads version 1")
    assert lift(engine, settings) == {"applied": 1, "dead": 1}
    assert [reason[:20] for reason in reasons(engine)] == ["not a Junction event"]
    assert rows(engine, "SELECT user_id FROM health.workouts") == [{"user_id": "u1"}]
    assert len(rows(engine, "SELECT 1 FROM headrace.archive")) == 1


def test_a_message_that_was_brought_back_is_not_dead_in_the_ledger(engine: Engine, settings: Settings) -> None:
    """Breaks if `headrace status` tells for ever of a dead delivery that was applied."""
    Applier(engine, settings).dead_letter_raw(pack([delivery(workout("u1"))]).encode(), "not ours")
    assert lift(engine, settings) == {"applied": 1}
    assert {row["outcome"] for row in rows(engine, LEDGER)} == {"applied"}


# Refused requests


@pytest.fixture
def reading(settings: Settings, broker_url: str) -> Settings:
    """A deployment that may read history, and as fast as it likes."""
    return replace(settings, broker_url=broker_url, junction_api_key="sk_us_tests", request_rate="1000000/second")


def refused(engine: Engine, settings: Settings) -> tuple[int, Provider]:
    """A backfill that ended because the provider refused a request, and the provider."""
    provider = Provider(lambda _: httpx.Response(422, json={"detail": "sesame"}))
    (one,) = announce(engine, settings, notice(days=(0, 3)))
    provider.fetcher(engine, settings).run(one)
    assert status(engine) == [("failed", 0, 1)]
    return one, provider


def test_a_refused_request_has_its_backfill_resumed(engine: Engine, reading: Settings) -> None:
    """Breaks if the letter of a refused request is taken for a delivery, or its history is not gone on with."""
    one, provider = refused(engine, reading)
    (letter,) = dead_letters.listed(engine)
    assert (letter.backfill_id, letter.event_type) == (one, "fetch.heartrate")
    assert lift(engine, reading) == {"applied": 1}
    assert dead_letters.listed(engine) == []
    assert due(engine) == [one]
    provider.answer = heartrates(hourly(3))
    settle(engine, provider.fetcher(engine, reading))
    assert status(engine) == [("complete", 1, 1)]
    assert rows(engine, "SELECT count(*) AS n FROM health.heartrate") == [{"n": 72}]


def test_a_request_that_is_refused_again_is_a_letter_again(engine: Engine, reading: Settings) -> None:
    """Breaks if a history that fails for a second time leaves no trace."""
    one, provider = refused(engine, reading)
    lift(engine, reading)
    provider.fetcher(engine, reading).run(one)
    assert status(engine) == [("failed", 0, 1)]
    assert [letter.backfill_id for letter in dead_letters.listed(engine)] == [one]


def test_a_letter_whose_backfill_is_gone_stays(engine: Engine, reading: Settings) -> None:
    """Breaks if the evidence is thrown away although nothing was done about it."""
    one, _ = refused(engine, reading)
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM headrace.chunks"))
        connection.execute(text("DELETE FROM headrace.backfills"))
    assert lift(engine, reading) == {"dead": 1}
    assert [letter.backfill_id for letter in dead_letters.listed(engine)] == [one]


def test_a_refused_stream_is_asked_for_although_the_rest_is_complete(engine: Engine, reading: Settings) -> None:
    """Breaks if one stream among many, refused for a while, is never had: its backfill is complete without it."""
    provider = gone_streams(422)
    announce(engine, reading, notice(resource="workout_stream"))
    settle(engine, provider.fetcher(engine, reading))
    assert (status(engine), len(dead_letters.listed(engine))) == ([("complete", 1, 1)], 1)
    assert lift(engine, reading) == {"applied": 1}
    asked = len(provider.asked)
    mended = Provider(workouts(daily(10)))
    settle(engine, mended.fetcher(engine, reading))
    assert (dead_letters.listed(engine), len(provider.asked), len(mended.asked)) == ([], asked, 1)
    assert len(rows(engine, "SELECT 1 FROM health.workout_stream WHERE origin = 'backfill'")) == 10
    assert status(engine) == [("complete", 1, 1)] * 2


def test_two_letters_of_one_backfill_are_both_mended(engine: Engine, reading: Settings) -> None:
    """Breaks if a replay ends with an error and a letter in the list although its history is being fetched."""
    one, _ = refused(engine, reading)
    with transaction(engine) as connection:
        add_dead_letter(connection, delivery(b"{}", name=f"fetch-{one}-0123abcd"), "fetch.heartrate", "status 422")
    assert lift(engine, reading) == {"applied": 2}
    assert dead_letters.listed(engine) == []


def test_a_delivery_that_is_only_named_like_a_request_is_none() -> None:
    """Breaks if a sender's id can have a backfill resumed."""
    for name in ("fetch-1", "fetch-x-0a", "xfetch-1-0a", "fetch-1-0a ", "fetch-1-0A", "msg_1"):
        letter = dead_letters.DeadLetter(1, "junction", name, None, None, FIRST, FIRST, "", 1, 0)
        assert letter.backfill_id is None, name
    assert dead_letters.DeadLetter(1, "junction", "fetch-12-0a", None, None, FIRST, FIRST, "", 1, 0).backfill_id == 12


def test_rubbish_stays_dead(engine: Engine, settings: Settings) -> None:
    """Breaks if rubbish that is applied again is lost, or kept twice."""
    applier = Applier(engine, settings)
    applier.dead_letter_raw(json.dumps([["sesame"], {}, {}]).encode(), "not ours")
    assert dict(replay_dead_letters(engine, applier, dead_letters.listed(engine))) == {"dead": 1}
    assert [letter.reason for letter in dead_letters.listed(engine)] == ["not ours"]
