"""A provider that fails three requests in ten: stored data, number of requests, and respect for Retry-After."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
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
from workers.simulator import World, events, first_events
from workers.simulator.faults import LIMITED, Fault, Faults
from workers.simulator.server import API_KEY, Simulator
from workers.store.backfills import due
from workers.store.engine import make_writer
from workers.verify.drill.provider import Pause, pause_of
from workers.verify.expected import history, stored

END = datetime(2026, 3, 14, 12, tzinfo=UTC)
WORKERS = 3
TIMEOUT_SECONDS = 150
# The time between a 429 or 503 and the shared key that pauses the other workers: a worker that checks for the key
# before it is set still sends its request.
TOLERANCE = 0.25

# 12 of 40 requests are three in ten. One of the 12 is only slow and still returns its page.
FAULTS = (
    *(Fault(kind, retry_after=1) for kind in ("429", "503")),
    *(Fault(kind, retry_after=2, as_date=True) for kind in ("429", "503")),
    *(Fault(kind) for kind in ("429", "503", "500", "500", "truncated", "truncated", "expired_cursor")),
    Fault("slow", seconds=0.5),
)
DECK = 40


@dataclass
class FaultDeck:
    """Replaces a simulator's random faults by a shuffled deck: of every 40 requests, each of FAULTS hits one.

    A fault that cannot apply to a request (an expired cursor, if the request has none) waits for the next that fits.
    Such a fault is drawn first: if it is drawn late, no other request with a cursor may follow.
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
            self.deck.sort(key=lambda card: card is not None and card.kind in LIMITED)
        return self.deck.pop()

    @property
    def kinds(self) -> list[Fault]:
        """The faults so far."""
        return [fault for _, fault in self.dealt]

    @property
    def pauses(self) -> list[Pause]:
        """The pauses that the faults so far requested."""
        return [(at, at + pause_of(fault, at)) for at, fault in self.dealt if fault.kind in ("429", "503")]

    @property
    def without_page(self) -> int:
        """The number of requests, of all workers, that returned no page."""
        return sum(fault.kind != "slow" for fault in self.kinds)


def violations(pauses: Sequence[Pause], asked: Iterable[float]) -> list[tuple[float, Pause]]:
    """The requests that began within a pause, later than TOLERANCE after its beginning."""
    return [(at, (begins, ends)) for at in asked for begins, ends in pauses if begins + TOLERANCE < at < ends]


@pytest.mark.parametrize(
    ("seconds", "count"), [(-0.1, 0), (0.0, 0), (0.2, 0), (0.3, 1), (0.9, 1), (1.0, 0), (1.1, 1), (1.9, 1), (2.1, 0)]
)
def test_a_request_during_a_pause_is_detected(seconds: float, count: int) -> None:
    """Breaks if `violations`, which the test below uses, misses a request during a pause."""
    pauses = [(100.0, 101.0), (100.8, 102.0)]
    assert len(violations(pauses, [99.0, 100.0 + seconds, 103.0])) == count


def announce(engine: Engine, settings: Settings, world: World) -> int:
    """Applies the notices of the history of all users; returns the number of backfills."""
    notices = [delivery(one) for one in first_events(world) if one["event_type"].startswith("historical.")]
    return len(Applier(engine, settings).apply(pack(notices)).backfills)


def work(settings: Settings, seed: int) -> None:
    """Acts as a worker: runs due backfills until all are finished."""
    engine, dice, deadline = make_writer(settings), Random(seed), time.monotonic() + TIMEOUT_SECONDS
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
    """Announces the history of all users and fetches it with WORKERS concurrent workers."""
    before = Counter(row["status"] for row in rows(engine, "SELECT status FROM health.backfills"))
    count = announce(engine, settings, world)
    with ThreadPoolExecutor(WORKERS) as pool:
        for done in [pool.submit(work, settings, seed) for seed in range(WORKERS)]:
            done.result()
    after = Counter(row["status"] for row in rows(engine, "SELECT status FROM health.backfills"))
    assert after - before == {"complete": count}


def check_stored(engine: Engine, expected_history: Mapping[Any, Any]) -> None:
    """Checks that the views contain the data of the provider, each record and sample once."""
    with engine.connect() as connection:
        found = list(stored(connection))
    assert [key for key, count in Counter(key for key, _ in found).items() if count > 1] == []
    held = dict(found)
    assert held.keys() == expected_history.keys()
    assert [key for key in expected_history if held[key] != expected_history[key]] == []


def start_times(requests: Iterable[Mapping[str, Any]]) -> Iterator[float]:
    """The Unix timestamps at which requests began, from the log of the provider."""
    return (datetime.fromisoformat(request["time"]).timestamp() for request in requests)


def test_three_faults_in_ten_lose_nothing(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    """Breaks if faults lose or duplicate a record, cost over 30 % more requests than the ideal, or a pause is violated.

    Each faulty response costs a request in any case. The ideal is therefore the number of requests of the same
    backfills without faults (measured here by fetching them again), plus one for each response without a page. The
    rest are pages that were requested again because an expired cursor restarted their date range.
    """
    with Simulator(1, 2, until=END, page_size=250) as simulator:
        fault_deck = FaultDeck(simulator.faults, Random(7))
        wanted = replace(
            settings, junction_base_url=simulator.url, junction_api_key=API_KEY, request_rate="1000000/second"
        )
        expected_history = history(simulator.world)
        with monkeypatch.context() as patch:
            patch.setattr(simulator.faults, "pick", fault_deck.pick)
            pull(engine, wanted, simulator.world)
        simulator.faults.clear()
        requests = simulator.requests
        check_stored(engine, expected_history)
        pull(engine, wanted, simulator.world)
        check_stored(engine, expected_history)
        faultless = len(simulator.requests) - len(requests)
    ideal = faultless + fault_deck.without_page
    figures = (
        f"{len(requests)} requests, {len(fault_deck.dealt)} of them faulty; {faultless} without faults, {ideal} ideal"
    )
    record_property("requests", figures)
    print(f"\n{figures}: {len(requests) / ideal:.2f} times the ideal, {len(requests) / faultless:.2f} without faults")
    assert [fault for fault in FAULTS if fault not in fault_deck.kinds] == []
    assert 0.25 < len(fault_deck.dealt) / len(requests) < 0.35
    statuses = Counter(request["status"] for request in requests)
    assert statuses[429] + statuses[503] == len(fault_deck.pauses)
    assert len(requests) <= 1.3 * ideal, figures
    assert violations(fault_deck.pauses, start_times(requests)) == []


@dataclass
class ShortLivedCursors:
    """Expires the cursor of every fourth request, as if a date range took longer than the lifetime of its cursors."""

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


def test_cursors_that_expire_after_three_pages_suffice(
    engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks if a backfill fails because cursors expire within a date range, although shorter ranges would succeed."""
    with Simulator(1, 2, until=END, page_size=100) as simulator:
        connection = simulator.world.members[0].connections[0]
        one = events.historical(simulator.world, connection, catalogue()["heartrate"])
        wanted = replace(settings, junction_base_url=simulator.url, junction_api_key=API_KEY)
        monkeypatch.setattr(simulator.faults, "pick", ShortLivedCursors(simulator.faults).pick)
        Applier(engine, wanted).apply(pack([delivery(one)]))
        work(wanted, 1)
    assert [row["status"] for row in rows(engine, "SELECT status FROM health.backfills")] == ["complete"]
