"""The simulated users' accounts and objects at Terra, generated on request.

As in `workers.simulator.data`, objects are not stored: an object follows from (seed, user, provider, type, day).
It keeps only the accounts, each type's newest time, and corrections, so that the read API is never behind the newest
event.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta, timezone
from threading import RLock
from typing import Any

from workers.simulator.data import World
from workers.simulator.people import Provider, Record, User, zone_of
from workers.simulator.shapes import Context, fill, seeded
from workers.simulator.terra.objects import ATHLETE, KINDS, Kind

UNSEEN = timedelta(hours=8)  # age of a provider's last data when the user connects
STEP = timedelta(hours=2)  # new data per event, at most
CYCLE_DAYS = 28
_WATCH = frozenset({"activity", "daily", "sleep", "body", "menstruation", "planned_workout"})

# By Terra's names. A user's number selects the two that the user has.
PROVIDERS = {
    provider.slug: provider
    for provider in (
        Provider("PELOTON", "Peloton", "exercise_machine", "Bike+", frozenset({"activity"})),
        Provider("OURA", "Oura", "ring", "Gen3", frozenset({"daily", "sleep"})),
        Provider("GARMIN", "Garmin", "watch", "Forerunner 265", _WATCH),
        Provider("FREESTYLELIBRE", "FreeStyle Libre", "automatic", "Libre 3", frozenset({"body"})),
        Provider("WITHINGS", "Withings", "scale", "Body Cardio", frozenset({"body", "sleep"})),
        Provider("MYFITNESSPAL", "MyFitnessPal", "app", "MyFitnessPal", frozenset({"nutrition"})),
    )
}
APART = 2  # places between a user's two providers


@dataclass(frozen=True, slots=True)
class TerraUser:
    """One person's connection with one provider, which Terra calls a user. Reconnecting gives it another id."""

    user_id: str
    person: User
    provider: Provider
    since: datetime

    @property
    def key(self) -> tuple[int, str]:
        """The identity that all ids of the account share."""
        return self.person.number, self.provider.slug


def usual(person: User) -> list[Provider]:
    """The providers that a person has from the start."""
    providers = list(PROVIDERS.values())
    return [providers[(person.number + step) % len(providers)] for step in (0, APART)]


@dataclass(frozen=True, slots=True)
class Slot:
    """One object of an account: the one that begins on this day, or on the evening before."""

    account: tuple[int, str]
    kind: Kind
    day: int  # since year 1

    @property
    def seed(self) -> tuple[object, ...]:
        return (*self.account, self.kind.name, self.day)


