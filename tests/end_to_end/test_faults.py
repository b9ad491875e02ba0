"""A provider that refuses or breaks three requests in ten: what is stored, what it costs, whether its word is kept."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from math import ceil, floor
from random import Random
from threading import Lock
from typing import Any

import pytest
from sqlalchemy import Engine

from app.catalogue import catalogue
from app.config.settings import Settings
from app.delivery import pack
from tests.support import delivery, rows
from workers.aggregators import junction
from workers.backfill.fetcher import Fetcher
from workers.fetch.client import AggregatorClient
from workers.fetch.http import Client
from workers.fetch.rate_limits import Throttle
from workers.ingest.apply import Applier
from workers.simulator import World, events
from workers.simulator.faults import Fault, Faults
from workers.simulator.server import API_KEY, Simulator
from workers.store.backfills import due
from workers.store.engine import make_writer
from workers.verify.expected import history, stored

END = datetime(2026, 3, 14, 12, tzinfo=UTC)
WORKERS = 3
PATIENCE_SECONDS = 150
# A refusal without Retry-After names no time; the shortest that anybody may then keep silent is half a second.
SHORTEST_SILENCE = 0.5
# What may pass between a refusal and the shared key that silences the other workers. Who has looked for the key before
# it is there still sends its request.
TOLERANCE = 0.25

# Twelve of forty are three in ten. One is only slow, and carries its page all the same.
FAULTS = (
    *(Fault(kind, retry_after=1) for kind in ("429", "503")),
    *(Fault(kind, retry_after=2, as_date=True) for kind in ("429", "503")),
    *(Fault(kind) for kind in ("429", "503", "500", "500", "truncated", "truncated", "expired_cursor")),
    Fault("slow", seconds=0.5),
)
DECK = 40


@dataclass(frozen=True)
class Silence:
    """The time in which the provider wants to be asked nothing, in seconds since 1970."""

    begins: float
    ends: float


@dataclass
class Faulty:
    """Deals a simulator's faults in place of its dice: of every forty requests each of FAULTS meets one.

    A fault that cannot meet a request, as an expired cursor one without a cursor, waits for the next that it can.
    """

    faults: Faults
    dice: Random
    dealt: list[tuple[float, Fault]] = field(default_factory=list)
    deck: list[Fault | None] = field(default_factory=list)
    waiting: list[Fault] = field(default_factory=list)
    lock: Any = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self.pick_one = self.faults.pick

    def pick(self, *request: Any, **more: Any) -> Fault | None:
        """The fault that this request meets, if any."""
        with self.lock:
            self.waiting += [card for card in [self._draw()] if card]
            self.faults.clear()
            for card in self.waiting:
                self.faults.put(card)
            found = self.pick_one(*request, **more)
            if found:
                self.waiting.remove(found)
                self.dealt.append((time.time(), found))
            return found

    def _draw(self) -> Fault | None:
        if not self.deck:
            self.deck = [*FAULTS, *[None] * (DECK - len(FAULTS))]
            self.dice.shuffle(self.deck)
        return self.deck.pop()

    @property
    def kinds(self) -> list[Fault]:
        """What was dealt so far."""
        return [fault for _, fault in self.dealt]

    @property
    def pauses(self) -> list[Silence]:
        """When nobody may ask, by the refusals that were dealt."""
        return [Silence(at, at + _seconds(fault, at)) for at, fault in self.dealt if fault.kind in ("429", "503")]

    @property
    def without_page(self) -> int:
        """How many requests were in vain, whoever sent them."""
        return sum(fault.kind != "slow" for fault in self.kinds)


def _seconds(fault: Fault, at: float) -> float:
    """How long a refusal asks for; a date has whole seconds only."""
    if fault.retry_after is None:
        return SHORTEST_SILENCE
    return floor(at + ceil(fault.retry_after)) - at if fault.as_date else fault.retry_after


def trespasses(pauses: Iterable[Silence], asked: Iterable[float]) -> list[tuple[float, Silence]]:
    """The requests that began within a silence, later than TOLERANCE after its beginning."""
    pauses = list(pauses)
    return [(at, one) for at in asked for one in pauses if one.begins + TOLERANCE < at < one.ends]


@pytest.mark.parametrize(
    ("seconds", "count"), [(-0.1, 0), (0.0, 0), (0.2, 0), (0.3, 1), (0.9, 1), (1.0, 0), (1.1, 1), (1.9, 1), (2.1, 0)]
)
def test_a_trespass_is_seen(seconds: float, count: int) -> None:
    """Breaks if the test below could not fail: it looks for requests by this."""
    pauses = [Silence(100.0, 101.0), Silence(100.8, 102.0)]
    assert len(trespasses(pauses, [99.0, 100.0 + seconds, 103.0])) == count


@pytest.mark.parametrize(
    ("fault", "ends"),
    [
        (Fault("429", retry_after=1), 101.6),
        (Fault("503", retry_after=2, as_date=True), 102.0),
        (Fault("429"), 101.1),
        (Fault("500"), None),
        (Fault("truncated"), None),
    ],
)
def test_a_refusal_asks_for_silence(fault: Fault, ends: float | None) -> None:
    """Breaks if the test below looks in the wrong places."""
    found = [one.ends for one in Faulty(Faults(), Random(1), [(100.6, fault)]).pauses]
    assert found == ([] if ends is None else [pytest.approx(ends)])


def announce(engine: Engine, settings: Settings, world: World) -> int:
    """Takes the notices of everybody's history; how many histories that are."""
    notices = [
        delivery(events.historical(world, user, connection, resource))
        for user in world.members
        for connection in user.connections
        for resource in events.supplied(connection)
    ]
    return len(Applier(engine, settings).apply(pack(notices)).backfills)


