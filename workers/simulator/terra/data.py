"""What the simulated people have at Terra: their accounts, and every object of them, made when asked for.

As in the other half of the world nothing is stored: an object follows from (seed, person, provider, type, day). What
is remembered is which accounts there are, how far each type was measured, and what was corrected, so that the read API
never says less than the newest event.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta, timezone
from random import Random
from threading import RLock
from typing import Any

from workers.simulator.data import TIME_ZONES, World
from workers.simulator.people import User
from workers.simulator.query import Record
from workers.simulator.shapes import Place, fill
from workers.simulator.terra.objects import ATHLETE, KINDS, Kind
from workers.simulator.terra.people import PROVIDERS, TerraUser, usual

UNSEEN = timedelta(hours=8)  # how long ago a provider was heard last when the person connects
STEP = timedelta(hours=2)  # by how much one telling brings it nearer to the present
CYCLE_DAYS = 28


@dataclass(frozen=True, slots=True)
class Slot:
    """One object of an account: the one that begins on this day, or on the evening before."""

    account: tuple[int, str]
    kind: Kind
    day: int  # since year 1


class TerraWorld:
    """The accounts with Terra of a world's people, all or the first so many. Safe to use from several threads."""

    def __init__(self, world: World, people: int | None = None) -> None:
        self.world = world
        self._accounts: dict[str, TerraUser] = {}
        self._measured: dict[tuple[tuple[int, str], Kind], datetime] = {}
        self._revisions: dict[Slot, int] = {}
        self.payloads: dict[str, bytes] = {}  # what events only point to, by what names it
        self._waiting: list[Any] = []
        self._last_stamp = 0
        self._lock = RLock()
        for person in world.members[:people]:
            for provider in usual(person):
                self._open(TerraUser(self._id(person, provider.slug), person, provider, world.start))

    def accounts(self) -> list[TerraUser]:
        """Those that are not closed."""
        return list(self._accounts.values())

    def account(self, user_id: str) -> TerraUser | None:
        """The account of this id, if there is one and it is not closed."""
        return self._accounts.get(user_id)

    def kinds(self, account: TerraUser) -> list[Kind]:
        """The types of which an account has anything."""
        return [kind for kind in KINDS.values() if account.provider.supplies and kind.name in account.provider.supplies]

    def connect(self, reference_id: str, slug: str) -> TerraUser:
        """A person's account with a provider; they may be somebody who was not there before."""
        person = self.world.join(reference_id)
        with self._lock:
            for account in self._accounts.values():
                if account.place == (person.number, slug):
                    return account
            account = TerraUser(self._id(person, slug), person, PROVIDERS[slug], self.world.until)
            self._open(account)
            return account

    def renew(self, account: TerraUser) -> TerraUser:
        """The account under another id, as when a person connects what is connected. The old one is closed."""
        with self._lock:
            renewed = replace(account, user_id=self._id(account.person, account.user_id), since=self.world.until)
            del self._accounts[account.user_id]
            self._accounts[renewed.user_id] = renewed
            return renewed

    def close(self, account: TerraUser) -> None:
        """Nobody may read it any more."""
        with self._lock:
            self._accounts.pop(account.user_id, None)

    def objects(
        self, account: TerraUser, kind: Kind, start: datetime, end: datetime, *, with_samples: bool = True
    ) -> list[Record]:
        """Whatever was going on in a window, without its end, oldest first: what crosses an edge belongs to both."""
        return [self.record(slot, with_samples=with_samples) for slot in self._slots(account, kind, start, end)]

    def tell(self, account: TerraUser, kind: Kind, *, updated: bool = False) -> list[Record]:
        """What there is to tell: everything that was measured since the last time, or else the newest once more.

        From now on the read API has it too. With `updated` the newest is corrected.
        """
        with self._lock:
            before = self._measured[account.place, kind]
            after = max(before, min(self.world.until, before + STEP))
            self._measured[account.place, kind] = after
            far = timedelta(days=2 * kind.every + 1)
            known = list(self._slots(account, kind, before - far, after + far))
            slots = [slot for slot in known if before < self._span(slot, 0)[1]] or known[-1:]
            if updated:
                self._revisions |= {slot: self._revisions.get(slot, 0) + 1 for slot in slots[-1:]}
            return [self.record(slot) for slot in slots]

    def athlete(self, account: TerraUser) -> Record:
        """Who the person is."""
        place = Place(self._dice("athlete", *account.place), self.world.start, {}, str)
        return dict(fill(ATHLETE, place))

    def record(self, slot: Slot, *, with_samples: bool = True) -> Record:
        """The object of a slot, as it is now."""
        start, end = self._span(slot)
        number, slug = slot.account
        provider = PROVIDERS[slug]
        in_cycle = slot.day % CYCLE_DAYS
        known = {
            "seed": self._seed("values", *slot.account, slot.kind.name, slot.day),
            "until": self._local(
                number, min(end, self._measured[slot.account, slot.kind]) if slot.kind.is_running else end
            ),
            "end_time": self._local(number, end).isoformat(),
            "summary_id": f"{slug.lower()}-{slot.kind.name}-{slot.day}",  # unique for the account only
            "with_samples": with_samples,
            "provider": slug,
            "device": provider.device,
            "manufacturer": provider.name,
            "day_in_cycle": in_cycle + 1,
            "period_start": date.fromordinal(slot.day - in_cycle).isoformat(),
        }
        dice = self._dice("values", *slot.account, slot.kind.name, slot.day)
        place = Place(dice, self._local(number, start), known, str, self._revisions.get(slot, 0))
        return dict(fill(slot.kind.description, place))

    def stamp(self) -> int:
        """The moment of an event in unix milliseconds, later than that of every other."""
        with self._lock:
            self._last_stamp = max(self._last_stamp + 1, time.time_ns() // 1_000_000)
            return self._last_stamp

    def put(self, *events: Any) -> None:
        """Events that are to be sent before any other."""
        with self._lock:
            self._waiting += events

    def waiting(self) -> list[Any]:
        """Those, each only once: whoever takes them sends them."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
            return waiting

    def _open(self, account: TerraUser) -> None:
        self._accounts[account.user_id] = account
        for kind in self.kinds(account):
            self._measured.setdefault((account.place, kind), self.world.until - UNSEEN)

    def _slots(self, account: TerraUser, kind: Kind, start: datetime, end: datetime) -> Iterator[Slot]:
        """What overlaps with a window and can be known."""
        measured = self._measured.get((account.place, kind))
        if measured is None:
            return
        first = max(start.toordinal() - 1, self.world.start.toordinal())
        for day in range(first, min(end, measured).toordinal() + 2):
            slot = Slot(account.place, kind, day)
            begins, ends = self._span(slot)
            is_within = begins < end and max(start, self.world.start) < ends
            if day % kind.every == 0 and is_within and self._is_known(slot, measured):
                yield slot

    def _is_known(self, slot: Slot, at: datetime) -> bool:
        """Whether there is anything of it at a moment. What is corrected to end later was known before."""
        start, end = self._span(slot, 0)
        return start < at if slot.kind.is_running else end <= at

    def _span(self, slot: Slot, revision: int | None = None) -> tuple[datetime, datetime]:
        dice, kind = self._dice("moment", *slot.account, slot.kind.name, slot.day), slot.kind
        midnight = datetime.fromordinal(slot.day) - timedelta(seconds=self._offset(slot.account[0]) or 0)
        start = midnight.replace(tzinfo=UTC) + timedelta(
            hours=kind.hour, seconds=int(dice.random() * kind.jitter * 3600)
        )
        low, high = kind.lasts
        revision = self._revisions.get(slot, 0) if revision is None else revision
        minutes = round(60 * (low + dice.random() * (high - low) + kind.extends * revision))
        return start, start + timedelta(minutes=minutes)

    def _offset(self, number: int) -> int | None:
        return TIME_ZONES[number % len(TIME_ZONES)][1]

    def _local(self, number: int, at: datetime) -> datetime:
        """A moment as the person's provider tells it: with an offset or, where it knows none, without."""
        offset = self._offset(number)
        return at.replace(tzinfo=None) if offset is None else at.astimezone(timezone(timedelta(seconds=offset)))

    def _id(self, person: User, what: str) -> str:
        return self.world.identity("terra", person.number, what)

    def _seed(self, *parts: object) -> str:
        return "/".join(str(part) for part in (self.world.seed, "terra", *parts))

    def _dice(self, *parts: object) -> Random:
        return Random(self._seed(*parts))  # noqa: S311 - repeatable on purpose
