"""Users: which aggregator owns each, also when two of them name a new user at the same time."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from sqlalchemy import Engine, event

from app.config.settings import Settings
from tests.support import START, rows, until
from tests.support.database import run
from workers.store.engine import make_writer, transaction
from workers.store.users import Claim, ClientId, User, claim_user, upsert_users

LATER = START + timedelta(days=1)
STORED = "SELECT user_id, aggregator, client_user_id FROM headrace.users ORDER BY 1"


def upsert(engine: Engine, *claims: tuple[str, str, ClientId]) -> list[User]:
    """The user of each claim (aggregator, user_id, client_user_id), of one transaction."""
    with transaction(engine) as connection:
        given = {Claim(aggregator, user_id): client for aggregator, user_id, client in claims}
        return list(upsert_users(connection, given).values())


def stored(engine: Engine) -> list[tuple[str, str | None, str | None]]:
    return [tuple(row.values()) for row in rows(engine, STORED)]


def test_the_first_aggregator_owns_the_user(engine: Engine) -> None:
    """Breaks if the second aggregator becomes the owner, or changes the client_user_id."""
    assert upsert(engine, ("junction", "u1", ("member-1", START))) == [User()]
    assert upsert(engine, ("terra", "u1", ("another", LATER))) == [User(other_owner="junction")]
    assert upsert(engine, ("junction", "u1", ("member-2", LATER))) == [User()]
    assert stored(engine) == [("u1", "junction", "member-2")]


def test_of_two_claims_of_one_transaction_the_first_wins(engine: Engine) -> None:
    """Breaks if a message of both aggregators fails, or the result depends on the order of the SQL rows."""
    claims = [("terra", "u1", ("t", START)), ("junction", "u1", ("j", LATER)), ("junction", "u0", ("j", START))]
    assert upsert(engine, *claims) == [User(), User(other_owner="terra"), User()]
    assert stored(engine) == [("u0", "junction", "j"), ("u1", "terra", "t")]
    newer = [("junction", "u1", ("j", LATER)), ("terra", "u1", ("t2", LATER))]
    assert upsert(engine, *newer) == [User(other_owner="terra"), User()]
    assert stored(engine) == [("u0", "junction", "j"), ("u1", "terra", "t2")]


def test_a_user_without_an_owner_belongs_to_the_next_writer(engine: Engine) -> None:
    """Breaks if users of which a migration found no evidence stay open to everybody, or to no one."""
    run(engine, "INSERT INTO headrace.users (user_id, client_user_id, named_at) VALUES ('u1', 'member-1', now())")
    assert upsert(engine, ("terra", "u1", ("older", START))) == [User()]
    assert stored(engine) == [("u1", "terra", "member-1")]
    assert upsert(engine, ("junction", "u1", None)) == [User(other_owner="terra")]


def test_an_operator_may_name_every_user(engine: Engine) -> None:
    """Breaks if a command becomes the owner of a user, or is refused."""
    with transaction(engine) as connection:
        assert claim_user(connection, "u1") == User()
    assert upsert(engine, ("terra", "u1", None)) == [User()]
    with transaction(engine) as connection:
        assert claim_user(connection, "u1") == User()
    assert stored(engine) == [("u1", "terra", None)]


def test_a_tombstone_belongs_to_no_aggregator(engine: Engine) -> None:
    """Breaks if an aggregator becomes the owner of a user who was erased, known or not."""
    run(engine, "INSERT INTO headrace.users (user_id, erased_at) VALUES ('u1', now())")
    for aggregator in ("junction", "terra"):
        assert upsert(engine, (aggregator, "u1", ("member-1", START))) == [User(is_erased=True)]
    assert stored(engine) == [("u1", None, None)]


def test_two_aggregators_at_once(engine: Engine, settings: Settings) -> None:
    """Breaks if both of two concurrent transactions may write for a new user, or for a user without an owner."""
    engines = {name: make_writer(settings) for name in ("junction", "terra")}
    together = threading.Barrier(2)
    users = [f"u{number}" for number in range(40)]
    run(engine, "INSERT INTO headrace.users (user_id) SELECT 'u' || n FROM generate_series(0, 39, 2) AS n")

    def claim(aggregator: str, user_id: str) -> User:
        together.wait(20)
        with transaction(engines[aggregator]) as connection:
            return claim_user(connection, user_id, aggregator)

    with ThreadPoolExecutor(2) as pool:
        for user_id in users:
            found = dict(zip(engines, pool.map(claim, engines, [user_id] * 2), strict=True))
            (owner,) = (name for name, user in found.items() if not user.is_read_only)
            (other,) = (user.other_owner for user in found.values() if user.is_read_only)
            assert owner == other
            assert (user_id, owner, None) in stored(engine)
    for one in engines.values():
        one.dispose()


def test_a_transaction_waits_for_the_first_claim(engine: Engine, settings: Settings) -> None:
    """Breaks if the second aggregator is accepted while the transaction of the first one is still open."""
    other = make_writer(settings)
    with ThreadPoolExecutor(1) as pool:
        with transaction(engine) as connection:
            assert claim_user(connection, "u1", "junction") == User()
            waiting = pool.submit(upsert, other, ("terra", "u1", ("member-1", START)))
            is_locked = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            until(lambda: rows(other, is_locked), 15)
            assert not waiting.done()
        assert waiting.result(20) == [User(other_owner="junction")]
    assert stored(engine) == [("u1", "junction", None)]
    other.dispose()


def test_known_users_cost_one_statement(engine: Engine) -> None:
    """Breaks if the check of owners adds a statement to every message."""
    claims = [("junction", f"u{number}", ("member", START)) for number in range(3)]
    upsert(engine, *claims)
    statements: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    assert upsert(engine, *claims, ("terra", "u1", ("another", LATER))) == [User()] * 3 + [User(other_owner="junction")]
    assert len(statements) == 1
