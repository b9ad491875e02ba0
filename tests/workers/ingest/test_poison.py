"""Deliveries that PostgreSQL does not execute must not hold the others of their message."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from secrets import token_hex

import pytest
from sqlalchemy import Engine, text

from app.config.settings import Settings
from app.delivery import Delivery, pack
from app.errors import ConnectionLost, RetryAlone, TryLater
from tests.support import delivery, heartrate, rows, until, workout
from tests.support.database import settings_of
from tests.support.poison import BAD, RAISE, SLEEP, eleven, fault, run_tries
from tests.support.servers import own_postgres
from workers.ingest import apply as ingest
from workers.ingest.apply import Applier
from workers.ingest.commit import Committer
from workers.ingest.crashes import MAX_CRASHES
from workers.ingest.outcomes import MAX_LOST, MAX_TRIES, MAX_TRIES_TRANSIENT, Applied, ParsedDelivery, failures_after
from workers.ingest.replay import replay_dead_letters
from workers.local.ports import free_port
from workers.store import dead_letters
from workers.store.engine import make_engine, make_writer, transaction
from workers.store.migrate import migrate

OUTCOMES = "SELECT outcome, count(*) AS n FROM health.deliveries GROUP BY 1 ORDER BY 1"
TEN = [{"outcome": "applied", "n": 10}]
ONE_DEAD = [*TEN, {"outcome": "dead", "n": 1}]


@pytest.fixture
def impatient(engine: Engine, settings: Settings) -> Iterator[Applier]:
    """A worker with short timeouts."""
    del engine
    own = make_writer(settings, session={"statement_timeout": "300ms", "lock_timeout": "30ms"})
    yield Applier(own, settings)
    own.dispose()


def check_dead(engine: Engine, settings: Settings, *words: str) -> None:
    """Asserts that BAD is a dead letter with these words in its reason, and that a replay applies it."""
    assert rows(engine, OUTCOMES) == ONE_DEAD
    (dead,) = dead_letters.listed(engine)
    assert all(word in dead.reason for word in words)
    assert "secret" not in dead.reason
    assert replay_dead_letters(engine, Applier(engine, settings), [dead]) == {"applied": 1}
    assert rows(engine, f"SELECT 1 AS n FROM health.workouts WHERE user_id = '{BAD}'") == [{"n": 1}]
    assert dead_letters.listed(engine) == []


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        (SLEEP, ("took too long", "57014", "after 300ms", "headrace dead replay ID --timeout")),
        (RAISE.format("XX001"), ("damaged page", "DataCorrupted (XX001)")),
        (RAISE.format("XX002"), ("damaged page", "XX002")),
        (RAISE.format("53400"), ("did not execute", "ConfigurationLimitExceeded (53400)")),
        (RAISE.format("P0001"), ("did not execute", "P0001")),
    ],
    ids=["statement timeout", "damaged page", "damaged index", "too large a temporary file", "any other error"],
)
def test_a_statement_that_fails_holds_no_neighbour(
    engine: Engine, settings: Settings, impatient: Applier, statement: str, words: tuple[str, ...]
) -> None:
    """Breaks if a delivery that PostgreSQL does not execute is retried with its whole message for ever."""
    with fault(engine, statement):
        sizes = run_tries(impatient, eleven())
    assert sizes == [11] + [1] * (MAX_TRIES - 1)
    check_dead(engine, settings, *words)


def test_the_neighbours_are_applied_before_the_delivery_is_dead(engine: Engine, settings: Settings) -> None:
    """Breaks if good deliveries wait until the bad one has had all its tries."""
    with fault(engine, RAISE.format("XX001")):
        applied = Applier(engine, settings).apply(pack(eleven()))
    assert applied.outcomes == {"applied": 10}
    (left,) = applied.unsettled
    assert (left.failures, isinstance(left.error, RetryAlone)) == (1, True)
    assert rows(engine, OUTCOMES) == TEN


@pytest.mark.parametrize("code", ["54000", "XX000"])
def test_an_error_of_the_data_needs_no_retry(engine: Engine, settings: Settings, code: str) -> None:
    """Breaks if an index row that is too large, or an internal error such as for 60 MB of `[]`, is retried."""
    with fault(engine, RAISE.format(code)):
        assert run_tries(Applier(engine, settings), eleven()) == [11]
    check_dead(engine, settings, "PostgreSQL refuses it", code)


@pytest.mark.parametrize("where", ["user", "source"])
def test_an_index_row_that_is_too_large_is_a_dead_letter(engine: Engine, settings: Settings, where: str) -> None:
    """Breaks if a name that PostgreSQL cannot index is retried for ever."""
    long = token_hex(3000)
    bad = workout(long) if where == "user" else heartrate(BAD, {0: 60}, type=long)
    sent = eleven()
    sent[5] = delivery(bad)
    assert run_tries(Applier(engine, settings), sent) == [11]
    assert rows(engine, OUTCOMES) == ONE_DEAD


def test_a_locked_row_holds_no_neighbour(engine: Engine, settings: Settings, impatient: Applier) -> None:
    """Breaks if deliveries wait for a lock that another connection holds, or the locked one is lost."""
    impatient.apply(pack([delivery(workout(BAD))]))
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM headrace.deliveries"))
    with engine.connect() as holder, holder.begin():
        holder.execute(text("SELECT 1 FROM headrace.users WHERE user_id = :bad FOR UPDATE"), {"bad": BAD})
        sent = eleven()
        sent[5] = delivery(workout(BAD, calories=2))
        sizes = run_tries(impatient, sent)
    assert sizes == [11] + [1] * (MAX_TRIES_TRANSIENT - 1)
    check_dead(engine, settings, "another transaction held a lock", "55P03")


def test_an_outage_keeps_the_message_whole(engine: Engine, settings: Settings) -> None:
    """Breaks if the deliveries of a message are separated, or become dead letters, while PostgreSQL is down."""
    url = f"postgresql+psycopg://headrace:sesame@127.0.0.1:{free_port()}/headrace"
    applier = Applier(make_writer(replace(settings, database_url=url)), settings)
    for failures in (0, 1000):
        with pytest.raises(TryLater) as caught:
            applier.apply(pack(eleven()), failures=failures)
        assert not isinstance(caught.value, RetryAlone)


@pytest.mark.parametrize("code", ["57P01", "53100", "53300", "42501", "25006"])
def test_an_unusable_database_keeps_the_message_whole(engine: Engine, settings: Settings, code: str) -> None:
    """Breaks if a full disk, missing rights, a restart or a standby makes dead letters."""
    with fault(engine, RAISE.format(code)), pytest.raises(TryLater) as caught:
        Applier(engine, settings).apply(pack(eleven()))
    assert not isinstance(caught.value, RetryAlone)


@pytest.mark.parametrize("code", ["58030", "58P01"])
def test_an_unreadable_file_holds_no_neighbour(engine: Engine, settings: Settings, code: str) -> None:
    """Breaks if a missing segment of a table holds the deliveries that do not need it."""
    with fault(engine, RAISE.format(code)):
        sizes = run_tries(Applier(engine, settings), eleven())
    assert sizes == [11] + [1] * (MAX_TRIES_TRANSIENT - 1)
    check_dead(engine, settings, "cannot read or write a file", code)


def test_a_disk_that_fails_makes_no_dead_letters(engine: Engine, settings: Settings) -> None:
    """Breaks if good deliveries become dead letters while PostgreSQL can apply none."""
    sent = eleven()
    with fault(engine, RAISE.format("58030"), "true"):
        applied = Applier(engine, settings).apply(pack(sent))
        assert (applied.outcomes, len(applied.unsettled)) == ({}, 11)
        with pytest.raises(RetryAlone):
            Applier(engine, settings).apply(pack(sent[:1]), failures=1000)
    assert rows(engine, OUTCOMES) == []


CRASH = "COPY (SELECT 1) TO PROGRAM 'kill -9 $PPID'"  # the shell's parent is the server process of the session


@contextmanager
def migrated_postgres(settings: Settings) -> Iterator[Settings]:
    """A PostgreSQL that the test may crash."""
    with own_postgres() as url:
        own = settings_of(settings, url)
        owner = make_engine(own)
        migrate(owner)
        owner.dispose()
        yield own


def crash_tries(applier: Applier, sent: Sequence[Delivery]) -> int:
    """How many tries crashed a process of PostgreSQL, until each delivery has an outcome."""
    lost = 0
    while lost < 20:
        try:
            applier.apply(pack(sent), redelivered=lost >= MAX_LOST)
        except ConnectionLost:
            lost += 1
        except TryLater:
            time.sleep(0.1)
        else:
            return lost
    raise AssertionError(lost)


def test_a_delivery_that_crashes_postgresql_holds_no_neighbour(settings: Settings) -> None:
    """Breaks if a delivery that ends PostgreSQL's processes is retried with its neighbours for ever."""
    with migrated_postgres(settings) as own:
        engine = make_writer(own)
        with fault(engine, f"EXECUTE $kill${CRASH}$kill$"):
            assert crash_tries(Applier(engine, own), eleven()) == MAX_LOST + MAX_CRASHES
        check_dead(engine, own, "PostgreSQL's process, crashed 3 times")
        assert rows(engine, "SELECT 1 FROM headrace.crash_counts") == []
        engine.dispose()


