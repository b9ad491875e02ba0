"""The drill: a complete stack under load while its processes are struck at random; and the account of what it took."""

import base64
import contextlib
import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import chain
from math import ceil, floor
from random import Random
from threading import Event as Flag
from typing import Any, Literal, cast, get_args

import msgspec
import psutil

from app.catalogue import catalogue
from app.config import load
from app.delivery import unpack
from app.errors import DeadLetter, Misconfigured, TryLater
from app.queue import is_amqp
from workers.broker import redis_client
from workers.proof import Key, Newest, expected, history, stored, wanted
from workers.simulator import Simulator, World, first_events
from workers.simulator.events import Event, daily, every_type, supplied
from workers.simulator.faults import Fault, Faults
from workers.simulator.sender import NO_ANSWER, Sender
from workers.stack import Stack
from workers.store.engine import make_engine, transaction
from workers.store.ledger import Outcome

GROUPS = ("web", "live", "backfill", "maintenance", "beat", "flower", "broker", "postgres")
ROUND = (*GROUPS, "web", "live", "broker", "postgres")  # in any order, before anybody has another turn
HAVE_CHILDREN = ("web", "postgres")
POLITE = {"postgres": signal.SIGINT}  # at SIGTERM it waits until the last client has gone, which none of ours does
PAUSE, FREEZE = (1.5, 4.5), (1.0, 6.0)  # seconds between strikes, and of a freeze: from, to
CALM_SECONDS, CALM_SHARE = 20.0, 0.3  # how much of the time, at its end, nothing is struck
PEOPLE_PER_MINUTE, MOST_PEOPLE = 1.5, 6
DAYS, PAGE_SIZE = 5, 250  # of everybody's history, and samples on a page of it
PROVIDER_SLOWNESS = timedelta(minutes=30)  # the simulated present, which must not move while it is compared
DISORDER = {"duplicates": 0.1, "reordering": 0.1, "late": 0.02}
WAITS = (0.05, 0.5, 1.0, *[2.0] * 60)  # a sender that hardly gives up: Svix goes on for more than a day
CONNECTIONS = 16
UPDATED, BROKEN, FOREIGN = 0.4, 0.005, 0.01  # shares of the live events
UNUSABLE: tuple[Any, ...] = ({}, {"event_type": "daily.data.workouts.created"}, msgspec.Raw(b'{"event_type": "daily.'))
UNKNOWN: Event = {"event_type": "daily.data.mood_ring.created", "user_id": "nobody", "data": {"colour": "green"}}
LONGEST_ANSWER_SECONDS = 5.0
LEASE_SECONDS, MARGIN_SECONDS = 60, 60  # what a killed fetch leaves behind, and for the rest of the work
TOLERANCE_SECONDS = 0.5  # within which every worker knows of a silence
SHORTEST_SILENCE = 0.5  # of a refusal that names no time
FAULTS = (
    *(Fault(kind, share=0.004, retry_after=1) for kind in ("429", "503")),
    *(Fault(kind, share=0.004, retry_after=2, as_date=True) for kind in ("429", "503")),
    *(Fault(kind, share=0.004) for kind in ("429", "503")),
    *(Fault(kind, share=0.01) for kind in ("500", "truncated")),
    Fault("expired_cursor", share=0.05),
    Fault("short_page", share=0.05),
    Fault("slow", share=0.01, seconds=0.5),
)
StrikeKind = Literal["kill", "freeze", "restart"]
KINDS: tuple[StrikeKind, ...] = get_args(StrikeKind)
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(frozen=True)
class Strike:
    """What is done to whom, `at` so many seconds after the beginning. `choice` picks one of the group's processes."""

    at: float
    kind: StrikeKind
    group: str
    choice: float
    seconds: float  # of a freeze


def plan(seed: int, seconds: float) -> list[Strike]:
    """The strikes of a drill of so many seconds. The same seed makes the same; a longer drill makes more."""
    dice, end = Random(seed), seconds - min(CALM_SECONDS, CALM_SHARE * seconds)  # noqa: S311 - repeatable on purpose
    strikes: list[Strike] = []
    turns: list[str] = []
    at = dice.uniform(*PAUSE)
    while at < end:
        turns = turns or dice.sample(ROUND, len(ROUND))
        strikes.append(Strike(at, dice.choice(KINDS), turns.pop(), dice.random(), dice.uniform(*FREEZE)))
        at += dice.uniform(*PAUSE)
    return strikes


