"""Dead letters: which are listed and in what order, what they hold, and throwing them away."""

from collections.abc import Iterator
from dataclasses import fields, replace
from datetime import UTC, datetime

import msgspec
import pytest
from sqlalchemy import Engine, text

from app.delivery import Delivery
from app.errors import TryLater
from app.sealing import Sealer
from tests.support import ENCRYPTION_KEY, delivery, rows
from workers.store.dead_letters import DeadLetter, add_dead_letter, delete_dead_letters, drop, listed
from workers.store.dead_letters import delivery as held
from workers.store.engine import transaction
from workers.store.ledger import OutcomeRow, settle

AT = datetime(2026, 3, 14, 12, tzinfo=UTC)


@pytest.fixture(autouse=True)
def empty(shared: Engine) -> Iterator[None]:
    """Nothing is dead."""
    yield
    with shared.begin() as connection:
        connection.execute(text("TRUNCATE headrace.dead_letters, headrace.deliveries"))


def die(
    engine: Engine, name: str, reason: str, aggregator: str = "junction", event_type: str | None = None
) -> Delivery:
    """A delivery that cannot be applied."""
    one = delivery(f'"{name}"'.encode(), name=name, aggregator=aggregator)
    one = msgspec.structs.replace(one, received_at=AT.timestamp())
    with transaction(engine) as connection:
        add_dead_letter(connection, one, event_type, reason)
    return one


def names(letters: list[DeadLetter]) -> list[str]:
    """Their deliveries."""
    return [letter.message_id for letter in letters]


def test_the_newest_come_first_and_no_more_than_wanted(shared: Engine) -> None:
    """Breaks if yesterday's letter is hidden behind those of last year, or a limit cuts off the new ones."""
    for number in range(4):
        die(shared, f"m{number}", "why")
    assert names(listed(shared)) == ["m3", "m2", "m1", "m0"]
    assert names(listed(shared, limit=2)) == ["m3", "m2"]


def test_letters_are_chosen_by_number_and_by_reason(shared: Engine) -> None:
    """Breaks if an operator's filter shows, replays or drops other letters than it says."""
    for number, reason in enumerate(("Status 422", "not a Junction event", "status 500")):
        die(shared, f"m{number}", reason)
    ids = {letter.message_id: letter.id for letter in listed(shared)}
    assert names(listed(shared, [ids["m0"], ids["m2"]])) == ["m2", "m0"]
    assert names(listed(shared, reason="status")) == ["m2", "m0"]
    assert names(listed(shared, reason="STATUS 4")) == ["m0"]
    assert names(listed(shared, [ids["m1"]], "status")) == []
    assert names(listed(shared, [10**12])) == []
    assert names(listed(shared, [])) == ["m2", "m1", "m0"]
    assert names(listed(shared, reason="")) == ["m2", "m1", "m0"]


@pytest.mark.parametrize("reason", ["user_id", "100%", "a\\b"])
def test_a_reason_is_looked_for_as_it_stands(shared: Engine, reason: str) -> None:
    """Breaks if `dead drop --reason user_id` throws away what is dead for another reason."""
    die(shared, "meant", f"no {reason} in it")
    die(shared, "other", "no userXid, 100 and ab in it")
    assert names(listed(shared, reason=reason)) == ["meant"]


def test_what_the_ledger_knows_is_told(shared: Engine) -> None:
    """Breaks if a letter does not say whose it is, what it is or how often it came, where that is known."""
    die(shared, "known", "why", event_type="daily.data.sleep.created")
    die(shared, "named", "why")
    die(shared, "alone", "why")
    die(shared, "known", "why", aggregator="terra")
    with transaction(shared) as connection:
        known = OutcomeRow("junction", "known", "x", "u1", AT, "dead", attempts=3)
        settle(connection, [known, OutcomeRow("junction", "named", "daily.data.body.created", "u2", AT, "dead")])
    found = {letter.name: (letter.event_type, letter.user_id, letter.attempts) for letter in listed(shared)}
    assert found == {
        ("junction", "known"): ("daily.data.sleep.created", "u1", 3),
        ("junction", "named"): ("daily.data.body.created", "u2", 1),
        ("junction", "alone"): (None, None, 1),
        ("terra", "known"): (None, None, 1),
    }


