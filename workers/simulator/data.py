"""The simulated world: users, their connections, and their records and samples, generated on request.

Records are not stored. A record's moment, id and values follow from (seed, user, provider, resource, slot) alone; a
slot is one period of the resource's schedule. So a window costs only its own slots, and the same arguments give the
same world on every machine. Only revisions are stored, so that the read API and the newest event about a record have
the same version of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from random import Random
from threading import Lock
from typing import Any
from uuid import UUID, uuid5

from app.catalogue import Resource, catalogue
from workers.simulator.conditions import Conditions
from workers.simulator.people import Connection, Provider, Query, Record, Sample, Slot, User, grouped, usual, zone_of
from workers.simulator.series import DAY, Series, schedule_of, series_of, timing_of
from workers.simulator.shapes import Context, fill, later, seeded
from workers.simulator.summaries import EXTRAS, NOTICES, STREAMS, SUMS, TOTALS, known_after, shape_of

NAMESPACE = UUID("6f1c2f0e-2d3a-5b57-9a44-0f4f3b1c7a10")
# The local hours in which users move. They lie within one day of UTC in every time zone of TIME_ZONES, so that a day's
# samples have the same total whether days are separated at midnight UTC or at local midnight.
AWAKE = range(9, 19)


@dataclass
class World:
    """All simulated users and their data from `until - days` to `until`.

    `until` may be moved forward while the world is in use, which adds data. The history that was pulled when the users
    connected still ends at `connected_at`. `conditions` holds failed connections and pulls.
    """

    seed: int
    users: int
    until: datetime
    days: int
    team_id: str = field(init=False)
    members: tuple[User, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.until = self.until.astimezone(UTC)
        self.start = (self.until - timedelta(days=self.days)).replace(hour=0, minute=0, second=0, microsecond=0)
        self.connected_at = self.until
        self.team_id = self.identity("team")
        self.members = tuple(self._member(number) for number in range(1, self.users + 1))
        self.conditions = Conditions(lambda: self.members)
        self._by_id = {member.user_id: member for member in self.members}
        self._removed: dict[str, User] = {}
        self._arrived: list[Connection] = []
        self._revisions: dict[Slot, int] = {}
        self._changed: dict[Slot, None] = {}
        self._chooser = seeded(self.seed, "changes")
        self._lock = Lock()
        self._found: dict[str, Slot] = {}
        self._searched_until: dict[str, datetime] = {}

    def user(self, user_id: str) -> User | None:
        return self._by_id.get(user_id)

    def owner(self, connection: Connection) -> User:
        """The user of a connection, also after the user was removed."""
        return self._by_id.get(connection.user_id) or self._removed[connection.user_id]

    @property
    def all_connections(self) -> list[Connection]:
        return [connection for member in self.members for connection in member.connections]

    def named(self, client_user_id: str) -> User | None:
        return next((member for member in self.members if member.client_user_id == client_user_id), None)

    def join(self, client_user_id: str) -> User:
        """Adds a user without connections. Returns the existing user if the name is known."""
        with self._lock:
            if known := self.named(client_user_id):
                return known
            number = len(self.members) + len(self._removed) + 1
            user = User(number, self.identity("user", number), client_user_id, ())
            self._put(user)
            return user

    def change_user(self, user_id: str, **changes: Any) -> None:
        with self._lock:
            self._put(replace(self._by_id[user_id], **changes))

    def remove(self, user_id: str) -> None:
        """Removes a user, whose data is no longer served."""
        with self._lock:
            self._removed[user_id] = self._by_id.pop(user_id)
            self.members = tuple(self._by_id.values())

    def restore(self, user_id: str | None, client_user_id: str | None) -> bool:
        """Restores a removed user, without connections. False without such a user, or if another one has the name."""
        with self._lock:
            removed = [one for one in self._removed.values() if user_id in (None, one.user_id)]
            user = next((one for one in reversed(removed) if client_user_id in (None, one.client_user_id)), None)
            if user is None or self.named(user.client_user_id):
                return False
            del self._removed[user.user_id]
            self._put(replace(user, connections=()))
            return True

    def connect(self, user_id: str, provider: Provider) -> Connection:
        """The user's connection with a provider, made now if there is none; see `arrived`."""
        with self._lock:
            user = self._by_id[user_id]
            if known := user.connection(provider.slug):
                if self.conditions.reconnect(known):
                    self._arrived.append(known)
                return known
            device_id = self.identity("device", user.number, provider.slug)
            made = Connection(user.number, user_id, provider, device_id, self.until)
            user = replace(user, connections=(*user.connections, made))
            self._put(user)
            self._arrived.append(made)
            self._searched_until.clear()
            return made

    def arrived(self) -> list[Connection]:
        """The connections made since the last call, whose events are not sent yet."""
        with self._lock:
            arrived, self._arrived = self._arrived, []
            return arrived

    def connections(self, user: User, resource: Resource, provider: str | None = None) -> list[Connection]:
        """The user's connections that supply a resource, of one provider or of all."""
        return [
            connection
            for connection in user.connections
            if provider in (None, connection.provider.slug) and connection.provider.has(resource)
        ]

    def slots(
        self, connection: Connection, resource: Resource, start: datetime, end: datetime, begin: int = 0
    ) -> Iterator[Slot]:
        """The slots that can have data in a window, oldest first, from the one numbered `begin`."""
        numbers = self.numbers(resource, start, end)
        return (Slot(connection, resource, number) for number in range(max(numbers.start, begin), numbers.stop))

    def numbers(self, resource: Resource, start: datetime, end: datetime) -> range:
        """The numbers of the slots that can have data in a window."""
        if _is_single(resource):
            return range(1)
        every = schedule_of(resource).every
        first = max(start, self.start).timestamp() // every
        last = min(end, self.newest(resource)).timestamp() // every
        return range(int(first) - 1, int(last) + 1)

    def newest(self, resource: Resource) -> datetime:
        """The end of the known data: a summary is known `known_after` seconds after its moment."""
        return self.until if resource.kind == "timeseries" else self.until - timedelta(seconds=known_after(resource))

    def latest(self, connection: Connection, resource: Resource, at: datetime | None = None) -> Slot:
        """The newest slot that is known at a moment, by default at the end of the world."""
        end = min(at or self.until, self.newest(resource))
        slot = self._slot(connection, resource, int(end.timestamp() // schedule_of(resource).every))
        return slot if self.moment(slot) <= end else replace(slot, number=slot.number - 1)

    def has(self, connection: Connection, resource: Resource) -> bool:
        """Whether the connection has a record of the resource yet: a short world may lack a rare one."""
        return self.moment(self.latest(connection, resource)) >= self.start

    def summaries(self, query: Query) -> list[Record]:
        """The records of a window, by connection and oldest first."""
        return [self.record(slot) for slot in self.within(query)]

    def within(self, query: Query) -> list[Slot]:
        """The slots whose moment is in a window, by connection and oldest first."""
        low, high = max(query.start, self.start), min(query.end, self.newest(query.resource))
        return [
            slot
            for connection in self.connections(query.user, query.resource, query.provider)
            for slot in self.slots(connection, query.resource, low, high)
            if low <= self.moment(slot) <= high
        ]

    def samples(self, query: Query, begin: tuple[int, ...] = (0, 0, 0)) -> Iterator[Sample]:
        """The samples of a window in their fixed order, from a position on."""
        low, high = max(query.start, self.start), min(query.end, self.until)
        connections = self.connections(query.user, query.resource, query.provider)
        for number, connection in enumerate(connections[begin[0] :], begin[0]):
            first = begin[1] if number == begin[0] else 0
            for slot in self.slots(connection, query.resource, low, high, first):
                for index, sample in enumerate(self.burst(slot)):
                    position = (number, slot.number, index)
                    if position >= begin and low <= datetime.fromisoformat(sample["timestamp"]) <= high:
                        yield Sample(position, self.source(slot), sample)

    def groups(self, query: Query) -> list[Record]:
        """The samples of a window as the read API returns them: {"source": ..., "data": [...]} for each source."""
        return grouped(self.samples(query))

    def record(self, slot: Slot) -> Record:
        """The object of a slot, in its newest revision."""
        context = self._context(slot)
        record: Record = {"id": self.identify(slot), "user_id": slot.connection.user_id}
        for column in slot.resource.fields:
            record[column.name] = fill(shape_of(slot.resource, column), context)
        for name, parts in SUMS.get(slot.resource.name, {}).items():
            record[name] = sum(record[part] for part in parts)
        for name, series in TOTALS.get(slot.resource.name, {}).items():
            measured = slot.connection.provider.has(catalogue()[series])
            record[name] = self._total(slot, catalogue()[series]) if measured else None
        return {**record, **fill(EXTRAS.get(slot.resource.name, {}), context), **self._origin(slot)}

    def burst(self, slot: Slot) -> list[Record]:
        """The samples of a slot: one for each moment and subtype of its series."""
        series = series_of(slot.resource)
        context = self._context(slot)
        subtypes: tuple[str | None, ...] = series.subtypes or (None,)
        moments = [later(context, number * series.step) for number in range(series.count)]
        samples = [_sample(slot.resource, series, moment, subtype) for moment in moments for subtype in subtypes]
        if not series.is_counted:
            return samples
        return [sample | {"value": value} for sample, value in zip(samples, self.counted(slot), strict=True)]

    def counted(self, slot: Slot) -> list[float]:
        """The values of a slot of movement, one for each moment.

        All sources of a user count the same movement, scaled by the share of their provider, and 0 at night. A revision
        rotates the values within the slot. So the day's total stays the same, and one event carries the correction.
        """
        series, connection = series_of(slot.resource), slot.connection
        if (self.moment(slot) + timedelta(seconds=zone_of(connection.user_number)[1] or 0)).hour not in AWAKE:
            return [0] * series.count
        rng = seeded(self.seed, connection.user_number, slot.resource.name, slot.number)
        context = Context(rng, self.until, {}, str)
        whole: list[float] = [fill(series.value, context) for _ in range(series.count)]
        values = [round(value * connection.provider.share, None if isinstance(value, int) else 1) for value in whole]
        turned = self._revisions.get(slot, 0) % series.count
        return values[turned:] + values[:turned]

    def _total(self, day: Slot, resource: Resource) -> float:
        slots = DAY // schedule_of(resource).every
        numbers = range(day.number * slots, (day.number + 1) * slots)
        return round(sum(sum(self.counted(Slot(day.connection, resource, number))) for number in numbers), 1)

    def source(self, slot: Slot) -> Record:
        """The source that a slot's record or samples name."""
        provider = slot.connection.provider
        extra = series_of(slot.resource).source
        source = {"provider": provider.slug, "type": provider.source_type}
        return {**source, **fill(extra, self._context(slot))} if extra else source

    def notice(self, slot: Slot) -> Record:
        """The data of an event about a stream: its identifiers and source, without the stream."""
        identifier = self.link(slot, timing_of(slot.resource))
        extra = fill(NOTICES.get(slot.resource.name, {}), self._context(slot))
        record = {"user_id": slot.connection.user_id, slot.resource.identifier: identifier}
        return {**record, **extra, "source": self.source(slot)}

    def stream(self, resource: Resource, identifier: str) -> Record | None:
        """The stream of the record with this id, if there is such a record."""
        slot = self._find(catalogue()[timing_of(resource)], identifier)
        if slot is None:
            return None
        return dict(fill(STREAMS[resource.name], self._context(replace(slot, resource=resource))))

    def revise(self, slot: Slot) -> None:
        """Makes the slot's record newer: other values, and a later `updated_at` where it has one."""
        with self._lock:
            self._revisions[slot] = self._revisions.get(slot, 0) + 1

    def change(self, query: Query, limit: int) -> None:
        """Revises up to `limit` of a query's slots, always the first and the last, and notes them as unannounced.

        A client between two pages has then read one of them in the old version, and still has to read the other.
        """
        found = self.within(query)
        with self._lock:
            inner = self._chooser.sample(found[1:-1], max(0, min(limit, len(found)) - 2))
        chosen = dict.fromkeys([*found[:1], *inner, *found[1:][-1:]][:limit])
        for slot in chosen:
            self.revise(slot)
        with self._lock:
            self._changed |= chosen

    def changed(self, *, forget: bool = False) -> list[Slot]:
        """The slots that `change` has revised and whose events are not sent yet."""
        with self._lock:
            changed = list(self._changed)
            if forget:
                self._changed = {}
            return changed

    def moment(self, slot: Slot) -> datetime:
        """The moment of a slot's record, or of the first of its samples."""
        if _is_single(slot.resource):
            return self.start
        schedule = schedule_of(slot.resource)
        late = schedule.offset
        if schedule.jitter:
            late += self._rng(slot, "moment", timing_of(slot.resource)).randrange(schedule.jitter)
        return datetime.fromtimestamp(slot.number * schedule.every + late, UTC)

    def identify(self, slot: Slot) -> str:
        """A record's id, which never changes."""
        connection = slot.connection
        return self.identity(connection.user_number, connection.provider.slug, slot.resource.name, slot.number)

    def link(self, slot: Slot, resource: str) -> str:
        """The id of the record of another resource that shares the slot's schedule."""
        return self.identify(self._slot(slot.connection, catalogue()[resource], slot.number))

    def identity(self, *parts: object) -> str:
        """A UUID made of these parts and the seed."""
        return str(uuid5(NAMESPACE, "/".join(str(part) for part in (self.seed, *parts))))

    def _slot(self, connection: Connection, resource: Resource, number: int = 0) -> Slot:
        return Slot(connection, resource, 0 if _is_single(resource) else number)

    def _find(self, resource: Resource, identifier: str) -> Slot | None:
        # A slot cannot be computed from an id, so all ids are made once, and again after the world has grown.
        if identifier not in self._found and self._searched_until.get(resource.name) != self.until:
            self._searched_until[resource.name] = self.until
            for user in self.members:
                for connection in self.connections(user, resource):
                    for slot in self.slots(connection, resource, self.start, self.until):
                        self._found[self.identify(slot)] = slot
        found = self._found.get(identifier)
        is_known = found and found.resource == resource and found.connection.user_id in self._by_id
        return found if is_known else None

    def _context(self, slot: Slot) -> Context:
        connection = slot.connection
        zone, offset = zone_of(connection.user_number)
        variables = {
            "provider": connection.provider.slug,
            "source_type": connection.provider.source_type,
            "device_id": connection.device_id,
            "device_model": connection.provider.device,
            "device_manufacturer": connection.provider.name,
            "time_zone": zone,
            "timezone_offset": offset,
        }
        rng = self._rng(slot, "values", slot.resource.name)
        return Context(rng, self.moment(slot), variables, partial(self.link, slot), self._revisions.get(slot, 0))

    def _origin(self, slot: Slot) -> Record:
        # A device is one of the few objects that name their provider beside the other fields, not in a `source`.
        if slot.resource.kind == "device":
            provider = slot.connection.provider
            return {"provider": provider.slug, "source_type": provider.source_type}
        return {"source_type": slot.connection.provider.source_type, "source": self.source(slot)}

    def _rng(self, slot: Slot, purpose: str, name: str) -> Random:
        connection = slot.connection
        return seeded(self.seed, connection.user_number, connection.provider.slug, name, slot.number, purpose)

    def _put(self, user: User) -> None:
        self._by_id[user.user_id] = user
        self.members = tuple(self._by_id.values())

    def _member(self, number: int) -> User:
        rng = seeded(self.seed, number)
        user_id = self.identity("user", number)
        connections = (
            Connection(number, user_id, provider, self.identity("device", number, provider.slug), self.start)
            for provider in usual(number, rng)
        )
        return User(number, user_id, f"member-{number:04d}", tuple(connections))


def _is_single(resource: Resource) -> bool:
    """Whether a connection has one record of it, without a schedule."""
    return resource.kind == "device" or resource.dates == "none"


def _sample(resource: Resource, series: Series, context: Context, subtype: str | None) -> Record:
    timestamp = context.instant.isoformat()
    offset = context.variables["timezone_offset"]
    sample = {"timestamp": timestamp, "unit": resource.unit or series.unit, "timezone_offset": offset, "type": None}
    if resource.interval:
        end = context.instant + timedelta(seconds=series.step or series.lasts)
        sample |= {"start": timestamp, "end": end.isoformat()}
    sample |= fill(series.body, context)
    return sample | {resource.key[0]: subtype} if subtype else sample