@dataclass(frozen=True)
class Made:
    """A strike that was made, or missed because there was nobody: unix seconds, whom it met and how long it lasted."""

    strike: Strike
    began: float
    pid: int | None
    whom: str

    @property
    def ended(self) -> float:
        """When whoever was struck could go on, or be started again."""
        return self.began + (self.strike.seconds if self.strike.kind == "freeze" else 0.0)

    def __str__(self) -> str:
        """One line of the log."""
        seconds = f" for {self.strike.seconds:.1f} s" if self.strike.kind == "freeze" else ""
        whom = self.whom if self.pid is None else f"{self.whom} (pid {self.pid})"
        return f"{self.strike.at:6.1f} s  {self.strike.kind}{seconds}: {whom}"


class Striker:
    """Makes the strikes of a plan on the processes of one stack and on no others."""

    def __init__(self, stack: Stack, strikes: Sequence[Strike], tell: Callable[[Made], None]) -> None:
        self.made: list[Made] = []
        self._stack, self._strikes, self._tell = stack, strikes, tell
        self._frozen: list[tuple[float, psutil.Process]] = []

    @property
    def hits(self) -> list[Made]:
        """Without those that met nobody."""
        return [one for one in self.made if one.pid is not None]

    def run(self, stop: Flag) -> None:
        """Makes them all, each at its time. Whatever happens, nothing stays frozen."""
        began = time.monotonic()
        try:
            for strike in self._strikes:
                if not self._wait(began + strike.at, stop):
                    return
                self._make(strike)
            self._wait(max((until for until, _ in self._frozen), default=0.0), stop)
        finally:
            self._thaw(float("inf"))

    def _wait(self, until: float, stop: Flag) -> bool:
        while (now := time.monotonic()) < until:
            self._thaw(now)
            if stop.wait(min(0.05, until - now)):
                return False
        return True

    def _thaw(self, now: float) -> None:
        for until, process in list(self._frozen):
            if until <= now:
                self._frozen.remove((until, process))
                if process not in (other for _, other in self._frozen):  # it may be frozen twice
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.resume()

    def _make(self, strike: Strike) -> None:
        made = Made(strike, time.time(), None, f"{strike.group}: nobody there")
        with contextlib.suppress(psutil.NoSuchProcess):  # it died by itself, in this very moment
            if victim := self._victim(strike):
                process, whom = victim
                self._do(strike, process, whom == strike.group)
                made = Made(strike, time.time(), process.pid, whom)
        self.made.append(made)
        self._tell(made)

    def _do(self, strike: Strike, process: psutil.Process, is_main: bool) -> None:  # noqa: FBT001
        # psutil compares the time at which it began: a number that was given to somebody else is not struck.
        if strike.kind == "kill":
            process.kill()
        elif strike.kind == "restart":
            process.send_signal(POLITE.get(strike.group, signal.SIGTERM) if is_main else signal.SIGTERM)
        else:
            process.suspend()
            self._frozen.append((time.monotonic() + strike.seconds, process))

    def _victim(self, strike: Strike) -> tuple[psutil.Process, str] | None:
        """A process of the group, or half of the time, where it has any, a child of one."""
        mains = self._mains(strike.group)
        if strike.group in HAVE_CHILDREN and strike.choice >= 0.5:
            children = [child for main in mains for child in main.children(recursive=True)]
            if children:
                return children[int((strike.choice * 2 - 1) * len(children))], f"{strike.group}, a child of it"
        return (mains[int(strike.choice * len(mains))], strike.group) if mains else None

    def _mains(self, group: str) -> list[psutil.Process]:
        found = []
        for pid in self._stack.says()["processes"].get(group, []):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                # stack.json may be a moment old, and the number somebody else's by now.
                if process.ppid() == self._stack.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


def events(world: World, seed: int, seconds: float, rate: float) -> Iterator[Event]:
    """Live events for so many seconds; among them, once, connections, notices of history and one of every kind.

    Each is made when it is wanted: what was made before a revision must not be sent as if it came after it.
    """
    dice = Random(seed)  # noqa: S311 - repeatable on purpose
    count = sum(len(supplied(one)) + 1 for user in world.members for one in user.connections)
    announced = (count + len(catalogue().event_names)) / (0.6 * seconds * rate)
    once = chain(UNUSABLE, [UNKNOWN], first_events(world), every_type(world))
    until = time.monotonic() + seconds
    sources = [
        (user, connection, resource)
        for user in world.members
        for connection in user.connections
        for resource in supplied(connection)
        if world.has(connection, resource)
    ]
    while time.monotonic() < until:
        special = next(once, None) if dice.random() < announced else None
        yield _live(world, dice, *dice.choice(sources)) if special is None else special
    yield from once


