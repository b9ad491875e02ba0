"""The parts of the simulated world: users, the providers that they have connected, and queries about their data."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from random import Random
from typing import Any

from app.catalogue import Resource

Record = dict[str, Any]
TIME_ZONES = (("Europe/Brussels", 3600), ("America/New_York", -18000), ("Asia/Tokyo", 32400), (None, None))


@dataclass(frozen=True, slots=True)
class Provider:
    """A source of data. Without `supplies` it has every resource. It counts `share` of the movement."""

    slug: str
    name: str
    source_type: str
    device: str
    supplies: frozenset[str] | None = None
    share: float = 1.0

    def has(self, resource: Resource) -> bool:
        return self.supplies is None or resource.name in self.supplies

    def described(self) -> dict[str, str]:
        """The provider as events and responses describe it."""
        return {"name": self.name, "slug": self.slug, "logo": f"https://example.invalid/logos/{self.slug}.png"}


_TRAINING = frozenset({"workouts", "workout_stream", "profile", "device", "workout_duration", "calories_active"})
_SCALE = frozenset(
    {"body", "weight", "fat", "profile", "device", "blood_pressure", "body_temperature", "lean_body_mass"}
)
_RING = frozenset(
    {"sleep", "sleep_cycle", "activity", "heartrate", "hrv", "profile", "device", "blood_oxygen", "steps"}
)
_GLUCOSE_SENSOR = frozenset({"glucose", "note", "carbohydrates", "insulin_injection", "profile", "device"})

# Every user has one of these, so that every user has data of every resource.
WIDE = (
    Provider("apple_health_kit", "Apple HealthKit", "watch", "Watch9,1"),
    Provider("garmin", "Garmin", "watch", "Forerunner 265"),
    Provider("fitbit", "Fitbit", "watch", "Charge 6"),
)
NARROW = (
    Provider("oura", "Oura", "ring", "Gen3", _RING),
    Provider("withings", "Withings", "scale", "Body Comp", _SCALE),
    Provider("peloton", "Peloton", "exercise_machine", "Bike+", _TRAINING),
    Provider("zwift", "Zwift", "app", "Zwift", _TRAINING),
    Provider("strava", "Strava", "app", "Strava", _TRAINING),
    Provider("freestyle_libre", "FreeStyle Libre", "automatic", "Libre 3", _GLUCOSE_SENSOR),
)
PROVIDERS = {provider.slug: provider for provider in (*WIDE, *NARROW)}
# The second source of the first user, who also has a watch. The phone counts the same movement in the same hours, but
# only a share of it. The two differ in provider and in source type.
PHONE = Provider(
    "apple_health_kit",
    "Apple HealthKit",
    "phone",
    "iPhone17,1",
    frozenset({"activity", "device", "distance", "profile", "steps"}),
    share=0.8,
)


@dataclass(frozen=True, slots=True)
class Connection:
    """One user's account with one provider."""

    user_number: int
    user_id: str
    provider: Provider
    device_id: str
    since: datetime

    @property
    def external_user_id(self) -> str:
        return f"{self.provider.slug}-{self.user_number}"


@dataclass(frozen=True, slots=True)
class User:
    """A simulated user. `client_user_id` is deliberately not a UUID."""

    number: int
    user_id: str
    client_user_id: str
    connections: tuple[Connection, ...]
    fallback_time_zone: str | None = None

    def connection(self, slug: str) -> Connection | None:
        return next((connection for connection in self.connections if connection.provider.slug == slug), None)


def usual(user_number: int, rng: Random) -> list[Provider]:
    """The providers that a user has from the start."""
    second = [PHONE] if user_number == 1 else rng.sample(NARROW, rng.randrange(1, 3))
    return [WIDE[user_number % len(WIDE)], *second]


@dataclass(frozen=True, slots=True)
class Slot:
    """One period of a resource's schedule. It identifies a record, or the samples of one moment."""

    connection: Connection
    resource: Resource
    number: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample, its source, and its place in the fixed order of a query's samples: connection, slot and sample."""

    position: tuple[int, int, int]
    source: Record
    body: Record


@dataclass(frozen=True, slots=True)
class Query:
    """A user's records of a resource in a window, both ends included."""

    user: User
    resource: Resource
    start: datetime
    end: datetime
    provider: str | None = None


def zone_of(user_number: int) -> tuple[str | None, int | None]:
    """A user's time zone: its name, and seconds east of UTC."""
    return TIME_ZONES[user_number % len(TIME_ZONES)]


def grouped(samples: Iterable[Sample]) -> list[Record]:
    """Samples grouped by source, in the order in which the sources first appear."""
    groups: dict[tuple[Any, ...], Record] = {}
    for sample in samples:
        key = tuple(sorted((name, value or "") for name, value in sample.source.items()))
        groups.setdefault(key, {"source": sample.source, "data": []})["data"].append(sample.body)
    return list(groups.values())
