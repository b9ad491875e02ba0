"""Dead letters: listing, reading and dropping."""

from collections.abc import Iterator
from dataclasses import fields, replace
from datetime import UTC, datetime

import pytest
from sqlalchemy import Engine, text

from app.delivery import Delivery
from app.errors import TryLater
from tests.support import delivery, rows
from tests.support.deliveries import SEALER, received
from workers.store.dead_letters import DeadLetter, RefusedItem, add_dead_letter, add_items, drop, listed, replace_items
from workers.store.dead_letters import delivery as held
from workers.store.engine import transaction
from workers.store.ledger import OutcomeRow, settle

AT = datetime(2026, 3, 14, 12, tzinfo=UTC)


@pytest.fixture(autouse=True)
def empty(shared: Engine) -> Iterator[None]:
    yield
    with shared.begin() as connection:
        connection.execute(text("TRUNCATE headrace.dead_letters, headrace.deliveries"))


def add(
    engine: Engine, name: str, reason: str, aggregator: str = "junction", event_type: str | None = None
) -> Delivery:
    """Stores a dead letter, and returns its delivery."""
    one = delivery(f'"{name}"'.encode(), name=name, aggregator=aggregator)
    one = received(one, AT)
    with transaction(engine) as connection:
        add_dead_letter(connection, one, reason, event_type)
    return one


def names(dead_letters: list[DeadLetter]) -> list[str]:
    return [entry.message_id for entry in dead_letters]


def key(entry: DeadLetter) -> tuple[str, str]:
    return entry.aggregator, entry.message_id


def test_the_newest_come_first_within_the_limit(shared: Engine) -> None:
    """Breaks if older dead letters come before new ones, or the limit cuts off the new ones."""
    for number in range(4):
        add(shared, f"m{number}", "why")
    assert names(listed(shared)) == ["m3", "m2", "m1", "m0"]
    assert names(listed(shared, limit=2)) == ["m3", "m2"]


def test_filters_by_id_and_by_reason(shared: Engine) -> None:
    """Breaks if a filter shows, replays or drops other dead letters."""
    for number, reason in enumerate(("Status 422", "not a Junction event", "status 500")):
        add(shared, f"m{number}", reason)
    ids = {entry.message_id: entry.id for entry in listed(shared)}
    assert names(listed(shared, [ids["m0"], ids["m2"]])) == ["m2", "m0"]
    assert names(listed(shared, reason="status")) == ["m2", "m0"]
    assert names(listed(shared, reason="STATUS 4")) == ["m0"]
    assert names(listed(shared, [ids["m1"]], "status")) == []
    assert names(listed(shared, [10**12])) == []
    assert names(listed(shared, [])) == ["m2", "m1", "m0"]
    assert names(listed(shared, reason="")) == ["m2", "m1", "m0"]


@pytest.mark.parametrize("reason", ["user_id", "100%", "a\\b"])
def test_a_reason_is_not_a_pattern(shared: Engine, reason: str) -> None:
    """Breaks if `dead drop --reason user_id` deletes dead letters with another reason."""
    add(shared, "meant", f"no {reason} in it")
    add(shared, "other", "no userXid, 100 and ab in it")
    assert names(listed(shared, reason=reason)) == ["meant"]


def test_the_list_includes_ledger_data(shared: Engine) -> None:
    """Breaks if the user, the event type or the number of attempts is not shown although it is known."""
    add(shared, "known", "why", event_type="daily.data.sleep.created")
    add(shared, "named", "why")
    add(shared, "alone", "why")
    add(shared, "known", "why", aggregator="terra")
    with transaction(shared) as connection:
        known = OutcomeRow("junction", "known", "x", "u1", AT, "dead", attempts=3)
        settle(connection, [known, OutcomeRow("junction", "named", "daily.data.body.created", "u2", AT, "dead")])
    found = {key(entry): (entry.event_type, entry.user_id, entry.attempts) for entry in listed(shared)}
    assert found == {
        ("junction", "known"): ("daily.data.sleep.created", "u1", 3),
        ("junction", "named"): ("daily.data.body.created", "u2", 1),
        ("junction", "alone"): (None, None, 1),
        ("terra", "known"): (None, None, 1),
    }


