"""Random deliveries, repetitions, fetches, erasures, crashes and restarts against a model in plain Python.

The model: the newest version of each record, sample and connection is stored; of two with the same version, the one of
the later event, then the one with the higher rank. Of the activities and nights of Terra, the samples of the newest
versions are stored. Nothing of an erased user is stored. By default the runs are few and deterministic; with `--full`
they are more, longer and random.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, Phase, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import Engine, text

from app.config.settings import Settings
from app.delivery import Delivery, Receipt, pack, seal
from app.errors import TryLater
from app.sealing import Sealer
from tests.support import apply, delivery, heartrate, message_id, rows, workout
from tests.support import event as envelope
from tests.support.backfills import make_due
from tests.support.commits import interrupted_commit
from tests.support.provider import Killed
from workers.aggregators.common import CLOCK_SKEW
from workers.aggregators.junction import shapes
from workers.aggregators.requests import Request
from workers.backfill.fetcher import Fetcher
from workers.fetch.client import AggregatorClient
from workers.fetch.http import Client, HttpResponse
from workers.fetch.rate_limits import Throttle
from workers.ingest import commit as commit_module
from workers.ingest import crashes
from workers.ingest.apply import Applier
from workers.ingest.replay import Order, replay
from workers.operate.erase import Eraser
from workers.store import ledger, replaced, samples
from workers.store.archive import ArchiveWindow
from workers.store.backfills import due
from workers.store.engine import make_writer
from workers.store.samples import Written
from workers.store.users import claim_user

RUNS, STEPS = 12, 30
FULL_RUNS, FULL_STEPS = 300, 50
BEGINNING = datetime(2026, 3, 14, 12, tzinfo=UTC)
TICK = timedelta(milliseconds=4)  # the resolution of the timestamp in a delivery id
DAY = timedelta(days=1)
GARMIN = {"provider": "garmin", "type": "watch"}
POLAR = "polar"  # of what Terra sends
AHEAD = -(10**12)  # ticks: more than a century
USERS, IDS, MINUTES = ("u1", "u2"), ("w1", "w2"), range(3)
ACTIVITIES, NIGHT = ("a1", "a2"), "s1"  # two activities overlap; nights of a person do not
TABLES = (
    *("chunks", "backfills", "sample_ranges", "samples", "series", "workouts", "sleep", "connections", "users"),
    *("deliveries", "archive", "dead_letters", "crash_counts", "audit"),
)
OF_TERRA = {"u1": "t1", "u2": "t2"}  # users of Terra, in place of these users of Junction
MORTAL = ("u2", "t2")  # the users that `erase` erases
ERASED_AFTER = 3  # deliveries, so that there is data to erase
THAT_NAME = ("workouts", "sleep", "series", "connections", "backfills", "gaps", "archive", "deliveries")
Key = tuple[Any, ...]
# The content of a claim, preceded by its tie-break between equal versions, in the sort order of PostgreSQL.
Rank = tuple[Any, ...]


@dataclass(frozen=True)
class Claim:
    """The content and the version that a delivery or a page has for a key; and the time of the event, if it differs."""

    key: Key
    version: datetime
    rank: Rank
    event_at: datetime | None = None


@dataclass(frozen=True)
class Activity:
    """A version of an activity or a night of Terra's, with its heart rates by minute."""

    type: str
    id: str
    version: datetime
    beats: Mapping[int, int]
    is_deleted: bool


@dataclass(frozen=True)
class Made:
    """A generated delivery and its claims."""

    delivery: Delivery
    user: str | None
    claims: tuple[Claim, ...] = ()
    activity: Activity | None = None
    ends: str = ""  # its outcome, if only one is possible
    is_notice: bool = False


@dataclass
class Model:
    """The expected content of the database."""

    claims: dict[Key, list[tuple[str, Claim]]] = field(default_factory=dict)  # with the delivery or page of each claim
    activities: dict[str, list[Activity]] = field(default_factory=dict)  # by user
    erased: set[str] = field(default_factory=set)

    def take(self, who: str, claims: Sequence[Claim]) -> None:
        """Adds the claims of an applied delivery or page."""
        for claim in claims:
            if claim.key[1] not in self.erased:
                self.claims.setdefault(claim.key, []).append((who, claim))

    def erase(self, user: str) -> None:
        """Removes the claims about a user and blocks later ones."""
        self.erased.add(user)
        self.claims = {key: given for key, given in self.claims.items() if key[1] != user}
        self.activities.pop(user, None)

    @property
    def best(self) -> dict[Key, Claim]:
        """The claim of each key that must be stored."""
        found = {key: max((claim for _, claim in given), key=_newest) for key, given in self.claims.items()}
        return found | {claim.key: claim for user, given in self.activities.items() for claim in beats_of(user, given)}


