"""The totals of a run, and that they can fail."""

from functools import partial

import pytest
from sqlalchemy import Engine

from tests.support import START
from tests.support.cases import Failures
from tests.support.drill import EVENTS, IDS, LEDGER, ROWS, totals
from tests.support.patience import Clock, install
from workers.store.engine import transaction
from workers.store.ledger import OutcomeRow, settle
from workers.verify import totals as verify
from workers.verify.expected import NEVER, wanted


def test_totals_without_errors() -> None:
    """Breaks if a drill without errors fails."""
    found = totals()
    assert (found.holds, found.is_exact, found.lost, found.doubled, found.pending) == (True, True, 0, 0, [])
    assert found.outcomes == {"applied": 2, "duplicate": 1, "stale": 0, "ignored": 0, "dead": 1}
    assert (found.accepted, found.expected) == (4, 3)


def test_totals_with_an_error() -> None:
    """Breaks if the drill cannot fail: it would prove nothing."""
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


def test_unfinished_is_not_refuted() -> None:
    """Breaks if a demo on a busy machine prints NOT PROVEN, or a real loss is called unfinished."""
    failures = Failures()
    for case, (found, while_open, at_the_end) in {
        "all is there": (totals(), "unfinished", "proven"),
        "a row is missing": (totals(rows=ROWS[1:]), "unfinished", "different"),
        "a delivery has no outcome": (totals(ledger=LEDGER[1:], queued=None), "unfinished", "unfinished"),
        "a delivery is nowhere": (totals(ledger=LEDGER[1:]), "different", "different"),
        "a delivery is twice in the ledger": (totals(ledger=[*LEDGER, LEDGER[0]]), "different", "different"),
    }.items():
        with failures.of(case):
            assert (found.verdict(finished=False), found.verdict(finished=True)) == (while_open, at_the_end)
    assert failures == {}


def test_the_sum_is_exact_or_reported_as_wrong() -> None:
    """Breaks if an unknown outcome is ignored."""
    assert not totals(ledger=[*LEDGER[:-1], (IDS["d"], "vanished")]).is_exact
    assert not totals(ledger=[*LEDGER, LEDGER[0]]).is_exact
    assert totals(ledger=LEDGER[1:]).is_exact


def test_a_usable_event_must_not_become_a_dead_letter() -> None:
    """Breaks if usable events can become dead letters unnoticed."""
    ledger = [(IDS["a"], "dead"), *LEDGER[1:]]
    found = totals(ledger=ledger, dead_letters={IDS["a"], IDS["d"]})
    assert found.wrongly_dead == [IDS["a"]]
    assert not found.holds


def test_events_without_a_response_may_be_stored() -> None:
    """Breaks if a stored event whose response was lost counts as doubled."""
    key = ("workouts", "u", "w3")
    assert totals(rows=[*ROWS, (key, {})], optional={key}).holds


def test_the_provider_overrides_the_events() -> None:
    """Breaks if a record is compared with an event although the provider has a newer version."""
    key = ROWS[0][0]
    assert wanted({IDS["a"]: EVENTS["a"]}, {key: {"id": "w1", "newer": True}})[key] == (
        NEVER,
        [{"id": "w1", "newer": True}],
    )


def apply_one(engine: Engine, name: str) -> None:
    with transaction(engine) as connection:
        settle(connection, [OutcomeRow("junction", name, "test", "u", START, "applied")])


@pytest.mark.parametrize("arriving", [3, 2])
def test_the_proof_waits_while_outcomes_arrive(engine: Engine, monkeypatch: pytest.MonkeyPatch, arriving: int) -> None:
    """Breaks if the demo on a busy machine gives up while deliveries get outcomes, or waits on without progress."""
    accepted = {IDS[name]: EVENTS[name] for name in "abc"}
    clock = Clock(80, [partial(apply_one, engine, name) for name in list(accepted)[:arriving]])
    install(monkeypatch, clock, verify)

    found = verify.prove(engine, accepted, {}, idle=90)

    assert found.pending == list(accepted)[arriving:]
    assert clock.sleeps <= 5
