"""The drill's own parts: what is struck, what is sent, and that its account can fail."""

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Event as Flag
from typing import Any

import fakeredis
import psutil
import pytest

from app.delivery import pack
from tests.support import START, delivery, heartrate, message_id, workout
from workers import drill
from workers.drill import (
    GROUPS,
    KINDS,
    UNUSABLE,
    Account,
    Answer,
    Made,
    Report,
    Strike,
    Striker,
    is_usable,
    longest_answer,
    plan,
    settle_up,
    silence,
    trespasses,
    waiting,
)
from workers.proof import NEVER, wanted
from workers.simulator import World
from workers.simulator.faults import Fault
from workers.stack import Stack

SLEEPER = (sys.executable, "-c", "import time; time.sleep(60)")
PARENT = (sys.executable, "-c", f"import subprocess; subprocess.Popen({list(SLEEPER)!r}).wait()")


def test_the_same_seed_strikes_the_same() -> None:
    """Breaks if a drill that failed cannot be repeated, or a longer one begins otherwise."""
    assert plan(3, 120) == plan(3, 120)
    assert plan(3, 240)[: len(plan(3, 120))] == plan(3, 120)
    assert plan(4, 120) != plan(3, 120)


@pytest.mark.parametrize(("seconds", "calm"), [(15.0, 4.5), (120.0, 20.0)])
def test_the_end_is_calm(seconds: float, calm: float) -> None:
    """Breaks if something is struck when the account is about to be made."""
    assert all(0 < one.at < seconds - calm for seed in range(20) for one in plan(seed, seconds))


def test_everything_is_struck_in_every_way() -> None:
    """Breaks if a group or a way of striking is left out."""
    made = {(one.group, one.kind) for one in plan(1, 3600)}
    assert made == {(group, kind) for group in GROUPS for kind in KINDS}


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    """A stack whose supervisor are we."""
    (tmp_path / "data").mkdir()
    return Stack(tmp_path, os.getpid())


@pytest.fixture
def process() -> Iterator[psutil.Process]:
    """A child of ours, which has a child."""
    with subprocess.Popen(PARENT) as started:
        found = psutil.Process(started.pid)
        while not found.children():
            time.sleep(0.01)
        yield found
        for one in (*found.children(), found) if found.is_running() else ():
            one.resume()
            one.kill()


def strike(stack: Stack, pid: int, group: str = "live", **how: Any) -> Made:
    """What came of one strike on a group that has this process."""
    (stack.data / "stack.json").write_text(json.dumps({"processes": {group: [pid]}}))
    one = Strike(**({"at": 0.0, "kind": "kill", "group": group, "choice": 0.0, "seconds": 0.2} | how))
    striker = Striker(stack, [one], lambda _: None)
    striker.run(Flag())
    return striker.made[0]


def test_a_process_of_the_stack_is_killed(stack: Stack, process: psutil.Process) -> None:
    """Breaks if the drill only says that it strikes."""
    child = process.children()[0]
    assert strike(stack, process.pid).pid == process.pid
    assert process.wait(5) == -9
    child.kill()


def test_half_of_the_strikes_meet_a_child(stack: Stack, process: psutil.Process) -> None:
    """Breaks if the processes that answer requests, which are children of the web server, are never struck."""
    child = process.children()[0]
    made = strike(stack, process.pid, "web", choice=0.7)
    assert (made.pid, made.whom) == (child.pid, "web, a child of it")
    assert process.wait(5) == 0


def test_nothing_stays_frozen(stack: Stack, process: psutil.Process) -> None:
    """Breaks if a freeze does not freeze, or whoever ends the drill leaves a process that hears nothing."""
    states, stop = [], Flag()

    def told(_: Made) -> None:
        time.sleep(0.05)
        states.append(process.status())
        stop.set()

    (stack.data / "stack.json").write_text(json.dumps({"processes": {"live": [process.pid]}}))
    Striker(stack, [Strike(0.0, "freeze", "live", 0.0, 60.0)], told).run(stop)
    assert states == [psutil.STATUS_STOPPED]
    assert process.status() != psutil.STATUS_STOPPED


def test_a_stranger_is_not_struck(stack: Stack, process: psutil.Process) -> None:
    """Breaks if a number that stack.json still has, and somebody else has by now, is struck."""
    grandchild = process.children()[0]
    made = strike(stack, grandchild.pid)
    assert made.pid is None
    assert str(made).endswith("live: nobody there")
    assert grandchild.is_running()


def test_a_group_that_is_not_ours_is_not_struck(stack: Stack, process: psutil.Process) -> None:
    """Breaks if a drill beside the operator's own broker fails or strikes something else."""
    (stack.data / "stack.json").write_text(json.dumps({"processes": {"live": [process.pid]}}))
    striker = Striker(stack, [Strike(0.0, "kill", "broker", 0.0, 1.0)], lambda _: None)
    striker.run(Flag())
    assert striker.hits == []
    assert process.is_running()


def test_what_is_sent_exercises_every_column() -> None:
    """Breaks if no dead letter, no ignored event or not everybody's history is among what is sent."""
    world = World(1, 1, datetime(2026, 3, 14, 12, tzinfo=UTC), 2)
    sent = list(drill.events(world, 1, 2.0, 100.0))
    types = [one.get("event_type", "") for one in sent if isinstance(one, dict)]
    assert [one for one in sent if not is_usable(one)]
    assert "daily.data.mood_ring.created" in types
    announced = [one for one in types if one.startswith("historical.data.")]
    resources = {resource.name for one in world.members[0].connections for resource in drill.supplied(one)}
    assert {f"historical.data.{name}.created" for name in resources} <= set(announced)
    assert [one for one in types if one.startswith("daily.data.") and one.endswith(".updated")]


