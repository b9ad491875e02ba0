"""The account, and that it can fail."""

from typing import Any

import pytest

from tests.support import START, heartrate, message_id, workout
from workers.verify.drill.load import UNUSABLE, is_usable
from workers.verify.drill.totals import Totals, reconcile_totals
from workers.verify.expected import NEVER, wanted

EVENTS = {"a": workout("u", "w1"), "b": heartrate("u", {0: 60}), "c": workout("u", "w2"), "d": UNUSABLE[0]}
IDS = {name: message_id(START, number) for number, name in enumerate(EVENTS)}
ACCEPTED = {IDS[name]: event for name, event in EVENTS.items()}
LEDGER = [(IDS["a"], "applied"), (IDS["b"], "applied"), (IDS["c"], "duplicate"), (IDS["d"], "dead")]
NEWEST = wanted({name: event for name, event in ACCEPTED.items() if is_usable(event)}, {})
ROWS = [(key, content) for key, (_, (content,)) in NEWEST.items()]


def account(**changes: Any) -> Totals:
    """The account of a drill that went well but for the changes."""
    given: dict[str, Any] = {"ledger": LEDGER, "letters": {IDS["d"]}, "queued": set(), "newest": NEWEST, "rows": ROWS}
    return reconcile_totals(ACCEPTED, **given | changes)


def test_an_account_that_holds() -> None:
    """Breaks if a drill in which all is well fails."""
    found = account()
    assert (found.holds, found.is_exact, found.lost, found.doubled, found.pending) == (True, True, 0, 0, [])
    assert found.outcomes == {"applied": 2, "duplicate": 1, "stale": 0, "ignored": 0, "dead": 1}
    assert (found.accepted, found.expected) == (4, 3)


@pytest.mark.parametrize(
    ("changes", "lost", "doubled", "pending"),
    [
        ({"ledger": LEDGER[1:]}, 1, 0, 1),
        ({"ledger": LEDGER[1:], "queued": {IDS["a"]}}, 0, 0, 1),
        ({"ledger": LEDGER[1:], "queued": None}, 0, 0, 1),
        ({"letters": set()}, 1, 0, 0),
        ({"rows": ROWS[1:]}, 1, 0, 0),
        ({"rows": [(ROWS[0][0], {"id": "w1"}), *ROWS[1:]]}, 1, 0, 0),
        ({"rows": [*ROWS, ROWS[0]]}, 0, 1, 0),
        ({"rows": [*ROWS, (("workouts", "u", "w3"), {})]}, 0, 1, 0),
        ({"ledger": [*LEDGER, LEDGER[0]]}, 0, 1, 0),
    ],
    ids=[
        "a delivery that is nowhere",
        "a delivery that is in the broker",
        "a delivery that cannot be looked for",
        "a dead one without a letter",
        "a row that is missing",
        "a row that is not the newest",
        "a row twice",
        "a row that nothing explains",
        "a delivery twice in the ledger",
    ],
)
def test_an_account_that_does_not_hold(changes: dict[str, Any], lost: int, doubled: int, pending: int) -> None:
    """Breaks if the drill cannot fail: then it would prove nothing."""
    found = account(**changes)
    assert (found.lost, found.doubled, len(found.pending)) == (lost, doubled, pending)
    assert not found.holds


def test_the_sum_is_exact_or_said_not_to_be() -> None:
    """Breaks if an outcome that is none of the account's is passed over."""
    assert not account(ledger=[*LEDGER[:-1], (IDS["d"], "vanished")]).is_exact
    assert not account(ledger=[*LEDGER, LEDGER[0]]).is_exact
    assert account(ledger=LEDGER[1:]).is_exact


def test_a_good_event_must_not_die() -> None:
    """Breaks if events that are well may be set aside unnoticed."""
    ledger = [(IDS["a"], "dead"), *LEDGER[1:]]
    found = account(ledger=ledger, letters={IDS["a"], IDS["d"]})
    assert found.wrongly_dead == [IDS["a"]]
    assert not found.holds


def test_what_was_sent_and_never_answered_may_be_there() -> None:
    """Breaks if an event is called doubled that was stored, and whose answer alone was lost."""
    key = ("workouts", "u", "w3")
    assert account(rows=[*ROWS, (key, {})], explained={key}).holds


def test_what_the_provider_has_goes_before_what_was_sent() -> None:
    """Breaks if a record is compared with an event that something newer has overtaken."""
    key = ROWS[0][0]
    assert wanted({IDS["a"]: EVENTS["a"]}, {key: {"id": "w1", "newer": True}})[key] == (
        NEVER,
        [{"id": "w1", "newer": True}],
    )