def _newest(claim: Claim) -> tuple[datetime, datetime, Rank]:
    """Here no record is changed later and says that it was changed earlier, so the time of the event may come first."""
    return claim.event_at or claim.version, claim.version, claim.rank


def beats_of(user: str, versions: Sequence[Activity]) -> list[Claim]:
    """The heart rates that must be stored of all versions of a user's activities and nights."""
    newest: dict[str, Activity] = {}  # that is a deletion or has heart rates
    for one in sorted(versions, key=lambda one: one.version):
        if one.is_deleted or one.beats:
            newest[one.id] = one
    found: dict[Key, Claim] = {}
    for one in newest.values():
        for minute, value in ({} if one.is_deleted else one.beats).items():
            claim = Claim((one.type, user, minute), one.version, (value,))
            found[claim.key] = max(found.get(claim.key, claim), claim, key=_newest)
    return list(found.values())


def workout_rank(payload: Mapping[str, Any]) -> Rank:
    """The rank of payloads that differ only in these two fields, as in PostgreSQL: null sorts before text."""
    return payload["calories"], payload["updated_at"] or ""


@dataclass
class World:
    """The data of the provider, and its clock."""

    now: datetime = BEGINNING
    workouts: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    samples: dict[tuple[str, int], float] = field(default_factory=dict)

    def page(self, request: httpx.Request) -> tuple[dict[str, Any], list[Claim]]:
        """The response to a request at this moment, and its claims."""
        user = request.url.path.rpartition("/")[2] if "summary" in request.url.path else request.url.path.split("/")[3]
        if "workouts" in request.url.path:
            found = [dict(one) for (owner, _), one in self.workouts.items() if owner == user]
            return {"workouts": found}, [workout_claim(user, one, self.now) for one in found]
        found_samples = {minute: value for (owner, minute), value in self.samples.items() if owner == user}
        data = heartrate(user, found_samples)["data"]["data"]
        claims = [Claim(("sample", user, minute), self.now, (value,)) for minute, value in found_samples.items()]
        return {"groups": {"garmin": [{"source": GARMIN, "data": data}]}, "next_cursor": None}, claims


def workout_claim(user: str, payload: Mapping[str, Any], otherwise: datetime) -> Claim:
    """The claim of a workout: its version is its `updated_at`, or `otherwise` without one."""
    version = datetime.fromisoformat(payload["updated_at"]) if payload["updated_at"] else otherwise
    clamped = min(version, otherwise + CLOCK_SKEW)
    return Claim(("workout", user, payload["id"]), clamped, workout_rank(payload), otherwise)


class Clocked(Client):
    """A client with the clock of the provider."""

    def __init__(self, world: World, answer: Callable[[httpx.Request], httpx.Response], *, is_stale: bool) -> None:
        super().__init__("https://provider.test", {}, httpx.MockTransport(answer))
        self._world, self._is_stale = world, is_stale

    def fetch(self, request: Request) -> HttpResponse:
        """Sets `asked_at` to the time of the request; with `is_stale`, wrongly to a time after the response."""
        began = self._world.now
        answer = super().fetch(request)
        return replace(answer, asked_at=self._world.now + TICK if self._is_stale else began)


USER, STEP = st.sampled_from(USERS), st.sampled_from([0, 1, 1, 2])
PICKS = st.lists(st.integers(0, 30), min_size=1, max_size=5)
HOW = st.sampled_from(["before", "after", "cut"])
VALUE = st.integers(1, 4)