def work(settings: Settings, seed: int) -> None:
    """What a worker does: goes on with whatever is due, until nothing is open any more."""
    engine, dice, deadline = make_writer(settings), Random(seed), time.monotonic() + PATIENCE_SECONDS
    is_open = "SELECT 1 FROM headrace.backfills WHERE status IN ('pending', 'running') LIMIT 1"
    with closing(Client(*junction.connect(settings))) as client:
        fetcher = Fetcher(engine, settings, [AggregatorClient("junction", client, Throttle(settings))])
        while rows(engine, is_open):
            if time.monotonic() > deadline:
                raise TimeoutError
            if found := due(engine):
                fetcher.run(dice.choice(found))
            else:
                time.sleep(0.02)
    engine.dispose()


def pull(engine: Engine, settings: Settings, world: World) -> None:
    """Announces everybody's history and has all of it fetched by several workers at once."""
    before = Counter(row["status"] for row in rows(engine, "SELECT status FROM health.backfills"))
    count = announce(engine, settings, world)
    with ThreadPoolExecutor(WORKERS) as pool:
        for done in [pool.submit(work, settings, seed) for seed in range(WORKERS)]:
            done.result()
    after = Counter(row["status"] for row in rows(engine, "SELECT status FROM health.backfills"))
    assert after - before == {"complete": count}


def check_stored(engine: Engine, truth: Mapping[Any, Any]) -> None:
    """The views hold what the provider has, each record and sample once."""
    with engine.connect() as connection:
        found = list(stored(connection))
    assert [key for key, count in Counter(key for key, _ in found).items() if count > 1] == []
    held = dict(found)
    assert held.keys() == truth.keys()
    assert [key for key in truth if held[key] != truth[key]] == []


def moments(requests: Iterable[Mapping[str, Any]]) -> Iterator[float]:
    """When requests began, as the provider has it."""
    return (datetime.fromisoformat(request["time"]).timestamp() for request in requests)


def test_three_faults_in_ten_lose_nothing(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    """Breaks if faults lose or double a record, cost far more than themselves, or if a refusal is not respected.

    A faulty answer costs a request in any case, so the ideal is what the same histories take without faults (measured
    here, by pulling them once more), and one for every answer that carried no page. The rest is pages that were asked
    for again, because their slice was begun again after a cursor had expired.
    """
    with Simulator(1, 2, until=END, page_size=100) as simulator:
        faulty = Faulty(simulator.faults, Random(7))
        wanted = replace(
            settings, junction_base_url=simulator.url, junction_api_key=API_KEY, request_rate="1000000/second"
        )
        truth = history(simulator.world)
        with monkeypatch.context() as patch:
            patch.setattr(simulator.faults, "pick", faulty.pick)
            pull(engine, wanted, simulator.world)
        simulator.faults.clear()
        requests = simulator.requests
        check_stored(engine, truth)
        pull(engine, wanted, simulator.world)
        check_stored(engine, truth)
        faultless = len(simulator.requests) - len(requests)
    ideal = faultless + faulty.without_page
    figures = f"{len(requests)} requests, {len(faulty.dealt)} of them faulty; {faultless} without faults, {ideal} ideal"
    record_property("requests", figures)
    print(f"\n{figures}: {len(requests) / ideal:.2f} times the ideal, {len(requests) / faultless:.2f} without faults")
    assert [fault for fault in FAULTS if fault not in faulty.kinds] == []
    assert 0.25 < len(faulty.dealt) / len(requests) < 0.35
    statuses = Counter(request["status"] for request in requests)
    assert statuses[429] + statuses[503] == len(faulty.pauses)
    assert len(requests) <= 1.3 * ideal, figures
    assert trespasses(faulty.pauses, moments(requests)) == []


@dataclass
class ShortLived:
    """Lets every fourth request find its cursor expired, as where a slice takes longer than its cursors live."""

    faults: Faults
    asked: int = 0

    def __post_init__(self) -> None:
        self.pick_one = self.faults.pick

    def pick(self, *request: Any, **more: Any) -> Fault | None:
        """The fault that this request meets, if any."""
        self.faults.clear()
        if self.asked >= 3:
            self.faults.put(Fault("expired_cursor"))
        found = self.pick_one(*request, **more)
        self.asked = 0 if found else self.asked + 1
        return found


def test_cursors_that_live_for_three_pages_are_enough(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a history fails because a slice has more pages than a cursor lives for, where shorter ones would do."""
    with Simulator(1, 2, until=END, page_size=100) as simulator:
        world, user = simulator.world, simulator.world.members[0]
        one = events.historical(world, user, user.connections[0], catalogue()["heartrate"])
        wanted = replace(settings, junction_base_url=simulator.url, junction_api_key=API_KEY)
        monkeypatch.setattr(simulator.faults, "pick", ShortLived(simulator.faults).pick)
        Applier(engine, wanted).apply(pack([delivery(one)]))
        work(wanted, 1)
    assert [row["status"] for row in rows(engine, "SELECT status FROM health.backfills")] == ["complete"]