def test_a_letter_holds_what_came(shared: Engine) -> None:
    """Breaks if a letter cannot be opened again, has another clock or reference, or is told with its body."""
    sent = die(shared, "m1", "why", aggregator="terra")
    (letter,) = listed(shared)
    assert held(shared, letter) == sent
    assert Sealer([ENCRYPTION_KEY]).open(held(shared, letter).sealed, sent.key) == b'"m1"'
    assert (letter.received_at, letter.reason, letter.sealed_bytes) == (sent.received, "why", len(sent.sealed))
    assert letter.died_at >= letter.received_at
    assert not {field.name for field in fields(DeadLetter)} & {"sealed", "body", "payload"}


def test_a_letter_that_has_gone_meanwhile_is_not_there(shared: Engine) -> None:
    """Breaks if two operators at once meet an error that nobody can read."""
    die(shared, "m1", "why")
    (letter,) = listed(shared)
    assert drop(shared, [letter]) == 1
    with pytest.raises(TryLater):
        held(shared, letter)


def test_what_is_dropped_is_gone_and_nothing_else(shared: Engine) -> None:
    """Breaks if a drop takes the letter of another aggregator along, counts wrongly, or unsays the ledger."""
    for aggregator in ("junction", "terra"):
        die(shared, "m1", "why", aggregator)
    die(shared, "m2", "why")
    with transaction(shared) as connection:
        settle(connection, [OutcomeRow("junction", "m1", None, None, AT, "dead")])
    letters = [letter for letter in listed(shared) if letter.name == ("junction", "m1")]
    assert drop(shared, letters) == 1
    assert {letter.name for letter in listed(shared)} == {("terra", "m1"), ("junction", "m2")}
    assert drop(shared, letters) == 0
    assert drop(shared, []) == 0
    assert rows(shared, "SELECT outcome FROM health.deliveries") == [{"outcome": "dead"}]


def test_exhuming_tells_which_there_were(shared: Engine) -> None:
    """Breaks if what never was dead is taken for mended."""
    die(shared, "m1", "why")
    with transaction(shared) as connection:
        assert delete_dead_letters(connection, [("junction", "m1"), ("junction", "m9"), ("terra", "m1")]) == {
            ("junction", "m1")
        }


@pytest.mark.parametrize(
    ("name", "number"),
    [("fetch-12-0af", 12), ("fetch-1-", None), ("fetch--1-0a", None), ("msg_1", None), ("fetch-1-0a\n", None)],
)
def test_a_refused_request_names_its_backfill(name: str, number: int | None) -> None:
    """Breaks if a letter is taken for the answer to a request, or the other way round."""
    letter = DeadLetter(1, "junction", name, None, None, AT, AT, "", 1, 0)
    assert letter.backfill_id == number
    assert replace(letter, message_id="fetch-7-1").backfill_id == 7


def test_a_dead_letter_is_kept_once_and_whole(shared: Engine) -> None:
    """Breaks if a second attempt overwrites or doubles what was kept, or anything that opens it again is lost."""
    kept: Delivery = delivery(b"{half", name="msg_dead", aggregator="terra")
    for reason in ("the first reason", "the second"):
        with transaction(shared) as connection:
            add_dead_letter(connection, kept, None, reason)
    (row,) = rows(shared, "SELECT * FROM headrace.dead_letters WHERE message_id = 'msg_dead'")
    assert (row["aggregator"], row["reason"], row["event_type"]) == ("terra", "the first reason", None)
    assert bytes(row["sealed"]) == kept.sealed
    assert b"half" not in row["sealed"]
    assert (row["received_at"], row["ordering_ms"], row["reference"]) == (kept.received, None, None)