def _live(world: World, dice: Random, user: Any, connection: Any, resource: Any) -> Event:
    share = dice.random()
    if share < BROKEN:
        return cast("Event", dice.choice(UNUSABLE))
    if share < BROKEN + FOREIGN:
        return UNKNOWN
    at = world.start + dice.random() * (world.until - world.start)
    known = world.moment(world.latest(connection, resource, at)) >= world.start
    return daily(world, user, connection, resource, at=at if known else None, updated=dice.random() < UPDATED)


def is_usable(event: Event) -> bool:
    """Whether a delivery of it may not become a dead letter."""
    return not any(event is one for one in UNUSABLE)


@dataclass(frozen=True)
class Answer:
    """How one request was answered: unix seconds, and 0 for no answer."""

    began: float
    ended: float
    status: int


class Watcher(Sender):
    """A sender that remembers how each of its requests was answered, and which events nobody took."""

    def __init__(self, url: str, secret: str, seed: int, stop: Flag) -> None:
        super().__init__(url, secret, CONNECTIONS, **DISORDER, seed=seed, waits=WAITS, stop=stop, remember=True)
        self.answers: list[Answer] = []
        self.given_up: dict[str, Event] = {}

    def send(self, event: Event, created_at: datetime | None = None, message_id: str | None = None) -> int:
        """As any sender."""
        status = super().send(event, created_at, message_id)
        if message_id and not 200 <= status < 300:
            self.given_up[message_id] = event
        return status

    def _attempt(self, name: str, event: Event, body: bytes) -> int:
        began = time.time()
        status = super()._attempt(name, event, body)
        self.answers.append(Answer(began, time.time(), status))
        return status


def longest_answer(answers: Iterable[Answer], hits: Sequence[Made]) -> tuple[float, float]:
    """The seconds of the longest answer: without the time for which the endpoint itself was frozen, and with it."""
    frozen = [(one.began, one.ended) for one in hits if one.strike.group == "web" and one.strike.kind == "freeze"]
    alone, whole = 0.0, 0.0
    for answer in answers:
        if answer.status != NO_ANSWER:
            seconds = answer.ended - answer.began
            held, reached = 0.0, answer.began
            for began, ended in frozen:  # of which two may overlap
                until = min(answer.ended, ended)
                held += max(0.0, until - max(reached, began))
                reached = max(reached, until)
            alone, whole = max(alone, seconds - held), max(whole, seconds)
    return alone, whole


class Silences:
    """When the provider wants to be asked nothing: from each of its refusals, for as long as that asks for."""

    def __init__(self, faults: Faults) -> None:
        self.found: list[tuple[float, float]] = []
        self._pick = faults.pick
        faults.pick = self._noting  # type: ignore[method-assign]

    def _noting(self, path: str, possible: Collection[Any] = ()) -> Fault | None:
        fault, now = self._pick(path, possible), time.time()
        if fault and fault.kind in ("429", "503"):
            self.found.append((now, now + silence(fault, now)))
        return fault


def silence(fault: Fault, now: float) -> float:
    """The seconds that a refusal asks for; a date has whole seconds only."""
    if fault.retry_after is None:
        return SHORTEST_SILENCE
    return floor(now + ceil(fault.retry_after)) - now if fault.as_date else fault.retry_after


def trespasses(
    silences: Iterable[tuple[float, float]], asked: Iterable[float], hits: Sequence[Made]
) -> tuple[int, int]:
    """Requests within a silence; and those that a strike explains: on who was told of it, or on what tells all."""
    struck = [one for one in hits if one.strike.group in ("backfill", "maintenance", "broker")]
    found, excused = 0, 0
    asked = sorted(asked)
    for begins, ends in silences:
        within = sum(begins + TOLERANCE_SECONDS < at < ends for at in asked)
        if any(one.began - TOLERANCE_SECONDS < ends and begins < one.ended + TOLERANCE_SECONDS for one in struck):
            excused += within
        else:
            found += within
    return found, excused