class Machine(RuleBasedStateMachine):
    """A deployment and its model."""

    def __init__(self, engine: Engine, other: Engine, settings: Settings, *, is_stale: bool = False) -> None:
        super().__init__()
        self.engine, self.other, self.settings, self.is_stale = engine, other, settings, is_stale
        with engine.begin() as connection:
            for table in TABLES:
                connection.execute(text(f"DELETE FROM headrace.{table}"))
            owners = [(user, "junction") for user in USERS] + [(user, "terra") for user in OF_TERRA.values()]
            for user, aggregator in owners:
                claim_user(connection, user, aggregator)
        self.world, self.model = World(), Model()
        self.made: list[Made] = []
        self.delivered: dict[str, Made] = {}
        self.kept: set[str] = set()
        self.dead: set[str] = set()
        self.late: set[str] = set()  # deliveries that arrived after the erasure of their user
        self.attempts: Counter[str] = Counter()  # the minimum per delivery
        self.crashed: Counter[str] = Counter()  # the maximum of additional attempts
        self.asked: list[list[Claim]] = []
        self.meanwhile: Callable[[], None] | None = None
        self.restart()

    # Events at the provider

    @rule(
        user=USER,
        identifier=st.sampled_from(IDS),
        calories=VALUE,
        age=st.sampled_from([None, 0, 0, 1, AHEAD]),
        step=STEP,
    )
    def edit_a_workout(self, user: str, identifier: str, calories: int, age: int | None, step: int) -> None:
        """Creates or edits a workout, with or without `updated_at`, or with one that is years ahead."""
        self.world.now += step * TICK
        updated_at = None if age is None else (self.world.now - age * TICK).isoformat()
        payload = {"id": identifier, "user_id": user, "source": GARMIN, "calories": calories, "updated_at": updated_at}
        self.world.workouts[user, identifier] = payload
        body = envelope("daily.data.workouts.updated", user, payload)
        self._make(body, user, workout_claim(user, payload, self.world.now))

    @rule(user=USER, values=st.dictionaries(st.sampled_from(MINUTES), VALUE, min_size=1), step=STEP)
    def measure(self, user: str, values: dict[int, int], step: int) -> None:
        """Creates or replaces samples."""
        self.world.now += step * TICK
        found = {minute: 60.0 + value for minute, value in values.items()}
        self.world.samples |= {(user, minute): value for minute, value in found.items()}
        claims = [Claim(("sample", user, minute), self.world.now, (value,)) for minute, value in found.items()]
        self._make(heartrate(user, found), user, *claims)

    @rule(
        user=USER,
        identifier=st.sampled_from(ACTIVITIES),
        beats=st.dictionaries(st.sampled_from(MINUTES), VALUE, min_size=1),
        is_deleted=st.sampled_from([False, False, False, True]),
        step=STEP,
    )
    def record_an_activity(
        self, user: str, identifier: str, beats: dict[int, int], is_deleted: bool, step: int
    ) -> None:
        """Creates, trims or deletes an activity at Terra."""
        self._record(user, "activity", identifier, beats, is_deleted=is_deleted, step=step)

    @rule(user=USER, beats=st.dictionaries(st.sampled_from(MINUTES), VALUE), step=STEP)
    def record_a_night(self, user: str, beats: dict[int, int], step: int) -> None:
        """Creates, trims or empties a night at Terra."""
        self._record(user, "sleep", NIGHT, beats, is_deleted=False, step=step)

    def _record(
        self, user: str, name: str, identifier: str, beats: Mapping[int, int], *, is_deleted: bool, step: int
    ) -> None:
        """Two versions of one object have different times: of equal ones, the samples of both stay (record 0053)."""
        owner = OF_TERRA[user]
        known = [one.activity for one in self.made if one.activity and one.user == owner]
        is_tie = any(one.id == identifier and one.version == self.world.now for one in known)
        self.world.now += max(step, int(is_tie)) * TICK
        sealed, version = self._object(owner, name, identifier, beats, is_deleted=is_deleted)
        self.made.append(Made(sealed, owner, activity=Activity(name, identifier, version, beats, is_deleted)))

    def _object(
        self, user: str, name: str, identifier: str, beats: Mapping[int, int], *, is_deleted: bool
    ) -> tuple[Delivery, datetime]:
        """A delivery of Terra about an activity or a night, and its version."""
        samples = [{"timestamp": moment.isoformat(), "bpm": beats[m]} for moment, m in MINUTE_OF.items() if m in beats]
        metadata = {"start_time": BEGINNING.isoformat(), "end_time": BEGINNING.isoformat(), "summary_id": identifier}
        body = {
            "type": name,
            "user": {"user_id": user, "provider": POLAR},
            "data": [
                {
                    "metadata": metadata | {"upload_type": 4 if is_deleted else 1},
                    "heart_rate_data": {"detailed": {"hr_samples": samples}},
                }
            ],
        }
        # Terra's clock has milliseconds.
        ordering = round(self.world.now.timestamp() * 1000)
        receipt = Receipt(f"terra-{len(self.made)}", ordering)
        sealed = seal("terra", receipt, msgspec.json.encode(body), Sealer(self.settings.encryption_keys))
        return sealed, datetime.fromtimestamp(ordering / 1000, UTC)

    @rule(user=USER, error=st.sampled_from([None, "a", "b"]), step=STEP)
    def connect(self, user: str, error: str | None, step: int) -> None:
        """Connects a provider, or reports a connection error."""
        self.world.now += step * TICK
        data = {"provider": {"slug": "garmin"}} | ({"error_type": error} if error else {})
        rank = ("error", error) if error else ("connected", "")
        body = envelope(f"provider.connection.{'error' if error else 'created'}", user, data)
        self._make(body, user, Claim(("connection", user), self.world.now, rank))

    @rule(user=USER, resource=st.sampled_from(["workouts", "heartrate"]))
    def announce(self, user: str, resource: str) -> None:
        """Announces history."""
        window = {"start_date": (BEGINNING - DAY).isoformat(), "end_date": (BEGINNING + DAY).isoformat()}
        body = envelope(f"historical.data.{resource}.created", user, window | {"provider": "garmin", "is_final": True})
        self._make(body, user, ends="applied", is_notice=True)

    @rule(user=USER, what=st.sampled_from(["rubbish", "refused", "ignored", "forged"]))
    def send_nonsense(self, user: str, what: str) -> None:
        """Creates an invalid or an ignored delivery, or one of Terra about a user of Junction."""
        if what == "forged":
            sealed, _ = self._object(user, "activity", "w1", {0: 9}, is_deleted=False)
            self.made.append(Made(sealed, user, ends="dead"))
            return
        bodies: dict[str, Any] = {
            "rubbish": b"hello",
            "refused": workout(user, ""),
            "ignored": envelope("raw.garmin.dailies", user, {}),
        }
        self._make(bodies[what], None if what == "rubbish" else user, ends="ignored" if what == "ignored" else "dead")

    def _make(self, body: Any, user: str | None, *claims: Claim, **more: Any) -> None:
        name = message_id(self.world.now, tail=len(self.made))
        self.made.append(Made(delivery(body, name=name), user, claims, **more))

    # Events in the deployment

    @precondition(lambda self: self.made)
    @rule(picks=PICKS, redelivered=st.booleans())
    def deliver(self, picks: list[int], redelivered: bool) -> None:
        """Applies a message of new and old deliveries, in any order, some of them twice."""
        message = self._message(picks)
        self.applier.apply(pack([one.delivery for one in message]), redelivered=redelivered)
        self._delivered(message)

    @precondition(lambda self: self.made)
    @rule(picks=PICKS, redelivered=st.booleans(), commit=st.integers(1, 6), how=HOW)
    def crash(self, picks: list[int], redelivered: bool, commit: int, how: str) -> None:
        """Kills a worker that processes a message, which the broker redelivers to another worker."""
        message = self._message(picks)
        packed = pack([one.delivery for one in message])
        try:
            with interrupted_commit(self.engine, commit, how):
                self.applier.apply(packed, redelivered=redelivered)
        except (Killed, TryLater):
            self.crashed.update(one.delivery.message_id for one in message)
            self.restart()
            self.applier.apply(packed, redelivered=True)
        self._delivered(message)

    @precondition(lambda self: self.delivered)
    @rule(order=st.sampled_from(["oldest", "newest", "random"]))
    def replay(self, order: Order) -> None:
        """Replays all archived deliveries."""
        outcomes = replay(self.engine, self.applier, self._always, order, lambda _: None)
        assert not outcomes["applied"]
        assert outcomes.total() == len(self.kept)

    @precondition(lambda self: len(self.delivered) > ERASED_AFTER and not self.model.erased)
    @rule(commit=st.integers(0, 50), how=HOW, picks=st.lists(st.integers(0, 30), max_size=3))
    def erase(self, commit: int, how: str, picks: list[int]) -> None:
        """Erases a user; after an interruption at any commit, more deliveries arrive and the erasure restarts."""
        try:
            with interrupted_commit(self.engine, commit, how):
                self._erase(self.engine)
        except (Killed, TryLater):
            self.restart()
            for row in rows(self.engine, "SELECT user_id FROM headrace.users WHERE erased_at IS NOT NULL"):
                self._erased(row["user_id"])
            message = self._message(picks)
            apply(self.engine, self.settings, *(one.delivery for one in message))
            self._delivered(message)
            self._erase(self.engine)

    def _erase(self, engine: Engine) -> None:
        for user in MORTAL:
            Eraser(engine, self.settings).erase(user, lambda _: None)
            self._erased(user)

    def _erased(self, user: str) -> None:
        """Updates the model after the tombstone was committed."""
        self.model.erase(user)
        theirs = {name for name, one in self.delivered.items() if one.user == user}
        self.kept -= theirs
        self.dead -= theirs

    @precondition(lambda self: bool(due(self.engine)))
    @rule(
        picks=st.lists(st.integers(0, 30), max_size=3),
        commit=st.integers(0, 5),
        how=HOW,
        edit=st.none() | st.tuples(USER, st.sampled_from(IDS), VALUE, st.sampled_from([None, 0]), st.just(1)),
        ends=st.sampled_from([False, False, False, True]),
    )
    def fetch(self, picks: list[int], commit: int, how: str, edit: tuple[Any, ...] | None, ends: bool) -> None:
        """Fetches history during webhooks or an erasure; the worker may be killed, and another one continues."""

        def meanwhile() -> None:
            self.meanwhile = None
            if edit is not None:
                self.edit_a_workout(*edit)
            message = self._message([0, *picks] if edit else picks) if self.made else []
            if ends and len(self.delivered) > ERASED_AFTER and not self.model.erased:
                self._erase(self.other)
            apply(self.other, self.settings, *(one.delivery for one in message))
            self._delivered(message)

        self.meanwhile = meanwhile
        for backfill_id in due(self.engine):
            try:
                with interrupted_commit(self.engine, commit, how):
                    self._fetch(backfill_id)
            except (Killed, TryLater):
                self.restart()
                make_due(self.engine, leases=True)
                self._fetch(backfill_id)
        self._check_backfills()

    def _fetch(self, backfill_id: int) -> None:
        """Runs one time slice of a backfill, and adds the claims of the pages that it counted as committed."""
        pages = "SELECT coalesce(sum(pages), 0)::int AS n FROM headrace.backfills WHERE id = :id"
        (before,), self.asked = rows(self.engine, pages, id=backfill_id), []
        try:
            self.fetcher.run(backfill_id)
        finally:
            (after,) = rows(self.engine, pages, id=backfill_id)  # 0 pages if it was erased during the fetch
            for claims in self.asked[: max(after["n"] - before["n"], 0)]:
                self.model.take(f"page {backfill_id}", claims)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        """The response of the provider as of the request, although more may happen before it arrives."""
        page, claims = self.world.page(request)
        self.asked.append(claims)
        if self.meanwhile is not None:
            self.meanwhile()
        return httpx.Response(200, json=page)

    @rule()
    def restart(self) -> None:
        """Starts workers without cached state."""
        self.applier = Applier(self.engine, self.settings)
        client = Clocked(self.world, self._answer, is_stale=self.is_stale)
        self.fetcher = Fetcher(
            self.engine, self.settings, [AggregatorClient("junction", client, Throttle(self.settings))]
        )

    @property
    def _always(self) -> ArchiveWindow:
        now = datetime.now(UTC)
        return ArchiveWindow(now - DAY, now + DAY)

    def _message(self, picks: list[int]) -> list[Made]:
        """The deliveries at these positions, counted from the newest one."""
        return [self.made[-1 - pick % len(self.made)] for pick in picks]

    def _delivered(self, message: Sequence[Made]) -> None:
        for one in message:
            name = one.delivery.message_id
            self.attempts[name] += 1
            if one.user in self.model.erased:  # the erasure also deleted their dead letters
                if name not in self.delivered or one.ends == "dead":
                    self.late.add(name)
            elif name not in self.delivered:
                (self.dead if one.ends == "dead" else self.kept).add(name)
            if name not in self.delivered:
                self.delivered[name] = one
                self.model.take(name, one.claims)
                if one.activity and one.user not in self.model.erased:
                    self.model.activities.setdefault(str(one.user), []).append(one.activity)

    # Invariants

    @invariant()
    def what_is_stored_is_what_the_model_says(self) -> None:
        """Every row of every view and its version match the model, and there are no other rows."""
        assert self._stored() == {key: (claim.version, claim.rank) for key, claim in self.model.best.items()}

    def _stored(self) -> dict[Key, tuple[datetime, Rank]]:
        found: dict[Key, tuple[datetime, Rank]] = {}
        workouts = f"SELECT user_id, id, calories, payload, version FROM health.workouts WHERE provider <> '{POLAR}'"
        for row in rows(self.engine, workouts):
            assert row["calories"] == row["payload"]["calories"]
            found["workout", row["user_id"], row["id"]] = row["version"], workout_rank(row["payload"])
        beats = "SELECT user_id, provider, source_type, ts, value, version FROM health.heartrate"
        for row in rows(self.engine, beats):
            kind = row["source_type"] if row["provider"] == POLAR else "sample"
            found[kind, row["user_id"], MINUTE_OF[row["ts"]]] = row["version"], (row["value"],)
        connections = f"SELECT user_id, status, error, version FROM headrace.connections WHERE provider <> '{POLAR}'"
        for row in rows(self.engine, connections):
            found["connection", row["user_id"]] = row["version"], (row["status"], row["error"] or "")
        return found

    @invariant()
    def every_delivery_has_one_row_and_an_outcome_that_fits(self) -> None:
        """The ledger, the archive and the dead letters match the deliveries."""
        ledger = rows(self.engine, "SELECT message_id, outcome, attempts FROM health.deliveries")
        assert sorted(row["message_id"] for row in ledger) == sorted(self.delivered)
        for row in ledger:
            name = row["message_id"]
            least = self.attempts[name]
            assert least <= row["attempts"] <= least + self.crashed[name], name
            self._check_outcome(name, row["outcome"])
        letters = rows(self.engine, "SELECT message_id FROM headrace.dead_letters")
        assert sorted(row["message_id"] for row in letters) == sorted(self.dead)
        kept = rows(self.engine, "SELECT message_id FROM headrace.archive")
        assert sorted(row["message_id"] for row in kept) == sorted(self.kept)
        assert rows(self.engine, "SELECT 1 FROM headrace.crash_counts") == []

    @invariant()
    def of_whoever_was_erased_there_is_a_tombstone_and_no_more(self) -> None:
        """The user_id is in no other table, including tables without a view."""
        named = " UNION ALL ".join(f"SELECT user_id FROM headrace.{table}" for table in THAT_NAME)
        for user in self.model.erased:
            assert rows(self.engine, f"SELECT * FROM ({named}) n WHERE user_id = :user", user=user) == []
            (stone,) = rows(self.engine, "SELECT * FROM health.users WHERE user_id = :user", user=user)
            assert stone["erased_at"]
            assert stone["client_user_id"] is None

    def _check_outcome(self, name: str, outcome: str) -> None:
        """A delivery that is the only source of stored content is `applied`; a duplicate has another source.

        Deliveries that differ from another one of the same version only by rank are left to the last test below.
        """
        one = self.delivered[name]
        if name in self.late:
            assert outcome == "ignored", name
            return
        assert outcome == one.ends if one.ends else outcome in ("applied", "duplicate", "stale"), name
        if one.user in self.model.erased or one.activity:
            return
        others = {claim.key: [c for who, c in self.model.claims[claim.key] if who != name] for claim in one.claims}
        ties = (_newest(c)[:2] == _newest(k)[:2] and c.rank != k.rank for k in one.claims for c in others[k.key])
        if any(ties):
            return
        outdone = [any(_newest(c) > _newest(claim) for c in others[claim.key]) for claim in one.claims]
        said = [any(c.rank == claim.rank for c in others[claim.key]) for claim in one.claims]
        if outcome == "stale":
            assert any(outdone), name
        elif outcome == "duplicate":
            assert all(said), name
        best = self.model.best
        for claim, elsewhere in zip(one.claims, said, strict=True):
            assert outcome == "applied" or elsewhere or best[claim.key] != claim, name

    def _check_backfills(self) -> None:
        """No backfill has failed, and each announcement has its chunk."""
        found = rows(
            self.engine,
            """SELECT b.status, count(c.id) AS chunks, count(c.id) FILTER (WHERE c.status = 'done') AS done
               FROM headrace.backfills b JOIN headrace.chunks c ON c.backfill_id = b.id GROUP BY b.id""",
        )
        notices = sum(one.is_notice for one in self.delivered.values() if one.user not in self.model.erased)
        assert sum(row["chunks"] for row in found) == notices
        assert {row["status"] for row in found} <= {"complete", "pending"}  # one may have arrived during the fetch

    def teardown(self) -> None:
        """A replay of all deliveries changes nothing."""
        before = self._stored()
        replay(self.engine, self.applier, self._always, "random", lambda _: None)
        assert self._stored() == before
        self.fetcher = None  # type: ignore[assignment]


