"""User merges: all data of the former id moves to the new one, in the newest version."""

from datetime import timedelta

import pytest
from sqlalchemy import Engine, text
from sqlalchemy import event as events

from app.catalogue import catalogue
from app.config.settings import Settings
from tests.support import START, apply, delivery, event, heartrate, message_id, rows, workout
from tests.support.database import run
from workers.store import replaced, retractions
from workers.store.engine import transaction
from workers.store.user_merges import merge_user

DAY = timedelta(days=1)


def reconnect(engine: Engine, old: str = "old", new: str = "new") -> bool:
    with transaction(engine) as connection:
        return merge_user(connection, old, new)


def owners(engine: Engine) -> set[str]:
    """The user ids in every table but `users`, the ledger, which keeps the ids of arrival, and the change feed."""
    tables = rows(
        engine,
        "SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a "
        "ON a.attrelid = c.oid AND a.attname = 'user_id' WHERE n.nspname = 'headrace' AND c.relkind IN ('r', 'p') "
        "AND NOT c.relispartition AND c.relname NOT IN ('users', 'deliveries', 'outbox', 'changes')",
    )
    names = [f'SELECT DISTINCT user_id FROM headrace."{row["relname"]}"' for row in tables]
    return {row["user_id"] for row in rows(engine, " UNION ".join(names))} - {None}


def test_all_data_moves(engine: Engine, settings: Settings) -> None:
    """Breaks if a table is left out, so that data stays under the former id."""
    connected = event("provider.connection.created", "old", {"source": {"slug": "garmin"}})
    announced = event("historical.data.sleep.created", "old", {"provider": "garmin", "is_final": True})
    apply(engine, settings, *map(delivery, (workout("old"), heartrate("old", {0: 60, 1: 61}), connected, announced)))
    assert reconnect(engine)
    assert owners(engine) == {"new"}
    assert [row["user_id"] for row in rows(engine, "SELECT user_id FROM health.workouts")] == ["new"]
    assert [row["value"] for row in rows(engine, "SELECT value FROM health.heartrate ORDER BY ts")] == [60, 61]
    assert rows(engine, "SELECT user_id, client_user_id FROM health.users") == [
        {"user_id": "new", "client_user_id": "member-1"}
    ]
    assert rows(engine, "SELECT status FROM health.backfills") == [{"status": "cancelled"}]


def test_retractions_move(engine: Engine, settings: Settings) -> None:
    """Breaks if a reconnection shows a retracted record again, or fails where both ids have a retraction."""
    apply(
        engine, settings, *map(delivery, (workout("old"), workout("old", "w2"), workout("new"), workout("new", "w3")))
    )
    resource = catalogue()["workouts"]
    with transaction(engine) as connection:
        for user, name in (("old", "w1"), ("old", "w2"), ("new", "w1")):
            assert retractions.retract(connection, resource, user, name)
    assert reconnect(engine)
    assert rows(engine, "SELECT id FROM health.workouts") == [{"id": "w3"}]
    assert owners(engine) == {"new"}


def test_dead_letters_move(engine: Engine, settings: Settings) -> None:
    """Breaks if an erasure of the new id leaves sealed data that arrived under the old one."""
    apply(engine, settings, delivery(workout("old")))
    columns = "aggregator, message_id, received_at, reason, sealed, item, user_id"
    values = "'junction', 'msg_1', now(), 'no id', '', 'digest', 'old'"
    run(engine, f"INSERT INTO headrace.dead_letters ({columns}) VALUES ({values})")
    assert reconnect(engine)
    assert owners(engine) == {"new"}