class Books:
    """What is stored, as its readers find it. Every method raises TryLater while the database is away."""

    def __init__(self, database_url: str, people: Collection[str]) -> None:
        self._engine = make_engine(load({"DATABASE_URL": database_url}), "headrace-drill")
        self._people = frozenset(people)
        self._began = datetime.now(UTC) - timedelta(minutes=1)  # clocks differ

    def need_empty(self) -> None:
        """Raises Misconfigured if there is already something of these people."""
        with transaction(self._engine) as connection:
            known = set(connection.exec_driver_sql("SELECT user_id FROM health.users").scalars())
        if known & self._people:
            raise Misconfigured("DATABASE_URL: this drill was made there before; choose another --seed or database")

    def settled(self) -> list[tuple[str, str]]:
        """The ledger's rows since the beginning: message id and outcome."""
        query = "SELECT message_id, outcome::text FROM health.deliveries WHERE received_at >= %(began)s"
        with transaction(self._engine) as connection:
            return [(row[0], row[1]) for row in connection.exec_driver_sql(query, {"began": self._began})]

    def backfills(self) -> Counter[str]:
        """How many of these people's backfills are how far, those of single streams among them."""
        query = "SELECT status::text, count(*) FROM headrace.backfills WHERE user_id = ANY(%(people)s) GROUP BY status"
        with transaction(self._engine) as connection:
            found = connection.exec_driver_sql(query, {"people": list(self._people)})
            return Counter({row[0]: row[1] for row in found})

    def letters(self) -> set[str]:
        """The message ids of the dead letters."""
        with transaction(self._engine) as connection:
            return set(connection.exec_driver_sql("SELECT message_id FROM headrace.dead_letters").scalars())

    def rows(self) -> list[tuple[Key, Any]]:
        """Every row about these people in every view. The second part of a key is whose it is."""
        with transaction(self._engine) as connection:
            return [(key, content) for key, content in stored(connection) if key[1] in self._people]

    def close(self) -> None:
        """Ends the connections."""
        self._engine.dispose()


def waiting(broker_url: str) -> set[str] | None:
    """The ids of the deliveries in the broker, None if it cannot be looked into."""
    if is_amqp(broker_url):
        return None
    with redis_client(broker_url) as client:
        lists = [one for name in ("live", "live:taken") for one in cast("list[bytes]", client.lrange(name, 0, -1))]
        held = [json.loads(one)[0] for one in cast("list[bytes]", client.hvals("unacked"))]
    found: set[str] = set()
    for raw in (*lists, *held):
        with contextlib.suppress(ValueError, KeyError, TypeError, DeadLetter):  # another task than ours to apply
            message = raw if isinstance(raw, dict) else json.loads(raw)
            (packed,), *_ = json.loads(base64.b64decode(message["body"]))
            found |= {delivery.message_id for delivery in unpack(packed)}
    return found


