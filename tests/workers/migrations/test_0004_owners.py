"""The migration 0004: each user belongs to the aggregator that named them first."""

import pytest
from sqlalchemy import Engine

from tests.support import rows
from tests.support.database import run
from workers.store.migrate import migrate

OWNERS = "SELECT user_id, aggregator FROM headrace.users WHERE user_id LIKE 'x%' OR user_id LIKE 'ref%' ORDER BY 1"
DELIVERY = """INSERT INTO headrace.deliveries (aggregator, message_id, user_id, received_at, applied_at, outcome)
VALUES ('{}', gen_random_uuid(), '{}', '2026-03-{}', now(), 'applied')"""
BACKFILL = """
INSERT INTO headrace.backfills (aggregator, user_id, provider, resource, asked_by, window_start, window_end, created_at)
VALUES ('{}', '{}', 'oura', 'hrv', 'notice', now(), now(), '2026-03-{}')"""
ARCHIVED = """INSERT INTO headrace.kept (aggregator, message_id, user_id, received_at, sealed)
VALUES ('{}', 'm', '{}', '2026-03-{}', '')"""


def add(engine: Engine, *users: str, **columns: str) -> None:
    names, values = "".join(f", {name}" for name in columns), "".join(f", {value}" for value in columns.values())
    run(engine, *(f"INSERT INTO headrace.users (user_id{names}) VALUES ('{user}'{values})" for user in users))


def owners(engine: Engine) -> dict[str, str | None]:
    return {row["user_id"]: row["aggregator"] for row in rows(engine, OWNERS)}


def test_the_users_of_an_old_database_have_owners(old: Engine) -> None:
    """Breaks if a user of a real deployment is left without an owner, although the ledger names one."""
    migrate(old)
    assert {row["aggregator"] for row in rows(old, "SELECT aggregator FROM headrace.users")} == {"junction", "terra"}


def test_the_first_to_name_a_user_is_the_owner(old: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """Breaks if evidence of one table is left out, the last aggregator wins, or a dispute is not reported."""
    add(old, "x-ledger", "x-archive", "x-backfill", "x-nothing", "x-disputed", "reference:member-1")
    add(old, "x-erased", erased_at="now()")
    run(
        old,
        *(DELIVERY.format(*of) for of in (("terra", "x-ledger", 10), ("terra", "x-disputed", 10))),
        *(DELIVERY.format(*of) for of in (("junction", "x-disputed", 11), ("junction", "x-erased", 10))),
        BACKFILL.format("terra", "x-backfill", 10),
        BACKFILL.format("junction", "x-disputed", 12),
        ARCHIVED.format("junction", "x-archive", 10),
    )
    migrate(old)
    assert owners(old) == {
        "reference:member-1": "terra",
        "x-archive": "junction",
        "x-backfill": "terra",
        "x-disputed": "terra",
        "x-erased": None,
        "x-ledger": "terra",
        "x-nothing": None,
    }
    states = rows(old, "SELECT user_id, status, error FROM headrace.backfills WHERE user_id LIKE 'x%' ORDER BY 1")
    assert [tuple(row.values()) for row in states] == [
        ("x-backfill", "pending", None),
        ("x-disputed", "cancelled", "the user belongs to terra"),
    ]
    (notice,) = (one.getMessage() for one in caplog.records if one.levelname == "WARNING")
    assert notice.startswith("1 users were named by more than one aggregator")
    assert "x-disputed (terra, also junction)" in notice


def test_the_ids_of_a_reconnected_user_have_one_owner(old: Engine) -> None:
    """Breaks if a user whom Terra moved before the update has two owners, so that no delivery reaches either."""
    add(old, "x-new")
    add(old, "x-old", succeeded_by="'x-new'")
    run(old, DELIVERY.format("junction", "x-old", 10), DELIVERY.format("terra", "x-new", 11))
    migrate(old)
    assert owners(old) == {"x-new": "junction", "x-old": "junction"}
