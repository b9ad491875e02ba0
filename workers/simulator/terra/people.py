"""The people's accounts with Terra, and the providers they are connected to."""

from dataclasses import dataclass
from datetime import datetime

from workers.simulator.people import Provider, User


def _some(*kinds: str) -> frozenset[str]:
    return frozenset(kinds)


_WATCH = _some("activity", "daily", "sleep", "body", "menstruation", "planned_workout")

# By the names that Terra has for them. A person's number says which two they have.
PROVIDERS = {
    provider.slug: provider
    for provider in (
        Provider("PELOTON", "Peloton", "exercise_machine", "Bike+", _some("activity")),
        Provider("OURA", "Oura", "ring", "Gen3", _some("daily", "sleep")),
        Provider("GARMIN", "Garmin", "watch", "Forerunner 265", _WATCH),
        Provider("FREESTYLELIBRE", "FreeStyle Libre", "automatic", "Libre 3", _some("body")),
        Provider("WITHINGS", "Withings", "scale", "Body Cardio", _some("body", "sleep")),
        Provider("MYFITNESSPAL", "MyFitnessPal", "app", "MyFitnessPal", _some("nutrition")),
    )
}
APART = 2  # places between a person's two


@dataclass(frozen=True, slots=True)
class TerraUser:
    """One person's connection with one provider, which Terra calls a user. It gets another id when it is renewed."""

    user_id: str
    person: User
    provider: Provider
    since: datetime

    @property
    def place(self) -> tuple[int, str]:
        """What stays the same over all ids."""
        return self.person.number, self.provider.slug


def usual(person: User) -> list[Provider]:
    """What a person is connected with from the start."""
    providers = list(PROVIDERS.values())
    return [providers[(person.number + step) % len(providers)] for step in (0, APART)]
