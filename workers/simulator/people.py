"""The simulated users and the providers that they have connected."""

from dataclasses import dataclass
from datetime import datetime

from app.catalogue import Resource


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