class TerraWorld:
    """The Terra accounts of a world's users, of all or of the first `people`. Safe to use from several threads."""

    def __init__(self, world: World, people: int | None = None) -> None:
        self.world = world
        self._accounts: dict[str, TerraUser] = {}
        self._measured: dict[tuple[tuple[int, str], Kind], datetime] = {}
        self._revisions: dict[Slot, int] = {}
        self.payloads: dict[str, bytes] = {}  # bodies of events that were sent as a URL, by trace id
        self._pending: list[Any] = []
        self._last_stamp = 0
        self._lock = RLock()
        for person in world.members[:people]:
            for provider in usual(person):
                self._open(TerraUser(self._id(person, provider.slug), person, provider, world.start))

    def accounts(self) -> list[TerraUser]:
        return list(self._accounts.values())

    def account(self, user_id: str) -> TerraUser | None:
        """The open account with this id, if any."""
        return self._accounts.get(user_id)

    def kinds(self, account: TerraUser) -> list[Kind]:
        """The types of which an account has objects."""
        return [kind for kind in KINDS.values() if account.provider.supplies and kind.name in account.provider.supplies]

    def newest(self, account: TerraUser) -> datetime | None:
        """The end of the account's newest data; None if the account has no type of data."""
        return max((self._measured[account.key, kind] for kind in self.kinds(account)), default=None)

    def user_id(self, reference_id: str, slug: str) -> str:
        """The id of a user's account with a provider, whether or not it is open; an unknown user joins the world."""
        person = self.world.join(reference_id)
        known = self._of(person, slug)
        return known.user_id if known else self._id(person, slug)

    def connect(self, reference_id: str, slug: str) -> TerraUser:
        """The account of a user with a provider, opened if there is none; an unknown user joins the world."""
        person = self.world.join(reference_id)
        with self._lock:
            if known := self._of(person, slug):
                return known
            account = TerraUser(self._id(person, slug), person, PROVIDERS[slug], self.world.until)
            self._open(account)
            return account

    def renew(self, account: TerraUser) -> TerraUser:
        """Replaces an account by one with another id, as when the user connects the same provider again."""
        with self._lock:
            renewed = replace(account, user_id=self._id(account.person, account.user_id), since=self.world.until)
            del self._accounts[account.user_id]
            self._accounts[renewed.user_id] = renewed
            return renewed

    def rename(self, account: TerraUser, reference_id: str) -> TerraUser:
        """Gives an account another reference id. Its data and the person's other accounts stay the same."""
        with self._lock:
            renamed = replace(account, person=replace(account.person, client_user_id=reference_id))
            self._accounts[account.user_id] = renamed
            return renamed

    def close(self, account: TerraUser) -> None:
        """Closes an account: the read API no longer finds it."""
        with self._lock:
            self._accounts.pop(account.user_id, None)

    def objects(
        self, account: TerraUser, kind: Kind, start: datetime, end: datetime, *, with_samples: bool = True
    ) -> list[Record]:
        """The objects that overlap a window, `end` excluded, oldest first. One on an edge is in both windows."""
        return [self.record(slot, with_samples=with_samples) for slot in self._slots(account, kind, start, end)]

    def advance(self, account: TerraUser, kind: Kind, *, updated: bool = False) -> list[Record]:
        """Measures up to STEP more, and returns the objects with new data, or else the newest one again.

        From then on the read API has the new data too. With `updated` the newest object is also corrected.
        """
        with self._lock:
            before = self._measured[account.key, kind]
            after = max(before, min(self.world.until, before + STEP))
            self._measured[account.key, kind] = after
            far = timedelta(days=2 * kind.every + 1)
            known = list(self._slots(account, kind, before - far, after + far))
            slots = [slot for slot in known if before < self._span(slot, 0)[1]] or known[-1:]
            if updated:
                self._revisions |= {slot: self._revisions.get(slot, 0) + 1 for slot in slots[-1:]}
            return [self.record(slot) for slot in slots]

    def athlete(self, account: TerraUser) -> Record:
        context = Context(seeded(self._seed("athlete", *account.key)), self.world.start, {}, str)
        return dict(fill(ATHLETE, context))

    def record(self, slot: Slot, *, with_samples: bool = True) -> Record:
        """The object of a slot in its present state."""
        start, end = self._span(slot)
        number, slug = slot.account
        provider = PROVIDERS[slug]
        seed = self._seed("values", *slot.seed)
        measured = min(end, self._measured[slot.account, slot.kind]) if slot.kind.is_running else end
        in_cycle = slot.day % CYCLE_DAYS
        variables = {
            "seed": seed,
            "until": _local(number, measured),
            "end_time": _local(number, end).isoformat(),
            "summary_id": f"{slug.lower()}-{slot.kind.name}-{slot.day}",  # unique within the account only
            "object_id": self.world.identity("terra", *slot.seed),  # unique among all accounts
            "with_samples": with_samples,
            "provider": slug,
            "device": provider.device,
            "manufacturer": provider.name,
            "day_in_cycle": in_cycle + 1,
            "period_start": date.fromordinal(slot.day - in_cycle).isoformat(),
        }
        context = Context(seeded(seed), _local(number, start), variables, str, self._revisions.get(slot, 0))
        return dict(fill(slot.kind.description, context))

    def stamp(self) -> int:
        """The time of an event in unix milliseconds, later than the time of every earlier event."""
        with self._lock:
            self._last_stamp = max(self._last_stamp + 1, time.time_ns() // 1_000_000)
            return self._last_stamp

    def put(self, *events: Any) -> None:
        """Adds events to be sent before any other."""
        with self._lock:
            self._pending += events

    def pending(self) -> list[Any]:
        """Removes and returns the added events."""
        with self._lock:
            pending, self._pending = self._pending, []
            return pending

    def _of(self, person: User, slug: str) -> TerraUser | None:
        return next((one for one in self._accounts.values() if one.key == (person.number, slug)), None)

    def _open(self, account: TerraUser) -> None:
        self._accounts[account.user_id] = account
        for kind in self.kinds(account):
            self._measured.setdefault((account.key, kind), self.world.until - UNSEEN)

    def _slots(self, account: TerraUser, kind: Kind, start: datetime, end: datetime) -> Iterator[Slot]:
        """The slots that overlap a window and have measured data."""
        measured = self._measured.get((account.key, kind))
        if measured is None:
            return
        first = max(start.toordinal() - 1, self.world.start.toordinal())
        for day in range(first, min(end, measured).toordinal() + 2):
            slot = Slot(account.key, kind, day)
            begins, ends = self._span(slot)
            is_within = begins < end and max(start, self.world.start) < ends
            if day % kind.every == 0 and is_within and self._is_known(slot, measured):
                yield slot

    def _is_known(self, slot: Slot, at: datetime) -> bool:
        """Whether a slot has data at a moment. A correction that extends the object does not delay this."""
        start, end = self._span(slot, 0)
        return start < at if slot.kind.is_running else end <= at

    def _span(self, slot: Slot, revision: int | None = None) -> tuple[datetime, datetime]:
        rng, kind = seeded(self._seed("moment", *slot.seed)), slot.kind
        midnight = datetime.fromordinal(slot.day) - timedelta(seconds=zone_of(slot.account[0])[1] or 0)
        jitter = int(rng.random() * kind.jitter * 3600)
        start = midnight.replace(tzinfo=UTC) + timedelta(hours=kind.hour, seconds=jitter)
        low, high = kind.lasts
        revision = self._revisions.get(slot, 0) if revision is None else revision
        minutes = round(60 * (low + rng.random() * (high - low) + kind.extends * revision))
        return start, start + timedelta(minutes=minutes)

    def _id(self, person: User, what: str) -> str:
        return self.world.identity("terra", person.number, what)

    def _seed(self, *parts: object) -> str:
        return "/".join(str(part) for part in (self.world.seed, "terra", *parts))


def _local(number: int, at: datetime) -> datetime:
    """A moment in the user's time zone; without an offset where the provider does not know it."""
    offset = zone_of(number)[1]
    return at.replace(tzinfo=None) if offset is None else at.astimezone(timezone(timedelta(seconds=offset)))