EVENTS = {"a": workout("u", "w1"), "b": heartrate("u", {0: 60}), "c": workout("u", "w2"), "d": UNUSABLE[0]}
IDS = {name: message_id(START, number) for number, name in enumerate(EVENTS)}
ACCEPTED = {IDS[name]: event for name, event in EVENTS.items()}
LEDGER = [(IDS["a"], "applied"), (IDS["b"], "applied"), (IDS["c"], "duplicate"), (IDS["d"], "dead")]
NEWEST = wanted({name: event for name, event in ACCEPTED.items() if is_usable(event)}, {})
ROWS = [(key, content) for key, (_, (content,)) in NEWEST.items()]


def account(**changes: Any) -> Account:
    """The account of a drill that went well but for the changes."""
    given: dict[str, Any] = {"ledger": LEDGER, "letters": {IDS["d"]}, "queued": set(), "newest": NEWEST, "rows": ROWS}
    return settle_up(ACCEPTED, **given | changes)


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


def made(group: str, kind: str, began: float, seconds: float = 0.0) -> Made:
    """A strike that met somebody."""
    return Made(Strike(0.0, kind, group, 0.0, seconds), began, 1, group)  # type: ignore[arg-type]


def test_an_endpoint_that_is_frozen_is_not_slow() -> None:
    """Breaks if what the drill itself does to the endpoint counts as slowness of it, or slowness does not count."""
    answers = [Answer(0, 1, 202), Answer(10, 16, 202), Answer(20, 27, 503), Answer(30, 90, 0)]
    assert longest_answer(answers, []) == (7, 7)
    assert longest_answer(answers, [made("web", "freeze", 21, 3), made("broker", "freeze", 11, 3)]) == (6, 7)
    assert longest_answer(answers, [made("web", "freeze", 26, 3)]) == (6, 7)
    assert longest_answer(answers, [made("web", "freeze", 20, 4), made("web", "freeze", 21, 5)]) == (6, 7)
    assert longest_answer(answers[2:], [made("web", "freeze", 20, 4), made("web", "freeze", 21, 5)]) == (1, 7)
    assert longest_answer(answers, [made("web", "kill", 21)]) == (7, 7)


@pytest.mark.parametrize(
    ("fault", "seconds"),
    [
        (Fault("429", retry_after=1), 1.0),
        (Fault("503", retry_after=2, as_date=True), 1.5),
        (Fault("429"), drill.SHORTEST_SILENCE),
    ],
)
def test_a_refusal_asks_for_silence(fault: Fault, seconds: float) -> None:
    """Breaks if requests that should not have been sent are looked for at the wrong time."""
    assert silence(fault, 100.5) == seconds


def test_a_request_within_a_silence_is_seen() -> None:
    """Breaks if the count of such requests is 0 whatever was asked, or what a strike explains is counted as ours."""
    asked = [99.0, 100.0, 101.0, 103.0]
    assert trespasses([(100.0, 102.0)], asked, []) == (1, 0)
    assert trespasses([(100.0, 102.0)], asked, [made("web", "kill", 100)]) == (1, 0)
    assert trespasses([(100.0, 102.0)], asked, [made("backfill", "kill", 100)]) == (0, 1)
    assert trespasses([(100.0, 102.0)], asked, [made("backfill", "freeze", 90, 5)]) == (1, 0)


def test_what_waits_in_the_broker_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks if a delivery that waits, or that a worker holds, is called lost."""
    server = fakeredis.FakeRedis()
    monkeypatch.setattr(drill, "redis_client", lambda _: server)
    names = [message_id(START, number) for number in range(3)]

    def message(name: str) -> dict[str, Any]:
        packed = pack([delivery(workout("u"), name=name)])
        return {"body": base64.b64encode(json.dumps([[packed], {}, {}]).encode()).decode(), "properties": {}}

    server.lpush("live", json.dumps(message(names[0])), b"no message")
    server.lpush("live:taken", json.dumps(message(names[1])))
    server.hset("unacked", "tag", json.dumps([message(names[2]), "live", "live"]))
    assert waiting("redis://somewhere") == set(names)
    assert waiting("amqp://somewhere") is None


def report(**changes: Any) -> Report:
    """The report of a drill that was passed, but for the changes."""
    return replace(
        Report(
            seed=1,
            account=account(),
            strikes=[made("web", "kill", 1.0)],
            statuses={202: 5, 503: 1},
            longest_answer=0.5,
            longest_with_freezes=6.0,
            never_taken=0,
            settled_after=30.0,
            backfills={"complete": 1},
            provider_requests=10,
            provider_refused=1,
            trespasses=0,
            excused=0,
        ),
        **changes,
    )


def test_a_drill_is_passed_or_not() -> None:
    """Breaks if a drill ends with 0 whatever it found."""
    assert report().holds
    assert report().strikes_by()["web"] == {"kill": 1, "freeze": 0, "restart": 0}
    assert not report(account=account(ledger=LEDGER[1:])).holds
    assert not report(longest_answer=5.1).holds
    assert not report(settled_after=None).holds
    assert not report(never_taken=1).holds