def test_a_dead_letter_holds_its_delivery(shared: Engine) -> None:
    """Breaks if a dead letter cannot be opened, has another clock or reference, or is listed with its body."""
    sent = add(shared, "m1", "why", aggregator="terra")
    (entry,) = listed(shared)
    assert held(shared, entry) == sent
    assert held(shared, entry).open(SEALER) == b'"m1"'
    assert (entry.received_at, entry.reason, entry.sealed_bytes) == (sent.received, "why", len(sent.sealed))
    assert entry.died_at >= entry.received_at
    assert not {field.name for field in fields(DeadLetter)} & {"sealed", "body", "payload"}


def test_a_dropped_dead_letter_cannot_be_read(shared: Engine) -> None:
    """Breaks if concurrent operators get an unexpected error."""
    add(shared, "m1", "why")
    (entry,) = listed(shared)
    assert drop(shared, [entry]) == 1
    with pytest.raises(TryLater):
        held(shared, entry)


def test_a_drop_deletes_only_the_given(shared: Engine) -> None:
    """Breaks if a drop deletes the dead letter of another aggregator, counts wrongly, or changes the ledger."""
    for aggregator in ("junction", "terra"):
        add(shared, "m1", "why", aggregator)
    add(shared, "m2", "why")
    with transaction(shared) as connection:
        settle(connection, [OutcomeRow("junction", "m1", None, None, AT, "dead")])
    dead_letters = [entry for entry in listed(shared) if key(entry) == ("junction", "m1")]
    assert drop(shared, dead_letters) == 1
    assert {key(entry) for entry in listed(shared)} == {("terra", "m1"), ("junction", "m2")}
    assert drop(shared, dead_letters) == 0
    assert drop(shared, []) == 0
    assert rows(shared, "SELECT outcome FROM health.deliveries") == [{"outcome": "dead"}]


def refused(one: Delivery, item: str) -> RefusedItem:
    return RefusedItem(one, "why", "daily.data.heartrate.created", "u1", item)


def test_a_replay_keeps_the_items_that_it_refuses_again(shared: Engine) -> None:
    """Breaks if a resolved item stays in the list, one that is refused again is lost, or the ledger still complains."""
    deliveries = [add(shared, name, "whole") for name in ("m1", "m2")]
    keys = [("junction", "m1"), ("junction", "m2")]
    with transaction(shared) as connection:
        settle(connection, [OutcomeRow(*one, None, "u1", AT, "applied", error="2 refused") for one in keys])
        add_items(connection, [refused(one, item) for one in deliveries for item in ("a", "b")])
        add_items(connection, [refused(deliveries[0], "a")])
    assert len(listed(shared)) == 4  # `settle` has deleted those of the whole deliveries
    with transaction(shared) as connection:
        replace_items(connection, keys, [refused(deliveries[0], "b")])
    assert [(entry.message_id, entry.item, entry.user_id) for entry in listed(shared)] == [("m1", "b", "u1")]
    errors = rows(shared, "SELECT message_id, error FROM health.deliveries ORDER BY 1")
    assert [row["error"] for row in errors] == ["2 refused", "the refused items were applied by a replay"]


@pytest.mark.parametrize(
    ("name", "number"),
    [("fetch-12-0af", 12), ("fetch-1-", None), ("fetch--1-0a", None), ("msg_1", None), ("fetch-1-0a\n", None)],
)
def test_a_rejected_request_names_its_backfill(name: str, number: int | None) -> None:
    """Breaks if a delivery is treated as the response to a request, or the other way round."""
    entry = DeadLetter(1, "junction", name, None, None, AT, AT, "", 1, 0)
    assert entry.backfill_id == number
    assert replace(entry, message_id="fetch-7-1").backfill_id == 7


def test_a_dead_letter_is_stored_once_and_complete(shared: Engine) -> None:
    """Breaks if a second attempt overwrites or duplicates the dead letter, or a part needed to open it is lost."""
    kept: Delivery = delivery(b"{half", name="msg_dead", aggregator="terra")
    for reason in ("the first reason", "the second"):
        with transaction(shared) as connection:
            add_dead_letter(connection, kept, reason)
    (row,) = rows(shared, "SELECT * FROM headrace.dead_letters WHERE message_id = 'msg_dead'")
    assert (row["aggregator"], row["reason"], row["event_type"]) == ("terra", "the first reason", None)
    assert bytes(row["sealed"]) == kept.sealed
    assert b"half" not in row["sealed"]
    assert (row["received_at"], row["ordering_ms"], row["reference"]) == (kept.received, None, None)