@dataclass(frozen=True)
class Account:
    """accepted = applied + duplicate + stale + ignored + dead + pending, and what is lost or doubled."""

    accepted: int  # distinct delivery ids that were answered 202
    outcomes: dict[str, int]  # of those, by the ledger
    pending: list[str]  # of those, which have no outcome
    nowhere: list[str]  # and of these, which are not in the broker either; or dead, and without a letter
    twice: list[str]  # ids with a second row in the ledger
    wrongly_dead: list[str]  # dead letters of events that are well
    expected: int  # records and samples in what was accepted and in what the provider has
    missing: list[Key] = field(repr=False)
    outdated: list[Key] = field(repr=False)
    surplus: list[Key] = field(repr=False)  # rows that nothing explains, a second one of the same key among them

    @property
    def lost(self) -> int:
        """Deliveries that are nowhere, and rows that are not there or not in their newest version."""
        return len(self.nowhere) + len(self.missing) + len(self.outdated)

    @property
    def doubled(self) -> int:
        """Deliveries that are in the ledger twice, and rows that should not be there."""
        return len(self.twice) + len(self.surplus)

    @property
    def is_exact(self) -> bool:
        """Whether every accepted delivery has one outcome, or is pending."""
        return self.accepted == sum(self.outcomes.values()) + len(self.pending)

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong."""
        return self.is_exact and not (self.lost or self.doubled or self.pending or self.wrongly_dead)


def settle_up(
    accepted: Mapping[str, Event],
    *,
    ledger: Iterable[tuple[str, str]],
    letters: Collection[str],
    queued: Collection[str] | None,
    newest: Newest,
    rows: Iterable[tuple[Key, Any]],
    explained: Collection[Key] = (),
) -> Account:
    """Holds what was accepted against the ledger, and what the views must hold against what they do.

    `queued` are the ids in the broker, or None if that cannot be said. `explained` are keys of events that were sent
    and not answered: they may be there.
    """
    entries = [(name, outcome) for name, outcome in ledger if name in accepted]
    times = Counter(name for name, _ in entries)
    dead = {name for name, outcome in entries if outcome == "dead"}
    pending = sorted(accepted.keys() - times.keys())
    found, outdated, surplus = set[Key](), [], []
    for key, content in rows:
        if key in found or (key not in newest and key not in explained):
            surplus.append(key)
        elif key in newest and content not in newest[key][1]:
            outdated.append(key)
        found.add(key)
    return Account(
        accepted=len(accepted),
        outcomes={each: sum(outcome == each for _, outcome in entries) for each in OUTCOMES},
        pending=pending,
        nowhere=[one for one in pending if queued is not None and one not in queued] + sorted(dead - set(letters)),
        twice=[name for name, count in times.items() if count > 1],
        wrongly_dead=sorted(name for name in dead if is_usable(accepted[name])),
        expected=len(newest),
        missing=[key for key in newest if key not in found],
        outdated=outdated,
        surplus=surplus,
    )


@dataclass(frozen=True)
class Options:
    """What a drill is asked to be."""

    seconds: float
    seed: int
    rate: float
    visibility_seconds: int


@dataclass(frozen=True)
class Moment:
    """How far a drill is."""

    phase: Literal["load", "settling", "counting"]
    seconds: float  # since the beginning of the phase
    left: float  # at most
    acked: int
    settled: int
    applied: int  # of the settled
    strikes: int
    backfills_open: int


@dataclass(frozen=True)
class Report:
    """What a drill found."""

    seed: int
    account: Account
    strikes: list[Made]
    statuses: dict[int, int]  # answers of the endpoint; 0: no answer
    longest_answer: float  # without the time for which the drill itself froze the endpoint
    longest_with_freezes: float
    never_taken: int
    settled_after: float | None  # seconds after the last strike; None if not everything did
    backfills: dict[str, int]
    provider_requests: int
    provider_refused: int
    trespasses: int  # requests within a silence
    excused: int  # as above, but whoever should have known was struck

    @property
    def holds(self) -> bool:
        """Whether the drill was passed."""
        in_time = self.longest_answer <= LONGEST_ANSWER_SECONDS and self.settled_after is not None
        return self.account.holds and in_time and not self.never_taken

    def strikes_by(self) -> dict[str, dict[str, int]]:
        """How often each group was struck how."""
        counts = Counter((one.strike.group, one.strike.kind) for one in self.strikes if one.pid is not None)
        return {group: {kind: counts[group, kind] for kind in KINDS} for group in GROUPS}


def make_simulator(options: Options) -> Simulator:
    """The provider of a drill. It makes no fault yet."""
    until = datetime.now(UTC) + PROVIDER_SLOWNESS + timedelta(seconds=options.seconds)
    people = min(ceil(options.seconds / 60 * PEOPLE_PER_MINUTE), MOST_PEOPLE)
    return Simulator(people, DAYS, options.seed, until=until, page_size=PAGE_SIZE)


def environment(simulator: Simulator, options: Options) -> dict[str, str]:
    """What the stack is told beside the operator's own variables. Reconciling would mend, and so hide, a loss."""
    return {
        "JUNCTION_BASE_URL": simulator.url,
        "JUNCTION_API_KEY": simulator.api_key,
        "HEADRACE_VISIBILITY_TIMEOUT_SECONDS": str(options.visibility_seconds),
        "HEADRACE_RECONCILE_HOURS": "0",
        "HEADRACE_FETCH_HISTORY": "true",
        "HEADRACE_RESOURCES": "",
        "HEADRACE_PROVIDERS": "",
    }


def _open(backfills: Counter[str]) -> int:
    return backfills["pending"] + backfills["running"]