@pytest.mark.parametrize("newest", ["old", "new"])
def test_where_both_have_a_row_the_newest_wins(engine: Engine, settings: Settings, newest: str) -> None:
    """Breaks if data that arrived under the new id first is lost, duplicated, or replaced by older data."""
    for user in ("old", "new"):
        at = START + DAY if user == newest else START
        changes = {"distance": 9.0 if user == newest else 1.0, "updated_at": at.isoformat()}
        apply(engine, settings, delivery(workout(user, **changes), at))
        apply(engine, settings, delivery(heartrate(user, {0: 90 if user == newest else 10}), at))
    apply(engine, settings, delivery(workout("old", "w2")), delivery(heartrate("old", {5: 55})))
    assert reconnect(engine)
    found = rows(engine, "SELECT user_id, id, distance FROM health.workouts ORDER BY id")
    assert [tuple(row.values()) for row in found] == [("new", "w1", 9.0), ("new", "w2", 8000.5)]
    samples = rows(engine, "SELECT user_id, value FROM health.heartrate ORDER BY ts")
    assert [(row["user_id"], row["value"]) for row in samples] == [("new", 90), ("new", 55)]
    assert owners(engine) == {"new"}


def test_many_samples_are_moved_in_parts(engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if one statement moves all samples of a series, or a sample between two parts is lost."""
    monkeypatch.setattr(replaced, "MAX_ROWS", 2)
    apply(engine, settings, delivery(heartrate("new", {3: 33}), START))
    apply(engine, settings, delivery(heartrate("old", {minute: minute + 40 for minute in range(7)}), START + DAY))
    statements = list[str]()
    events.listen(engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    assert reconnect(engine)
    samples = rows(engine, "SELECT user_id, value FROM health.heartrate ORDER BY ts")
    assert [(row["user_id"], row["value"]) for row in samples] == [("new", minute + 40) for minute in range(7)]
    assert sum("INSERT INTO headrace.samples" in one for one in statements) == 4


def test_a_repeated_merge_changes_nothing(engine: Engine, settings: Settings) -> None:
    """Breaks if a repeated or circular notice moves data again."""
    apply(engine, settings, delivery(workout("old")))
    pairs = [("old", "new"), ("old", "new"), ("new", "old"), ("new", "new")]
    assert [reconnect(engine, *pair) for pair in pairs] == [True, False, False, False]
    assert owners(engine) == {"new"}


@pytest.mark.parametrize("order", [(("a", "b"), ("b", "c")), (("b", "c"), ("a", "b"))])
def test_a_chain_of_ids_ends_at_the_last(
    engine: Engine, settings: Settings, order: tuple[tuple[str, str], ...]
) -> None:
    """Breaks if a chain of ids ends in its middle, in either order of its notices."""
    for user in "abc":
        apply(engine, settings, delivery(workout(user, f"of {user}")))
    assert [reconnect(engine, *pair) for pair in order] == [True, True]
    assert owners(engine) == {"c"}
    found = rows(engine, "SELECT user_id, merged_into FROM headrace.users ORDER BY 1")
    assert [tuple(row.values()) for row in found] == [("a", "c"), ("b", "c"), ("c", None)]


@pytest.mark.parametrize("erased", ["old", "new"])
def test_erased_users_are_not_merged(engine: Engine, settings: Settings, erased: str) -> None:
    """Breaks if a reconnection restores an erased user's data, or erases another user."""
    apply(engine, settings, delivery(workout("old")), delivery(workout("new")))
    with engine.begin() as connection:
        connection.execute(text("UPDATE headrace.users SET erased_at = now() WHERE user_id = :who"), {"who": erased})
    assert not reconnect(engine)
    assert owners(engine) == {"old", "new"}


def test_the_newest_client_user_id_stays(engine: Engine, settings: Settings) -> None:
    """Breaks if the former id's client_user_id replaces a newer one."""
    for user, name, at in (("old", "former", START), ("new", "present", START + DAY)):
        body = workout(user) | {"client_user_id": name}
        apply(engine, settings, delivery(body, at, name=message_id(at)))
    assert reconnect(engine)
    assert rows(engine, "SELECT client_user_id FROM health.users") == [{"client_user_id": "present"}]