MINUTE_OF = {
    datetime.fromisoformat(heartrate("u", {minute: 0})["data"]["data"][0]["timestamp"]): minute for minute in MINUTES
}


@pytest.fixture(autouse=True)
def both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses the direct copy even for the few samples of a delivery here, so that both ways of writing are tested."""
    monkeypatch.setattr(samples, "DIRECT_COPY_MIN_ROWS", 1)


@pytest.fixture
def reading(settings: Settings, broker_url: str) -> Settings:
    """Settings with an API key and without a rate limit in practice."""
    return replace(settings, broker_url=broker_url, junction_api_key="sk_us_tests", request_rate="1000000/second")


@pytest.fixture
def other(settings: Settings) -> Iterator[Engine]:
    """The engine of a second worker."""
    engine = make_writer(settings)
    yield engine
    engine.dispose()


def machine(*given: Any, **more: Any) -> type[RuleBasedStateMachine]:
    """A Machine class without constructor arguments, as Hypothesis requires."""

    class Here(Machine):
        def __init__(self) -> None:
            super().__init__(*given, **more)

    return Here


def so_many(runs: int, steps: int, **more: Any) -> hypothesis_settings:
    """Settings for a number of runs, without deadlines: the machine is slow and uses real servers."""
    given: dict[str, Any] = {"max_examples": runs, "stateful_step_count": steps, "deadline": None, "database": None}
    given |= {"suppress_health_check": list(HealthCheck), "print_blob": True}
    return hypothesis_settings(**given | more)


@pytest.mark.timeout(0)
def test_nothing_that_happens_makes_a_difference(
    engine: Engine, other: Engine, reading: Settings, *, full: bool
) -> None:
    """Breaks if an order of deliveries, fetches and crashes stores other data than the newest version, exactly once."""
    runs = so_many(FULL_RUNS, FULL_STEPS) if full else so_many(RUNS, STEPS, derandomize=True)
    run_state_machine_as_test(machine(engine, other, reading), settings=runs)


def no_guard(patch: pytest.MonkeyPatch) -> None:
    """Defect: the last delivery overwrites newer versions."""
    guarded = str(samples.MERGE_SAMPLES)
    for guard in ("WHERE excluded.version", "WHERE NOT EXISTS"):
        guarded = guarded.replace(guard, guard.replace("WHERE", "WHERE true OR"))
    patch.setattr(samples, "MERGE_SAMPLES", text(guarded))


def kept_always(patch: pytest.MonkeyPatch) -> None:
    """Defect: a repeated delivery is archived again."""
    always = str(ledger.SETTLE).replace("JOIN settled USING (aggregator, message_id) WHERE is_changed", "")
    assert always != str(ledger.SETTLE)
    patch.setattr(ledger, "SETTLE", text(always))


def crashes_never_cleared(patch: pytest.MonkeyPatch) -> None:
    """Defect: crash counts are never cleared."""
    patch.setattr(crashes, "clear_crashes", lambda *_: None)


def forgiven(patch: pytest.MonkeyPatch) -> None:
    """Defect: the next event restores an erased user."""
    patch.setattr(commit_module, "without_erased", lambda opened, _users: opened)


def late(_: pytest.MonkeyPatch) -> None:
    """Defect: the version of a page is the time of its response; see Clocked."""


SEEDS: dict[Callable[..., None], int] = {no_guard: 21, kept_always: 5, crashes_never_cleared: 4, forgiven: 14, late: 1}


@pytest.mark.parametrize("spoil", SEEDS)
def test_the_model_notices(
    engine: Engine,
    other: Engine,
    reading: Settings,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[..., None],
    *,
    full: bool,
) -> None:
    """Breaks if the test above does not detect a defect."""
    spoil(monkeypatch)
    found = so_many(FULL_RUNS, STEPS, phases=[Phase.generate], report_multiple_bugs=False, print_blob=False)
    spoilt = machine(engine, other, reading, is_stale=spoil is late)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(spoilt if full else seed(SEEDS[spoil])(spoilt), settings=found)


def outliving(patch: pytest.MonkeyPatch) -> None:
    """Defect: samples outlive the version that they came with."""
    patch.setattr(replaced, "remove", lambda *_: (0, Written()))


def alone(patch: pytest.MonkeyPatch) -> None:
    """Defect: an activity replaces the samples of all that overlap with it."""
    patch.setattr(replaced, "_others", lambda *_: {})


def hidden(patch: pytest.MonkeyPatch) -> None:
    """Defect: samples stay away that those of a replaced version have overwritten."""
    patch.setattr(replaced, "_restore", lambda *_: Written())


def unclamped(patch: pytest.MonkeyPatch) -> None:
    """Defect: an `updated_at` in the future wins over all later versions."""
    patch.setattr(shapes, "CLOCK_SKEW", timedelta(days=100_000))


# Steps after which each of these defects shows. Random runs need a minute to find them.
EDITED = (("edit_a_workout", "u1", "w1", 1, AHEAD, 1), ("edit_a_workout", "u1", "w1", 2, 0, 2))
TRIMMED = (
    ("record_an_activity", "u1", "a1", {0: 1, 1: 1}, False, 1),
    ("record_an_activity", "u1", "a1", {0: 2}, False, 1),
)
OVERLAPPING = (
    ("record_an_activity", "u1", "a1", {0: 1, 1: 1, 2: 1}, False, 1),
    ("record_an_activity", "u1", "a2", {1: 4}, False, 1),
    ("record_an_activity", "u1", "a1", {0: 2}, False, 1),
    ("record_an_activity", "u1", "a2", {2: 4}, False, 1),
)
SHOWS: dict[Callable[..., None], tuple[tuple[tuple[Any, ...], ...], list[int]]] = {
    outliving: (TRIMMED, [1, 0]),
    alone: (OVERLAPPING, [3, 2, 1]),
    hidden: (OVERLAPPING, [3, 2, 0]),
    unclamped: (EDITED, [1]),
}


@pytest.mark.parametrize("spoil", SHOWS)
def test_the_model_notices_in_known_steps(
    engine: Engine, other: Engine, reading: Settings, monkeypatch: pytest.MonkeyPatch, spoil: Callable[..., None]
) -> None:
    """Breaks if the test above does not detect one of these defects, or finds one where there is none."""
    steps, picks = SHOWS[spoil]
    for is_spoilt in (False, True):
        tested = Machine(engine, other, reading)
        for name, *values in steps:
            getattr(tested, name)(*values)
        if is_spoilt:
            spoil(monkeypatch)
        for pick in picks:
            tested.deliver([pick], redelivered=False)
        if is_spoilt:
            with pytest.raises(AssertionError):
                tested.what_is_stored_is_what_the_model_says()
        else:
            tested.what_is_stored_is_what_the_model_says()


# Regressions that the machine has found


def test_a_late_connection_event_is_stale(engine: Engine, settings: Settings) -> None:
    """Breaks if an old event has the outcome `duplicate` although its content is not stored."""
    connected = envelope("provider.connection.created", "u1", {"provider": {"slug": "garmin"}})
    broken = envelope("provider.connection.error", "u1", {"provider": {"slug": "garmin"}, "error_type": "a"})
    assert apply(engine, settings, delivery(broken, BEGINNING + TICK)) == {"applied": 1}
    assert apply(engine, settings, delivery(connected, BEGINNING)) == {"stale": 1}


@pytest.mark.parametrize("values", [(70, 80), (80, 70)])
def test_of_two_of_one_moment_the_one_that_is_stored_was_applied(
    engine: Engine, settings: Settings, values: tuple[int, int]
) -> None:
    """Breaks if a delivery has the outcome `applied` although its value is not stored."""
    sent = [delivery(heartrate("u1", {0: value}), BEGINNING) for value in values]
    apply(engine, settings, *sent)
    assert rows(engine, "SELECT value FROM health.heartrate") == [{"value": 80.0}]
    ledger = rows(engine, "SELECT message_id, outcome FROM health.deliveries")
    outcomes = {row["message_id"]: row["outcome"] for row in ledger}
    assert [outcomes[one.message_id] for one in sent] == ["applied" if value == 80 else "stale" for value in values]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_of_three_versions_of_one_time_the_one_that_is_stored_was_applied(
    engine: Engine, settings: Settings, order: tuple[int, ...]
) -> None:
    """Breaks if a record has the outcome `applied` although another one of the same `updated_at` is stored."""
    sent = [delivery(workout("u1", average_hr=rate)) for rate in (100, 110, 120)]
    apply(engine, settings, *(sent[number] for number in order))
    (stored,) = rows(engine, "SELECT CAST(payload ->> 'average_hr' AS int) AS rate FROM health.workouts")
    ledger = rows(engine, "SELECT message_id, outcome FROM health.deliveries")
    applied = {row["message_id"] for row in ledger if row["outcome"] == "applied"}
    assert applied == {sent[(stored["rate"] - 100) // 10].message_id}
    assert [row["outcome"] for row in ledger].count("stale") == 2