class Drill:
    """One drill on a stack that runs."""

    def __init__(
        self,
        simulator: Simulator,
        stack: Stack,
        options: Options,
        *,
        show: Callable[[Moment], None],
        tell: Callable[[Made], None],
    ) -> None:
        says = stack.says()
        self._simulator, self._options, self._show = simulator, options, show
        self._broker_url = says["broker_url"]
        self._silences = Silences(simulator.faults)
        self._books = Books(says["database_url"], [user.user_id for user in simulator.world.members])
        self._striker = Striker(stack, plan(options.seed, options.seconds), tell)
        self._stop = Flag()
        self._sender = Watcher(
            f"{says['web']}/webhooks/junction", says["junction_webhook_secret"], options.seed, self._stop
        )
        self._last: tuple[list[tuple[str, str]], Counter[str]] = ([], Counter())

    def run(self) -> Report:
        """Load and strikes, then patience, then the account. Ctrl-C ends it at once."""
        self._books.need_empty()
        for fault in FAULTS:
            self._simulator.faults.put(fault)
        try:
            self._load()
            settled_at = self._settle()
            return self._report(settled_at)
        finally:
            self._stop.set()
            self._sender.close()
            self._books.close()

    def _load(self) -> None:
        options, began = self._options, time.monotonic()
        load = events(self._simulator.world, options.seed, options.seconds, options.rate)
        with ThreadPoolExecutor(2) as pool:
            striking = pool.submit(self._striker.run, self._stop)
            sending = pool.submit(self._sender.send_all, load, options.rate)
            try:
                while not (striking.done() and sending.done()):
                    seconds = time.monotonic() - began
                    self._look("load", seconds, options.seconds - seconds)
                    if striking.done():
                        striking.result()  # what ended it before its time ends the drill
                    time.sleep(0.5)
                sending.result()
            except BaseException:
                self._stop.set()  # else the pool would wait for the end of the load
                raise

    def _settle(self) -> float | None:
        """Waits until everything has come to its end, and says when. None if for too long nothing went on."""
        began = moved = time.monotonic()
        patience = self._options.visibility_seconds + LEASE_SECONDS + MARGIN_SECONDS
        before: tuple[int, Counter[str]] | None = None
        while (now := time.monotonic()) - moved < patience:
            ledger, backfills = self._look("settling", now - began, moved + patience - now)
            if self._sender.taken.keys() <= {name for name, _ in ledger} and not _open(backfills):
                return time.time()
            if (len(ledger), backfills) != before:
                before, moved = (len(ledger), backfills), now
            time.sleep(0.5)
        return None

    def _look(
        self, phase: Literal["load", "settling", "counting"], seconds: float, left: float
    ) -> tuple[list[tuple[str, str]], Counter[str]]:
        """Shows how far it is. What the database cannot say now is what it said last."""
        with contextlib.suppress(TryLater):
            self._last = self._books.settled(), self._books.backfills()
        ledger, backfills = self._last
        self._show(
            Moment(
                phase,
                seconds,
                left=max(left, 0.0),
                acked=len(self._sender.taken),
                settled=len(ledger),
                applied=sum(outcome == "applied" for _, outcome in ledger),
                strikes=len(self._striker.hits),
                backfills_open=_open(backfills),
            )
        )
        return ledger, backfills

    def _report(self, settled_at: float | None) -> Report:
        self._look("counting", 0.0, 0.0)
        hits, taken = self._striker.hits, self._sender.taken
        requests = self._simulator.requests
        asked = [datetime.fromisoformat(one["time"]).timestamp() for one in requests]
        longest, whole = longest_answer(self._sender.answers, hits)
        found, excused = trespasses(self._silences.found, asked, hits)
        last = max((one.ended for one in hits), default=settled_at or 0.0)
        return Report(
            seed=self._options.seed,
            account=self._account(taken),
            strikes=self._striker.made,
            statuses=dict(Counter(one.status for one in self._sender.answers)),
            longest_answer=longest,
            longest_with_freezes=whole,
            never_taken=len(self._sender.given_up),
            settled_after=None if settled_at is None else settled_at - last,
            backfills=dict(self._books.backfills()),
            provider_requests=len(requests),
            provider_refused=sum(one["status"] != 200 for one in requests),
            trespasses=found,
            excused=excused,
        )

    def _account(self, taken: Mapping[str, Event]) -> Account:
        usable = {name: event for name, event in taken.items() if is_usable(event)}
        unanswered = {name: event for name, event in self._sender.given_up.items() if is_usable(event)}
        ledger = self._books.settled()
        is_settled = taken.keys() <= {name for name, _ in ledger}
        return settle_up(
            taken,
            ledger=ledger,
            letters=self._books.letters(),
            queued=set() if is_settled else waiting(self._broker_url),
            newest=wanted(usable, history(self._simulator.world)),
            rows=self._books.rows(),
            explained=expected(unanswered).keys(),
        )