def test_the_neighbours_of_a_crash_are_not_suspected(engine: Engine, settings: Settings) -> None:
    """Breaks if crashes of other processes of PostgreSQL make a delivery that was in flight a dead letter."""
    sent, applier = eleven(), Applier(engine, settings)
    with fault(engine, RAISE.format("57P02")):
        for _ in range(5):
            with pytest.raises(TryLater) as caught:
                applier.apply(pack(sent), redelivered=True)
            assert type(caught.value) is TryLater
    assert len(rows(engine, "SELECT 1 FROM health.workouts")) == 5
    assert applier.apply(pack(sent), redelivered=True).outcomes == {"applied": 6, "duplicate": 5}
    assert rows(engine, "SELECT 1 FROM headrace.crash_counts") == []


def test_a_lost_connection_uses_up_no_try_of_a_delivery_alone() -> None:
    """Breaks if a failover takes tries from a delivery whose statement times out later."""
    assert [failures_after(0, error("lost")) for error in (ConnectionLost, TryLater, RetryAlone)] == [0, 0, 1]


def test_the_crash_of_another_process_is_recognised(settings: Settings) -> None:
    """Breaks if a statement in flight counts as one that crashed PostgreSQL: the server only says so in a warning."""
    with migrated_postgres(settings) as own:
        here, there = make_writer(own), make_writer(own)

        def innocent() -> type[Exception]:
            with pytest.raises(TryLater) as caught, transaction(here) as connection:
                connection.execute(text("SELECT pg_sleep(30) AS innocent"))
            return type(caught.value)

        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(innocent)
            until(lambda: rows(there, "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"))
            with pytest.raises(ConnectionLost), transaction(there) as connection:
                connection.execute(text(CRASH))
            assert found.result(30) is TryLater
        here.dispose()
        there.dispose()


