"""The account, and that it can fail."""

from tests.support.cases import Failures
from tests.support.drill import EVENTS, IDS, LEDGER, ROWS, totals
from workers.verify.expected import NEVER, wanted


def test_an_account_that_holds() -> None:
    """Breaks if a drill in which all is well fails."""
    found = totals()
    assert (found.holds, found.is_exact, found.lost, found.doubled, found.pending) == (True, True, 0, 0, [])
    assert found.outcomes == {"applied": 2, "duplicate": 1, "stale": 0, "ignored": 0, "dead": 1}
    assert (found.accepted, found.expected) == (4, 3)


def test_an_account_that_does_not_hold() -> None:
    """Breaks if the drill cannot fail: then it would prove nothing."""
    failures = Failures()
    for case, (changes, lost, doubled, pending) in {
        "a delivery that is nowhere": ({"ledger": LEDGER[1:]}, 1, 0, 1),
        "a delivery that is in the broker": ({"ledger": LEDGER[1:], "queued": {IDS["a"]}}, 0, 0, 1),
        "a delivery that cannot be looked for": ({"ledger": LEDGER[1:], "queued": None}, 0, 0, 1),
        "a dead one without a letter": ({"dead_letters": set()}, 1, 0, 0),
        "a row that is missing": ({"rows": ROWS[1:]}, 1, 0, 0),
        "a row that is not the newest": ({"rows": [(ROWS[0][0], {"id": "w1"}), *ROWS[1:]]}, 1, 0, 0),
        "a row twice": ({"rows": [*ROWS, ROWS[0]]}, 0, 1, 0),
        "a row that nothing explains": ({"rows": [*ROWS, (("workouts", "u", "w3"), {})]}, 0, 1, 0),
        "a delivery twice in the ledger": ({"ledger": [*LEDGER, LEDGER[0]]}, 0, 1, 0),
    }.items():
        with failures.of(case):
            found = totals(**changes)
            assert (found.lost, found.doubled, len(found.pending)) == (lost, doubled, pending)
            assert not found.holds
    assert failures == {}


def test_the_sum_is_exact_or_said_not_to_be() -> None:
    """Breaks if an outcome that is none of the account's is passed over."""
    assert not totals(ledger=[*LEDGER[:-1], (IDS["d"], "vanished")]).is_exact
    assert not totals(ledger=[*LEDGER, LEDGER[0]]).is_exact
    assert totals(ledger=LEDGER[1:]).is_exact


def test_a_good_event_must_not_die() -> None:
    """Breaks if events that are well may be set aside unnoticed."""
    ledger = [(IDS["a"], "dead"), *LEDGER[1:]]
    found = totals(ledger=ledger, dead_letters={IDS["a"], IDS["d"]})
    assert found.wrongly_dead == [IDS["a"]]
    assert not found.holds


def test_what_was_sent_and_never_answered_may_be_there() -> None:
    """Breaks if an event is called doubled that was stored, and whose answer alone was lost."""
    key = ("workouts", "u", "w3")
    assert totals(rows=[*ROWS, (key, {})], explained={key}).holds


def test_what_the_provider_has_goes_before_what_was_sent() -> None:
    """Breaks if a record is compared with an event that something newer has overtaken."""
    key = ROWS[0][0]
    assert wanted({IDS["a"]: EVENTS["a"]}, {key: {"id": "w1", "newer": True}})[key] == (
        NEVER,
        [{"id": "w1", "newer": True}],
    )
