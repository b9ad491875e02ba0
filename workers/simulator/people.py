"""The simulated people and the providers they are connected to."""

from dataclasses import dataclass
from datetime import datetime

from app.catalogue import Resource


@dataclass(frozen=True, slots=True)
class Provider:
    """Where data comes from. Without `supplies` it has something of every resource."""

    slug: str
    name: str
    source_type: str
    device: str
    supplies: frozenset[str] | None = None

    def has(self, resource: Resource) -> bool:
        """Whether the provider supplies a resource."""
        return self.supplies is None or resource.name in self.supplies

    def described(self) -> dict[str, str]:
        """The provider as events and answers describe it."""
        return {"name": self.name, "slug": self.slug, "logo": f"https://example.invalid/logos/{self.slug}.png"}


def _some(*resources: str) -> frozenset[str]:
    return frozenset(resources)


_TRAINING = _some("workouts", "workout_stream", "profile", "device", "workout_duration", "calories_active")
_SCALE = _some("body", "weight", "fat", "profile", "device", "blood_pressure", "body_temperature", "lean_body_mass")
_RING = _some("sleep", "sleep_cycle", "activity", "heartrate", "hrv", "profile", "device", "blood_oxygen", "steps")
_SENSOR_ON_ARM = _some("glucose", "note", "carbohydrates", "insulin_injection", "profile", "device")

# Every user has one of the first kind, so that there is something of every resource for everybody.
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
    Provider("freestyle_libre", "FreeStyle Libre", "automatic", "Libre 3", _SENSOR_ON_ARM),
)


PROVIDERS = {provider.slug: provider for provider in (*WIDE, *NARROW)}


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
        """The name of the account at the provider."""
        return f"{self.provider.slug}-{self.user_number}"


@dataclass(frozen=True, slots=True)
class User:
    """A simulated person. `client_user_id` is on purpose no UUID."""

    number: int
    user_id: str
    client_user_id: str
    connections: tuple[Connection, ...]

    def connection(self, slug: str) -> Connection | None:
        """The user's account with this provider, if there is one."""
        return next((connection for connection in self.connections if connection.provider.slug == slug), None)