def test_a_delivery_whose_dead_letter_cannot_be_stored_holds_no_neighbour(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if an error of ours that hits one delivery, and its dead letter too, holds the message."""
    commit = Committer.commit
    sent = eleven()

    def failing(self: Committer, batch: list[ParsedDelivery]) -> Applied:
        if any(one.delivery == sent[5] for one in batch):
            raise ValueError("canary")
        return commit(self, batch)

    monkeypatch.setattr(Committer, "commit", failing)
    applied = Applier(engine, settings).apply(pack(sent))
    assert applied.outcomes == {"applied": 10}
    assert [one.delivery for one in applied.unsettled] == [sent[5]]
    assert rows(engine, OUTCOMES) == TEN


def test_slow_tries_are_not_made_in_one_task(
    engine: Engine, settings: Settings, impatient: Applier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a message of many slow deliveries is worked on for longer than the visibility timeout."""
    monkeypatch.setattr(ingest, "MAX_ALONE_SECONDS", 0.2)
    sent: list[Delivery] = [delivery(workout(BAD, f"w{n}")) for n in range(10)]
    with fault(engine, SLEEP):
        began = time.monotonic()
        applied = impatient.apply(pack(sent))
    assert time.monotonic() - began < 2
    assert [one.failures for one in applied.unsettled] == [1] + [0] * 9


def test_an_error_of_a_redelivered_message_is_not_a_crash(engine: Engine, settings: Settings) -> None:
    """Breaks if a statement that times out after a redelivery is counted as a crash, or holds its neighbours."""
    with fault(engine, RAISE.format("XX001")):
        applied = Applier(engine, settings).apply(pack(eleven()), redelivered=True)
    assert (applied.outcomes, len(applied.unsettled)) == ({"applied": 10}, 1)
    assert rows(engine, "SELECT 1 FROM headrace.crash_counts") == []


def test_a_replay_of_a_batch_leaves_only_the_failing_delivery(
    engine: Engine, settings: Settings, impatient: Applier
) -> None:
    """Breaks if one archived delivery that times out ends a replay, or its old outcome is lost."""
    sent = eleven()
    impatient.apply(pack(sent))
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM headrace.workouts"))
    with fault(engine, SLEEP):
        assert impatient.replay(sent).outcomes == {"applied": 10, "dead": 1}
    assert rows(engine, OUTCOMES) == [{"outcome": "applied", "n": 11}]
    assert len(rows(engine, "SELECT 1 FROM health.workouts")) == 10


def test_a_dead_letter_that_fails_again_stays(engine: Engine, settings: Settings, impatient: Applier) -> None:
    """Breaks if a replay that times out raises an error, or drops the dead letter."""
    with fault(engine, SLEEP):
        run_tries(impatient, eleven())
        found = dead_letters.listed(engine)
        assert replay_dead_letters(engine, impatient, found) == {"dead": 1}
    check_dead(engine, settings, "took too long")
